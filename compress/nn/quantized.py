"""Low precision as modules: weights on an integer grid, activations on an integer grid, both with float in and out.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018. Rounding passes the gradient straight through inside the range.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FakeQuantizeWeight(nn.Module):
    """A parametrization: a float weight becomes scale x integer, with one scale for each output channel (axis 0).

    The grid is symmetric and narrow, -(2^(bits-1) - 1) .. 2^(bits-1) - 1: int8 without -128, whose products can
    overflow 16-bit accumulators. In training mode the scale follows the largest weight of its channel; in evaluation
    mode it is fixed, so that `integers(w) * scale` gives back the same integers, always.
    """

    scale: Tensor

    def __init__(self, bits: int = 8, channels: int = 1) -> None:
        super().__init__()
        _check_bits(bits)
        if channels < 1:
            raise ValueError(f"`channels` (={channels}) must be at least 1: the size of the weight's first axis.")
        self.bits = bits
        self.channels = channels
        self.register_buffer("scale", torch.ones(channels))

    @property
    def limit(self) -> int:
        """The largest integer of the grid; 127 for 8 bits."""
        return int(2 ** (self.bits - 1) - 1)

    @property
    def finest_scale(self) -> Tensor:
        """`scale` over the largest power of two that keeps the integers in int8; the unit of exported weights."""
        return self.scale / float(2 ** ((127 // self.limit).bit_length() - 1))

    def forward(self, weight: Tensor) -> Tensor:
        if weight.is_meta:  # torch has no kernel that only tells the shape
            return weight
        if self.training:
            self.follow(weight)
        zeros = torch.zeros_like(self.scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, self.scale, zeros, 0, -self.limit, self.limit)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    @torch.no_grad()
    def follow(self, weight: Tensor) -> None:
        """Fit the scales to `weight`: the largest magnitude of a channel becomes the largest integer.

        A channel of (nearly) nothing gets a scale of 2^-12 of the largest one: small enough for a bias to be
        expressed in units of it, large enough for that bias to fit 32 bits.
        """
        largest = weight.detach().abs().flatten(1).amax(1) / self.limit
        top = largest.amax()
        floor = torch.where(top > 0, top, torch.ones_like(top)) * 2.0**-12
        self.scale.copy_(torch.maximum(largest, floor))

    @torch.no_grad()
    def integers(self, weight: Tensor) -> Tensor:
        """The int8 integers of `weight` (the latent or the quantized one), same shape."""
        inverse = (1 / self.scale).view(-1, *[1] * (weight.dim() - 1))
        # multiplied by the inverse, as torch's kernel does: dividing would round some ties differently
        return (weight.detach() * inverse).round().clamp(-self.limit, self.limit).to(torch.int8)

    def config(self) -> dict[str, int]:
        return {"bits": self.bits, "channels": self.channels}

    def extra_repr(self) -> str:
        return f"bits={self.bits}, channels={self.channels}"


class FakeQuantize(nn.Module):
    """Puts a tensor on the grid scale x (integer - zero_point), integers 0 .. 2^bits - 1; any shape.

    The range is fixed: it comes from calibration (`set_range`, or loading) and training does not move it. Zero is
    always exactly on the grid, so that padding costs nothing.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        _check_bits(bits)
        self.bits = bits
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))

    @property
    def largest(self) -> int:
        """The largest integer of the grid; 255 for 8 bits."""
        return int(2**self.bits - 1)

    def set_range(self, scale: float, zero_point: int) -> None:
        """Fix the grid. Raises ValueError for a scale or a zero point that is none."""
        if not 0 < scale < float("inf"):
            raise ValueError(f"`scale` (={scale}) must be a positive, finite number.")
        if not 0 <= zero_point <= self.largest:
            raise ValueError(f"`zero_point` (={zero_point}) must be one of the integers 0 .. {self.largest}.")
        self.scale.fill_(scale)
        self.zero_point.fill_(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        # in float32 also under autocast: bfloat16 cannot hold the grid's values
        return torch.fake_quantize_per_tensor_affine(x.float(), self.scale, self.zero_point, 0, self.largest)

    def config(self) -> dict[str, int]:
        return {"bits": self.bits}

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"`bits` (={bits}) must be between 2 and 8; for more, leave the tensor in float.")
