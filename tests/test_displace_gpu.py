"""The kernels for GPUs against the convolutions of the CPU; without a GPU in Triton's interpreter, if it is there."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from compress.nn.displacement import _convolve, _slopes, _spread, bilinear_kernel
from compress.nn.gpu import displace
from compress.nn.shift import ShiftConv2d
from compress.nn.taps import round_half_away

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton", reason="Triton comes with torch's builds for GPUs")


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("whole", [False, True], ids=["bilinear", "whole"])
@pytest.mark.parametrize("channels", [5, 70])
@pytest.mark.parametrize("turned", [False, True], ids=["where it lies", "turned"])
def test_they_are_the_convolutions(
    last: bool, stride: int, whole: bool, channels: int, turned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(displace, "TURNED_PROGRAMS", 1 if turned else 10**9)
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(2, channels, 7, 9, device=DEVICE).contiguous(memory_format=layout)
    d = torch.rand(channels, 2, device=DEVICE) * 6 - 3
    used = round_half_away(d) if whole else d
    expected = _convolve(x.double(), bilinear_kernel(used).double(), stride)
    grad = torch.randn(expected.shape, device=DEVICE).contiguous(memory_format=layout)
    y = displace.move(x, used, stride, whole)
    assert y.stride() == expected.float().contiguous(memory_format=layout).stride()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    back = _convolve(_spread(grad.double(), stride, x.shape), bilinear_kernel(used).double().flip(-2, -1), 1)
    moved_back = displace.move_back(grad, used, x.shape, stride, whole).double()
    torch.testing.assert_close(moved_back, back, rtol=1e-5, atol=1e-5)
    slopes = displace.slopes(x, d, grad, stride)
    torch.testing.assert_close(
        slopes.double(), _slopes(x.double(), d.double(), grad.double(), stride), rtol=1e-4, atol=1e-4
    )


def test_numbers_that_move_by_whole_pixels_are_not_rounded() -> None:
    x = torch.randn(2, 9, 5, 6, device=DEVICE).bfloat16()
    d = torch.randint(-2, 3, (9, 2), device=DEVICE).float()
    assert torch.equal(displace.move(x, d, 1, True), _convolve(x, bilinear_kernel(d), 1))


@pytest.mark.skipif(DEVICE == "cpu", reason="a layer takes them on a GPU only")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel,dilation", [(3, 1), (3, 2), (5, 1)])
def test_a_layer_with_one_copy_is_the_same_on_both(stride: int, kernel: int, dilation: int) -> None:
    torch.manual_seed(0)
    layer = ShiftConv2d(12, 8, kernel, 1, stride, dilation * (kernel // 2), dilation)
    reach = kernel // 2
    layer.displacement.data.copy_(torch.randint(-reach, reach + 1, layer.displacement.shape))
    x = torch.randn(2, 12, 11, 14)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), layer.cpu()(x), rtol=1e-4, atol=1e-5)
