"""Displacements as weights of the positions in a kernel window: bilinear, or rounded with a straight-through gradient.

Jeon & Kim, "Constructing Fast Network through Deconstruction of Convolution", NeurIPS 2018, section 3.2 and 3.3; Chen
et al., "All You Need is a Few Shifts", CVPR 2019, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def round_half_away(x: Tensor) -> Tensor:
    """Nearest whole number, halves away from zero: what the published kernels do (`torch.round` takes the even one)."""
    return torch.sign(x) * torch.floor(x.abs() + 0.5)


def pull(displacement: Tensor, l1: float, lattice_decay: float) -> Tensor:
    """Penalty of displacements: `l1` times their L1 norm, and `lattice_decay` / 2 times their squared distance from the
    nearest whole step, whose gradient is the published `lattice_decay * (d - round(d))` (Jeon & Kim's code)."""
    penalty = displacement.new_zeros(())
    if l1:
        penalty = penalty + l1 * displacement.abs().sum()
    if lattice_decay:
        off = displacement - round_half_away(displacement.detach())
        penalty = penalty + lattice_decay / 2 * off.square().sum()
    return penalty


def window(size: int) -> tuple[int, int]:
    """The smallest and the largest displacement inside a kernel of this size: (-1, 1) for 3, (0, 1) for 2."""
    return -((size - 1) // 2), size // 2


def _hat(d: Tensor, size: int) -> Tensor:
    """Bilinear weight of every window position for displacements `d`: (...) -> (..., size)."""
    low, high = window(size)
    positions = torch.arange(low, high + 1, device=d.device, dtype=d.dtype)
    return (1 - (d.unsqueeze(-1) - positions).abs()).clamp(min=0)


def _slope(d: Tensor, size: int) -> Tensor:
    """Derivative of `_hat` after `d`; on the lattice the mean of both sides, at the window's edge the inner side."""
    low, high = window(size)
    positions = torch.arange(low, high + 1, device=d.device, dtype=d.dtype)

    def of_cell(left: Tensor) -> Tensor:
        left = left.unsqueeze(-1)
        return (positions == left + 1).to(d.dtype) - (positions == left).to(d.dtype)

    last = max(high - 1, low)
    right = of_cell(torch.floor(d).clamp(low, last))
    left = of_cell((torch.ceil(d) - 1).clamp(low, last))
    return (left + right) / 2 if size > 1 else torch.zeros_like(right)


class _Taps(torch.autograd.Function):
    """Displacements (C, T, 2) as (y, x) -> the weight of every window position (C, T, ky, kx)."""

    @staticmethod
    def forward(
        ctx: Any, displacement: Tensor, kernel_size: tuple[int, int], quantize: bool, normalize: bool
    ) -> Tensor:
        ctx.save_for_backward(displacement)
        ctx.settings = kernel_size, normalize
        used = round_half_away(displacement) if quantize else displacement
        rows, columns = _hat(used[..., 0], kernel_size[0]), _hat(used[..., 1], kernel_size[1])
        return rows.unsqueeze(-1) * columns.unsqueeze(-2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (displacement,) = ctx.saved_tensors
        (ky, kx), normalize = ctx.settings
        grad = grad.to(displacement.dtype)
        y, x = displacement[..., 0], displacement[..., 1]
        # Straight through the rounding: the bilinear derivative where the displacement really is.
        by_y = (grad * (_slope(y, ky).unsqueeze(-1) * _hat(x, kx).unsqueeze(-2))).sum((-2, -1))
        by_x = (grad * (_hat(y, ky).unsqueeze(-1) * _slope(x, kx).unsqueeze(-2))).sum((-2, -1))
        out = torch.stack((by_y, by_x), -1)
        if normalize:
            out = out / out.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(out.dtype).tiny)
        return out, None, None, None


def taps(displacement: Tensor, kernel_size: tuple[int, int], quantize: bool = False, normalize: bool = False) -> Tensor:
    """The weight that every position of the window gets from displacements (C, T, 2) in (y, x): (C, T, ky, kx).

    Displacements count in steps of the kernel's grid (times its dilation in pixels) from its centre, and lie inside
    it. Bilinear between grid points. With `quantize` they are rounded, and the gradient passes straight through; with
    `normalize` the gradient of each displacement has length 1 (Jeon & Kim, section 3.3).
    """
    return _Taps.apply(displacement, kernel_size, quantize, normalize)  # type: ignore[no-any-return,no-untyped-call]
