"""A shift layer with one copy that does not learn, which is computed without its dense kernel."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, SHAPE
from test_shift import moved
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.nn.shift import ShiftConv2d
from compress.surgery import layers


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("quantize", [True, False])
def test_one_tap_computes_and_trains_as_its_dense_kernel(name: str, quantize: bool) -> None:
    torch.manual_seed(0)
    for old in layers(AWKWARD[name](), (nn.Conv2d,)).values():
        assert isinstance(old, nn.Conv2d)
        shape: dict[str, Any] = {k: getattr(old, k) for k in ("stride", "padding", "dilation", "groups")}
        new = ShiftConv2d(
            old.in_channels,
            old.out_channels,
            old.kernel_size,
            1,
            padding_mode=old.padding_mode,
            quantize=quantize,
            **shape,
        )
        with torch.no_grad():
            new.displacement.uniform_(-1.4, 1.4)
        x = torch.randn(2, *SHAPE)[:, : old.in_channels].requires_grad_()
        composed = nn.Conv2d(
            old.in_channels, old.out_channels, old.kernel_size, padding_mode=old.padding_mode, bias=False, **shape
        )
        del composed.weight
        composed.weight = new.kernel()
        expected = composed(x) + new.pointwise.bias.view(-1, 1, 1)  # type: ignore[union-attr]  # it has one
        grad = torch.randn_like(expected)
        into = (x, new.pointwise.weight, new.pointwise.bias)
        wanted = torch.autograd.grad(expected, into, grad)
        found = new(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        for ours, theirs in zip(torch.autograd.grad(found, into, grad), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_one_tap_sees_every_change_of_a_displacement_or_of_the_type() -> None:
    torch.manual_seed(0)
    layer = ShiftConv2d(2, 3, 3, 1, padding=1, bias=False)
    x = torch.randn(1, 2, 5, 6)

    def expected(dy: int, dx: int) -> Tensor:
        return F.conv2d(moved(x, dy, dx), layer.pointwise.weight.detach().float())

    torch.testing.assert_close(layer(x), expected(0, 0))
    with torch.inference_mode():
        layer.displacement.fill_(1)
        torch.testing.assert_close(layer(x), expected(1, 1))
    layer(x).sum().backward()
    layer.displacement.data[..., 0] = -1
    torch.testing.assert_close(layer(x), expected(-1, 1))
    state = layer.state_dict() | {"displacement": torch.tensor([0.0, -1.0]).expand(2, 1, 2)}
    layer.load_state_dict(state, assign=True)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected(0, -1))
    torch.testing.assert_close(layer.double()(x.double()).float(), expected(0, -1))
    with torch.autocast("cpu", torch.bfloat16):
        half = layer.float()(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected(0, -1), rtol=0.02, atol=0.02)


def test_one_tap_computes_with_parametrized_weights() -> None:
    torch.manual_seed(0)
    layer = ShiftConv2d(4, 6, 3, 1, padding=1)
    mask = torch.rand(6, 4, 1, 1) < 0.5

    class Masked(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * mask

    x = torch.randn(1, 4, 5, 5)
    expected = F.conv2d(x, layer.pointwise.weight * mask, layer.pointwise.bias)
    parametrize.register_parametrization(layer.pointwise, "weight", Masked())
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    grad = layer.pointwise.parametrizations.weight.original.grad  # type: ignore[union-attr]  # untyped in torch
    assert torch.equal(grad != 0, mask)
