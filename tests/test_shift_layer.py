"""The shift layer by itself: its forms without empty copies, two calls in one pass, its pulls, geometry it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.errors import ConfigError
from compress.nn.shift import ShiftConv2d
from compress.stages import Shift


def test_a_copy_without_weight_widens_no_window() -> None:
    torch.manual_seed(0)
    layer = ShiftConv2d(8, 8, 3, 3, padding=1, learn=True, l1=1.0).eval()
    with torch.no_grad():
        layer.displacement.uniform_(-0.3, 0.3)  # all copies meet in the centre
    x = torch.randn(2, 8, 5, 5)
    before = layer(x)
    layer.settle()
    forms = layer.forms("onnxruntime")
    assert list(forms) == ["pointwise"]
    torch.testing.assert_close(forms["pointwise"](x), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantize", [False, True])
def test_a_layer_that_learns_can_be_used_twice(quantize: bool) -> None:
    layer = ShiftConv2d(4, 4, 3, 2, padding=1, learn=True, quantize=quantize)
    with torch.no_grad():
        layer.displacement.fill_(1.5)
    layer(layer(torch.randn(2, 4, 5, 5)).relu()).square().sum().backward()
    assert layer.displacement.grad is not None and layer.displacement.max() == 1


def test_lattice_decay_pulls_to_the_nearest_whole_step() -> None:
    layer = ShiftConv2d(1, 1, 3, 2, padding=1, learn=True, quantize=False, lattice_decay=0.5)
    with torch.no_grad():
        layer.displacement.copy_(torch.tensor([[[0.2, -0.9], [0.6, 1.0]]]))
    layer.penalty().backward()
    expected = torch.tensor([[[0.1, 0.05], [-0.2, 0.0]]])  # half of how far each is from its whole step
    torch.testing.assert_close(layer.displacement.grad, expected)
    assert ShiftConv2d(**layer.config()).lattice_decay == 0.5
    with pytest.raises(ConfigError, match=r"`lattice_decay` \(=0.1\) pulls at learned displacements"):
        Shift(lattice_decay=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 2}, r"`groups` \(=2\) must divide `in_channels` \(=3\)"),
        ({"padding": "same", "stride": 2}, r"`padding` \(='same'\) has no stride"),
        ({"padding": "full"}, r"`padding` \(='full'\) must be a number, a pair, same or valid"),
    ],
)
def test_geometry_that_no_convolution_has_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShiftConv2d(3, 4, 3, 2, **settings)
