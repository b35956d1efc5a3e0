"""Matrix products in int8 or float8 whose inputs find their own scale, each time: nothing is calibrated.

The roundings are those that torchao's `quantize_` gives a GPU, number by number, in core operators with float in and
out. Dettmers et al., "LLM.int8()", NeurIPS 2022: a scale for each row. Micikevicius et al., "FP8 Formats for Deep
Learning", arXiv:2209.05433: the numbers of float8 (e4m3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.nn.geometry import pair

DTYPES = ("int8", "float8")
_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max  # 448
_LEAST_SCALE = {"int8": torch.finfo(torch.float32).eps, "float8": torch.finfo(torch.float32).tiny}


class FakeQuantizeDynamic(nn.Module):
    """Puts a tensor on the grid that its own largest number spans; float32 in and out, any shape.

    "int8": integers -128 .. 127, and a scale for each row (the last axis). "float8": numbers of float8 and one scale
    for the whole tensor, so that what becomes of an image depends on the batch it is in. The gradient passes straight
    through: nothing lies outside.
    """

    def __init__(self, dtype: str = "int8") -> None:
        super().__init__()
        check_dtype(dtype)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()  # also under autocast: bfloat16 cannot hold the grid's values
        if isinstance(x, Tensor) and x.requires_grad:  # a tracer's stand-in is no tensor
            return _straight(x, self.nearest)
        return self.nearest(x)

    def nearest(self, x: Tensor) -> Tensor:
        """The nearest number of the grid to each of `x`."""
        if self.dtype == "float8":
            scale = _float8_scale(x.abs().max())
            return nearest_float8((x / scale).clamp(-_LARGEST, _LARGEST)) * scale
        scale = (x.abs().amax(-1, keepdim=True) / 127.5).clamp(min=_LEAST_SCALE["int8"])
        return (x * (1 / scale)).round().clamp(-128, 127) * scale

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"dtype": self.dtype}

    def extra_repr(self) -> str:
        return self.dtype


class Float8Weight(nn.Module):
    """A parametrization: a float weight becomes scale x float8, with one scale for the tensor.

    In training the scale follows the largest weight, which becomes 448; in evaluation it is fixed. What a checkpoint
    holds are the float8 numbers, one byte each: they stand where other grids have `integers`.
    """

    scale: Tensor
    channels = 1  # scales
    integer_dtype = _FLOAT8

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, weight: Tensor) -> Tensor:
        if weight.is_meta:
            return weight
        if self.training:
            self.follow(weight)
        return _straight(weight, self._nearest) if weight.requires_grad else self._nearest(weight)

    def _nearest(self, weight: Tensor) -> Tensor:
        return nearest_float8((weight / self.scale).clamp(-_LARGEST, _LARGEST)) * self.scale

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    @torch.no_grad()
    def follow(self, weight: Tensor) -> None:
        """Fit the scale to `weight`."""
        self.scale.copy_(_float8_scale(weight.detach().abs().amax()))

    @torch.no_grad()
    def integers(self, weight: Tensor) -> Tensor:
        """What `weight` (the latent or the rounded one) is in units of the scale: float8, same shape."""
        return (weight.detach() / self.scale).clamp(-_LARGEST, _LARGEST).to(_FLOAT8)

    def values(self, integers: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight that these float8 numbers stand for, same shape."""
        return integers.to(dtype) * self.scale.to(dtype)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments: none."""
        return {}


class DynamicLinear(nn.Module):
    """`nn.Linear` (its child `linear`) on an input that is rounded to `dtype` first; (..., in) -> (..., out)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dtype: str = "int8") -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.round = FakeQuantizeDynamic(dtype)
        self.linear = nn.Linear(in_features, out_features, bias)

    @property
    def dtype(self) -> str:
        """What is multiplied: "int8" or "float8"."""
        return self.round.dtype

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.round(x))
        return out

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        return {**sizes, "bias": self.linear.bias is not None, "dtype": self.dtype}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.dtype}"


class DynamicPointwise(nn.Module):
    """A 1x1 convolution as the matrix product that it is, on an input that is rounded to `dtype` first.

    (N, in, H, W) -> (N, out, H / stride, W / stride), rounded up. Each pixel is a row of the product; those that the
    stride skips are left out before it. The output lies in memory as it would behind a convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | tuple[int, int] = 1,
        bias: bool = True,
        dtype: str = "int8",
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.stride = in_channels, out_channels, pair(stride)
        if min(self.stride) < 1:
            raise ValueError(f"`stride` (={stride}) must be at least 1.")
        self.round = FakeQuantizeDynamic(dtype)
        self.linear = nn.Linear(in_channels, out_channels, bias)

    @property
    def dtype(self) -> str:
        """What is multiplied: "int8" or "float8"."""
        return self.round.dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.stride != (1, 1):
            x = x[:, :, :: self.stride[0], :: self.stride[1]]
        pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
        out: Tensor = self.linear(self.round(pixels))
        out = out.view(x.shape[0], x.shape[2], x.shape[3], self.out_channels)
        return out.permute(0, 3, 1, 2).contiguous()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        sizes = {"in_channels": self.in_channels, "out_channels": self.out_channels, "stride": self.stride}
        return {**sizes, "bias": self.linear.bias is not None, "dtype": self.dtype}

    def extra_repr(self) -> str:
        stride = self.stride[0] if len(set(self.stride)) == 1 else self.stride
        return (
            f"{self.in_channels}, {self.out_channels}"
            + (f", stride={stride}" if stride != 1 else "")
            + f", {self.dtype}"
        )


def nearest_float8(x: Tensor) -> Tensor:
    """The nearest float8 (e4m3) to each number of at most 448; half-way the one whose last bit is zero.

    What a cast to float8 and back gives, in arithmetic that ONNX has too.
    """
    # Three bits behind the leading one, which stands at 2^-6 at least. That the logarithm is inexact next to a power
    # of two does no harm: the power is the nearest number on both sides' grids.
    step = torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=2**-6))) - 3)
    return (x / step).round() * step


def check_dtype(dtype: str) -> None:
    """Raises ValueError for a type that no product here has."""
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` (={dtype!r}) must be one of {', '.join(DTYPES)}.")


def _float8_scale(largest: Tensor) -> Tensor:
    return (largest / _LARGEST).clamp(min=_LEAST_SCALE["float8"])


def _straight(x: Tensor, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    result: Tensor = _Straight.apply(x, nearest)  # type: ignore[no-untyped-call]  # in torch
    return result


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, nearest: Callable[[Tensor], Tensor]) -> Tensor:
        return nearest(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
