"""Low precision as modules: weights on an integer grid, activations on an integer grid, both with float in and out.

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
CVPR 2018. Rounding passes the gradient straight through inside the range.
Esser et al., "Learned Step Size Quantization", ICLR 2020: steps that are trained.
Zhou et al., "Incremental Network Quantization: Towards Lossless CNNs with Low-Precision Weights", ICLR 2017: weights
that are powers of two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compress.nn.straight_through import fake_quantized, requantized, rounded

STEPS = ("follow", "fixed", "learn")
GRIDS = ("uniform", "power_of_two")
MOST_BITS = {"uniform": 8, "power_of_two": 4}  # of powers of two more than seven would not fit int8


class FakeQuantizeWeight(nn.Module):
    """A parametrization: a float weight becomes scale x integer.

    There is one scale for each of `channels` equal runs of the weight, in the order of memory: as many as output
    channels, a multiple of them (groups within a channel), or one for the whole tensor.

    The grid is symmetric and narrow, -(2^(bits-1) - 1) .. 2^(bits-1) - 1: int8 without -128, whose products can
    overflow 16-bit accumulators. With `symmetric=False` it has all 2^bits integers and a zero point for each scale.
    With `grid="power_of_two"` the integers are 0 and +-1, 2, 4, ..., 2^(2^(bits-1) - 2).

    `step` says what training does to the scales: they "follow" the largest weight of their run, are "fixed", or
    "learn" by gradient. In evaluation they are fixed, so that `values(integers(w))` gives the same weight, always.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, bits: int = 8, channels: int = 1, symmetric: bool = True, grid: str = "uniform", step: str = "follow"
    ) -> None:
        super().__init__()
        if grid not in GRIDS:
            raise ValueError(f"`grid` (={grid!r}) must be one of {', '.join(GRIDS)}.")
        if step not in STEPS:
            raise ValueError(f"`step` (={step!r}) must be one of {', '.join(STEPS)}.")
        check_bits(bits, MOST_BITS[grid])
        if grid == "power_of_two" and not symmetric:
            raise ValueError("`symmetric` (=False) must be True for powers of two, which stand around zero.")
        if channels < 1:
            raise ValueError(f"`channels` (={channels}) must be at least 1: the number of scales.")
        self.bits, self.channels, self.symmetric, self.grid, self.step = bits, channels, symmetric, grid, step
        if step == "learn":
            self.scale = nn.Parameter(torch.ones(channels))
        else:
            self.register_buffer("scale", torch.ones(channels))
        if not symmetric:
            self.register_buffer("zero_point", torch.zeros(channels, dtype=torch.int32))

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer; -127 and 127 for 8 symmetric bits."""
        if self.grid == "power_of_two":
            return -int(2 ** (2 ** (self.bits - 1) - 2)), int(2 ** (2 ** (self.bits - 1) - 2))
        high = int(2 ** (self.bits - 1) - 1)
        return (-high if self.symmetric else -high - 1), high

    @property
    def finest_scale(self) -> Tensor:
        """`scale` over the largest power of two that keeps the integers in int8; the unit of exported weights."""
        if not self.symmetric:
            return self.scale.detach()
        return self.scale.detach() / float(2 ** ((127 // self.limits[1]).bit_length() - 1))

    def forward(self, weight: Tensor) -> Tensor:
        if weight.is_meta:  # torch has no kernel that only tells the shape
            return weight
        runs = weight.reshape(self.channels, -1)
        low, high = self.limits
        if self.training and self.step == "learn":
            quantized = self._learning(runs)
        else:
            if self.training and self.step == "follow":
                self.follow(weight)
            if self.grid == "power_of_two":
                quantized = rounded(runs, self._column(), low, high, nearest=nearest_power)
            elif self.training and weight.is_cuda:
                quantized = fake_quantized(runs, self._column(), self._zeros().unsqueeze(1), low, high)
            else:
                scale, zero = self.scale.detach(), self._zeros()
                quantized = torch.fake_quantize_per_channel_affine(runs, scale, zero, 0, low, high)
        return quantized.view_as(weight)

    def _learning(self, runs: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.clamp_(min=torch.finfo(self.scale.dtype).tiny * 2**24)
        low, high = (bound.unsqueeze(1) for bound in self.bounds)
        factor = 1 / math.sqrt(runs.shape[1] * self.limits[1])
        return rounded(runs, self.scale.unsqueeze(1), low, high, factor, self.nearest)

    def _zeros(self) -> Tensor:
        return torch.zeros_like(self.scale, dtype=torch.int32) if self.symmetric else self.zero_point

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest integer of each run, less its zero point: (channels,) each."""
        low, high = self.limits
        return low - self._zeros(), high - self._zeros()

    def spread(self, each: Tensor, weight: Tensor) -> Tensor:
        """What `each` (channels,) says of every run, for every number of `weight`: its shape."""
        return each.unsqueeze(1).expand(self.channels, weight.numel() // self.channels).reshape(weight.shape)

    def _column(self) -> Tensor:
        return self.scale.detach().unsqueeze(1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    @torch.no_grad()
    def follow(self, weight: Tensor) -> None:
        """Fit the scales to `weight`, so that the largest number of a run is the largest integer.

        A run of (nearly) nothing gets a scale of 2^-12 of the largest one: small enough for a bias to be expressed in
        units of it, large enough for that bias to fit 32 bits.
        """
        runs = weight.detach().reshape(self.channels, -1)
        low, high = self.limits
        if self.symmetric:
            self.set_scale(runs.abs().amax(1) / high)
            return
        bottom, top = runs.amin(1).clamp(max=0), runs.amax(1).clamp(min=0)  # zero stays on the grid
        self.set_scale((top - bottom) / (high - low))
        self.zero_point.copy_((low - bottom / self.scale).round().clamp(low, high))

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Take these scales (channels,); nearly nothing becomes 2^-12 of the largest one."""
        top = scale.amax()
        floor = torch.where(top > 0, top, torch.ones_like(top)) * 2.0**-12
        self.scale.copy_(torch.maximum(scale, floor))

    @torch.no_grad()
    def integers(self, weight: Tensor) -> Tensor:
        """What `weight` (the latent or the quantized one) is in units of the scales, same shape; int8 where it fits.

        With a zero point this is the integer minus the zero point.
        """
        # multiplied by the inverse, as torch's kernel does: dividing would round some ties differently
        units = weight.detach().reshape(self.channels, -1) * (1 / self._column())
        low, high = self.bounds
        units = self.nearest(units).clamp(low.unsqueeze(1), high.unsqueeze(1))
        return units.to(self.integer_dtype).view_as(weight)

    def nearest(self, units: Tensor) -> Tensor:
        """The nearest number of the grid's kind, within its limits or not; in units of the scale."""
        return nearest_power(units) if self.grid == "power_of_two" else units.round()

    @property
    def integer_dtype(self) -> torch.dtype:
        """The type of `integers`."""
        return torch.int8 if self.symmetric else torch.int16

    def values(self, integers: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight that these integers stand for, same shape."""
        return (integers.to(dtype).reshape(self.channels, -1) * self._column().to(dtype)).view(integers.shape)

    def fix(self) -> None:
        """Leave the scales as they are from here on."""
        self.step = "fixed"
        _keep_scale(self)

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        """How an optimizer has to treat the scales where they learn: without decay."""
        return {"scale": {"weight_decay": 0.0}}

    def config(self) -> dict[str, int | bool | str]:
        return {
            "bits": self.bits,
            "channels": self.channels,
            "symmetric": self.symmetric,
            "grid": self.grid,
            "step": self.step,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.config().items())


class FakeQuantize(nn.Module):
    """Puts a tensor on the grid scale x (integer - zero_point), integers 0 .. 2^bits - 1; any shape.

    The range comes from calibration (`set_range`, or loading), and training does not move it; with `learn` it trains
    the scale by gradient. Zero is always exactly on the grid, so that padding costs nothing.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int = 8, learn: bool = False) -> None:
        super().__init__()
        check_bits(bits)
        self.bits, self.learn = bits, learn
        if learn:
            self.scale = nn.Parameter(torch.tensor(1.0))
        else:
            self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))

    @property
    def largest(self) -> int:
        """The largest integer of the grid; 255 for 8 bits."""
        return int(2**self.bits - 1)

    @property
    def highest(self) -> float:
        """The largest number on the grid."""
        return (self.largest - int(self.zero_point)) * float(self.scale.detach())

    @torch.no_grad()
    def set_range(self, scale: float, zero_point: int) -> None:
        """Fix the grid. Raises ValueError for a scale or a zero point that is none."""
        if not 0 < scale < float("inf"):
            raise ValueError(f"`scale` (={scale}) must be a positive, finite number.")
        if not 0 <= zero_point <= self.largest:
            raise ValueError(f"`zero_point` (={zero_point}) must be one of the integers 0 .. {self.largest}.")
        self.scale.fill_(scale)
        self.zero_point.fill_(zero_point)

    def forward(self, x: Tensor, unit: Tensor | None = None) -> Tensor:
        """`x` on the grid. In evaluation mode, numbers that are whole multiples of `unit` are rounded as such."""
        x = x.float()  # also under autocast: bfloat16 cannot hold the grid's values
        if not self.training and unit is not None:
            zero = int(self.zero_point) if x.is_cpu else self.zero_point
            return requantized(x, unit, self.scale.detach(), -zero, self.largest - zero)
        if not self.training:
            return torch.fake_quantize_per_tensor_affine(x, self.scale.detach(), self.zero_point, 0, self.largest)
        if self.learn:
            with torch.no_grad():
                self.scale.clamp_(min=torch.finfo(self.scale.dtype).tiny * 2**24)
        # plain numbers halve the time on a CPU; elsewhere to ask for them would wait for the device
        zero = int(self.zero_point) if x.is_cpu else self.zero_point
        factor = 1 / math.sqrt(x[0].numel() * self.largest)
        return rounded(x, self.scale, -zero, self.largest - zero, factor)

    def fix(self) -> None:
        """Leave the range as it is from here on."""
        self.learn = False
        _keep_scale(self)

    def parameter_rules(self) -> dict[str, dict[str, float]]:
        """How an optimizer has to treat the scale where it learns: without decay."""
        return {"scale": {"weight_decay": 0.0}}

    def config(self) -> dict[str, int | bool]:
        return {"bits": self.bits, "learn": self.learn}

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def _keep_scale(module: FakeQuantizeWeight | FakeQuantize) -> None:
    """Make a trained scale a buffer, which no optimizer sees."""
    if isinstance(module.scale, nn.Parameter):
        scale = module.scale.detach().clone()
        del module.scale
        module.register_buffer("scale", scale)


def nearest_power(x: Tensor) -> Tensor:
    """The nearest of 0, +-1, +-2, +-4, ... to each number; what lies half-way goes up."""
    size = x.abs()
    power = torch.exp2(torch.floor(torch.log2(size.clamp(min=1) * (4 / 3))))
    return x.sign() * torch.where(size < 0.5, torch.zeros_like(size), power)


def check_bits(bits: int, most: int = 8) -> None:
    """Raises ValueError for a number of bits that no grid here has."""
    if not 2 <= bits <= most:
        remedy = "for more, leave the tensor in float" if most == 8 else "for more, use the uniform grid"
        raise ValueError(f"`bits` (={bits}) must be between 2 and {most}; {remedy}.")
