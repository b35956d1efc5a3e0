"""Displacing every channel of a map by its own vector, by whole pixels or between them, with derivatives.

Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", CVPR 2018: whole pixels.
Jeon & Kim, "Constructing Fast Network through Deconstruction of Convolution", NeurIPS 2018: bilinear.
Chen et al., "All You Need is a Few Shifts", CVPR 2019: rounded with a straight-through gradient.

On the CPU it is a depthwise convolution; on a GPU with Triton, kernels of our own.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.nn.gpu import displace as on_gpu
from compress.nn.taps import round_half_away


def _hat(d: Tensor, reach: int) -> Tensor:
    """Bilinear weight of the positions -reach .. reach for displacements `d`: (C,) -> (C, 2 * reach + 1)."""
    positions = torch.arange(-reach, reach + 1, device=d.device, dtype=d.dtype)
    return (1 - (d.unsqueeze(-1) - positions).abs()).clamp(min=0)


def _slope(d: Tensor, reach: int) -> Tensor:
    """Derivative of `_hat` after `d`; on the lattice that of the cell to the right, as in the published kernels."""
    positions = torch.arange(-reach, reach + 1, device=d.device, dtype=d.dtype)
    left = torch.floor(d).unsqueeze(-1)
    return (positions == left + 1).to(d.dtype) - (positions == left).to(d.dtype)


def _kernel(rows: Tensor, columns: Tensor) -> Tensor:
    """A depthwise kernel, (C, 1, ky, kx), from what it is along y (C, ky) and along x (C, kx)."""
    return (rows.unsqueeze(-1) * columns.unsqueeze(-2)).unsqueeze(1)


def _farthest(displacement: Tensor) -> float:
    """The largest displacement along any axis. One that is no number moves nothing far, and its hat is NaN: so will be
    the loss, which training looks at."""
    return float(displacement.detach().abs().nan_to_num(0, 0, 0).max())


def bilinear_kernel(displacement: Tensor) -> Tensor:
    """The depthwise convolution, (C, 1, k, k), that displaces each channel by its (y, x) of (C, 2).

    One-hot for whole pixels, bilinear between them; k is the smallest odd size that holds every displacement.
    """
    reach = math.ceil(_farthest(displacement))
    return _kernel(_hat(displacement[:, 0], reach), _hat(displacement[:, 1], reach))


class _Displace(torch.autograd.Function):
    """x (N, C, H, W) and displacements (C, 2) as (y, x) -> (N, C, ceil(H / stride), ceil(W / stride))."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, displacement: Tensor, stride: int, quantize: bool, normalize: bool, reach: float
    ) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, displacement)
        ctx.settings = x.shape, stride, quantize, normalize, reach
        used = round_half_away(displacement) if quantize else displacement
        if _by_kernels(x):
            return on_gpu.move(x, used.float(), stride, quantize)
        return _convolve(x, bilinear_kernel(used), stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        x, displacement = ctx.saved_tensors
        shape, stride, quantize, normalize, reach = ctx.settings
        by_x = by_displacement = None
        used = round_half_away(displacement) if quantize else displacement
        fast = _by_kernels(grad)
        if ctx.needs_input_grad[0] and fast:
            by_x = on_gpu.move_back(grad, used.float(), shape, stride, quantize)
        elif ctx.needs_input_grad[0]:
            by_x = _convolve(_spread(grad, stride, shape), bilinear_kernel(used).flip(-2, -1), 1)
        if ctx.needs_input_grad[1]:
            # Straight through the rounding: the bilinear derivative where the displacement really is, and at the far
            # edge just inside it: the cell to the right of it is one that no displacement can reach.
            here = _below(displacement, reach)
            if fast:
                by_displacement = on_gpu.slopes(x, here.float(), grad, stride).to(displacement.dtype)
            else:
                by_displacement = _slopes(x, here, grad, stride)
            if normalize:
                tiny = torch.finfo(by_displacement.dtype).tiny
                by_displacement = by_displacement / by_displacement.norm(dim=-1, keepdim=True).clamp(min=tiny)
        return by_x, by_displacement, None, None, None, None


def _by_kernels(x: Tensor) -> bool:
    """Whether to displace by kernels of our own, which need not know the largest displacement first."""
    return x.is_cuda and x.dtype != torch.float64 and on_gpu.available()


def _below(displacement: Tensor, reach: float) -> Tensor:
    """The displacements, those at `reach` as the number just below it."""
    edge = torch.tensor(reach, dtype=displacement.dtype)
    return displacement.clamp(max=edge.nextafter(-edge).item())


def _slopes(x: Tensor, displacement: Tensor, grad: Tensor, stride: int) -> Tensor:
    """The derivative of the bilinear displacement after the displacements, (C, 2)."""
    y, z = displacement.unbind(1)
    reach = math.floor(_farthest(displacement)) + 1
    kernels = _kernel(_slope(y, reach), _hat(z, reach)), _kernel(_hat(y, reach), _slope(z, reach))
    return torch.stack(
        [(_convolve(x, kernel, stride) * grad).sum((0, 2, 3), dtype=displacement.dtype) for kernel in kernels], -1
    )


def _convolve(x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # to move numbers is no reason to round them
        return F.conv2d(x, kernel.to(x.dtype), None, stride, kernel.shape[-1] // 2, 1, len(kernel))


def _spread(grad: Tensor, stride: int, shape: torch.Size) -> Tensor:
    """The gradient at the positions that the stride took, zero at the others, in the same memory layout."""
    if stride == 1:
        return grad
    last = grad.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    spread = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout).zero_()
    spread[:, :, ::stride, ::stride] = grad
    return spread


def displace(
    x: Tensor,
    displacement: Tensor,
    stride: int = 1,
    quantize: bool = False,
    normalize: bool = False,
    reach: float = math.inf,
) -> Tensor:
    """y[n, c, h, w] = x[n, c, stride * h + dy[c], stride * w + dx[c]], bilinear between pixels and zero outside.

    `displacement` is (C, 2) as (dy, dx) in pixels. With `quantize` it is rounded, and the gradient passes straight
    through; with `normalize` the gradient of each channel's displacement has length 1 (Jeon & Kim, section 3.3). None
    is beyond `reach`, and the gradient of one that is there is that of the side that it can go to.
    """
    return _applied(x, displacement, stride, quantize, normalize, reach)


def _applied(*arguments: Any) -> Tensor:
    return _Displace.apply(*arguments)  # type: ignore[no-any-return,no-untyped-call]


@cache
def stay_apart() -> None:
    """Have `torch.compile` call what displaces as it is, between compiled parts: it cannot follow that."""
    global _applied
    _applied = torch.compiler.disable(_applied)  # type: ignore[no-untyped-call]  # untyped in torch
