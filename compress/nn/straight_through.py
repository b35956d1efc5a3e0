"""Rounding to a grid, with the gradient of learned step sizes, in few passes over memory.

Esser et al., "Learned Step Size Quantization", ICLR 2020. Written as one function with its own gradient: chained from
torch's operators, the roundings took longer than the convolutions of a small network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Bound = Tensor | float


def rounded(
    x: Tensor,
    scale: Tensor,
    low: Bound,
    high: Bound,
    factor: float = 1.0,
    nearest: Callable[[Tensor], Tensor] = torch.round_,
) -> Tensor:
    """The nearest number of the grid to each of `x`: scale x nearest(x / scale), integers within `low` .. `high`.

    The gradient passes through to `x` inside the range and is zero outside. A `scale` that wants a gradient gets the
    paper's, times `factor`. `scale` and bounds broadcast over `x`; `nearest` may change its argument in place.
    """
    result: Tensor = _Rounded.apply(x, scale, low, high, factor, nearest)  # type: ignore[no-untyped-call]  # in torch
    return result


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: Bound, high: Bound, factor: float, nearest: Callable[[Tensor], Tensor]
    ) -> Tensor:
        # multiplied by the inverse, as torch's kernels do: dividing would round some ties differently
        result = torch.clamp_(nearest(x * (1 / scale)), low, high).mul_(scale)  # type: ignore[arg-type]  # both of a kind
        ctx.low, ctx.high, ctx.factor = low, high, factor
        ctx.save_for_backward(x, scale, result if ctx.needs_input_grad[1] else None)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, result = ctx.saved_tensors
        inside = _inside(gradient, x, ctx.low * scale, ctx.high * scale)
        if result is None:
            return inside, None, None, None, None, None
        # inside the range the step's gradient is (result - x) / scale, outside it is the bound: result / scale
        share = _total(gradient, result, scale) - _total(inside, x, scale)
        return inside, share / scale * ctx.factor, None, None, None, None


def fake_quantized(x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """As `torch.fake_quantize_per_channel_affine`, which looks at the zero points on the CPU; all broadcast over x."""
    integers = (zero + x.detach() * (1 / scale)).round_()
    inside = (integers >= low) & (integers <= high)
    values = (integers.clamp_(low, high) - zero) * scale
    return values + torch.where(inside, x - x.detach(), 0.0)  # nothing, but for the gradient


def requantized(x: Tensor, unit: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
    """`x`, whole multiples of `unit` but for the error of float sums, on the grid, rounded as integer kernels do.

    These have the whole number exactly, multiply it by the float32 number unit / scale and round that, ties to even.
    `unit` broadcasts over `x`. The gradient passes through inside the range and is zero outside.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return requantized_units(x, unit, scale, low, high)
    result: Tensor = _Requantized.apply(x, unit, scale, low, high)  # type: ignore[no-untyped-call]  # in torch
    return result


def requantized_units(x: Tensor, unit: Tensor, scale: Tensor | float, low: Bound, high: Bound) -> Tensor:
    """`requantized` in core operators, without a gradient."""
    return (x / unit).round_().mul_(unit / scale).round_().clamp_(low, high).mul_(scale)  # type: ignore[arg-type]  # both of a kind


class _Requantized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, unit: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low * scale, high * scale
        return requantized_units(x, unit, scale, low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _inside(gradient, x, *ctx.bounds), None, None, None, None


def _inside(gradient: Tensor, x: Tensor, bottom: Tensor, top: Tensor) -> Tensor:
    """`gradient` where `x` is in the range, else zero."""
    if x.is_cpu and bottom.dim() == 0:  # one pass instead of four; elsewhere `float` would wait for the device
        return torch.ops.aten.hardtanh_backward(gradient, x, float(bottom), float(top))  # type: ignore[no-any-return]  # untyped in torch
    return torch.where((x >= bottom) & (x <= top), gradient, 0.0)


def _total(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """The sum of the products of `a` and `b`, over all axes along which `like` has one number."""
    return (a * b).sum_to_size(like.shape)
