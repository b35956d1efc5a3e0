"""Quantize: weights on an integer grid per output channel, activations on one per tensor.

What it does. Batch norm is folded into the convolutions. The weights of `Conv2d`, `Linear` and the convolutions inside
layers of ours are rounded to `weight_bits`, with one scale for each output channel. Tensors between them are rounded to
`activation_bits`: each once, behind its ReLU, for everybody who reads it, the residual path too; the ranges come from
calibration images through torchao's observers. What the model returns stays float. Fine-tuning afterwards is
quantization-aware training.

When to use it, and when not. Int8 is close to free: it costs a few tenths of a point at most and needs no training, so
it belongs at the end of nearly every recipe. At 4 bits put `AdaRound` behind it or fine-tune; below 4 fine-tune with
`learn`. A model that cannot be traced gets its weights quantized only: a smaller file, not a faster model. Groups are
nearer to the float weights, and make a larger file; runtimes compute them in float, and between quantized tensors more
slowly than the float model. OpenVINO computes 8 affine bits in float too, which onnxruntime takes.

Knobs. `weight_bits`, `activation_bits`: 2 to 8; `activation_bits: null` leaves activations in float. `granularity`:
one scale for each output `channel`, for every `group` of `group_size` weights within one, or for the whole `tensor`.
`symmetric`: no zero points for weights. `grid`: `power_of_two` takes only 0 and +-1, 2, 4, ... times the scale, which
up to 4 bits are int8 numbers as well. `weight_range`: `max` keeps the largest weight, `mse` clips where that lowers the
squared error. `observer`: `histogram` clips rare large activations where that lowers the squared error, `minmax` keeps
everything in range, `average` takes the mean range over batches, `percentile` leaves 100 - `percentile` of a hundred
values out. `symmetric_activations`: ranges around zero. `first_last_bits`: of the first and the last layer, weights and
input. `layers`, `inputs`: bits by name pattern, of weights and of what a layer reads; the first pattern that matches
counts. `learn`: fine-tuning trains the scales (LSQ); without it weight scales follow the largest weight (`mse` ones
stay), and activation ranges stay. `calibration_images`: how many of the task's are looked at. `include`, `exclude`:
layers by name pattern; what is excluded computes in float.

Measured. See the tables in the README (`benchmarks/cifar10.py`), recipes `int8` and `int8_qat`.

Reference. Jacob et al., CVPR 2018; Nagel et al., "A White Paper on Neural Network Quantization", arXiv:2106.08295;
Esser et al., "Learned Step Size Quantization", ICLR 2020.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from compress.calibration import Ranges
from compress.errors import ConfigError
from compress.nn.quantized import GRIDS, MOST_BITS
from compress.quantization import GRANULARITIES, KINDS, WEIGHT_RANGES, Plan, WeightGrid, quantize
from compress.stage import Edit
from compress.surgery import by_pattern, layers_and_ours
from compress.task import Task, Work


@dataclass(frozen=True)
class Quantize:
    """Settings of the stage; see the module's card."""

    weight_bits: int = 8
    activation_bits: int | None = 8
    granularity: str = "channel"
    group_size: int = 32
    symmetric: bool = True
    grid: str = "uniform"
    weight_range: str = "max"
    observer: str = "histogram"
    percentile: float = 99.99
    symmetric_activations: bool = False
    first_last_bits: int | None = None
    layers: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, int] = field(default_factory=dict)
    learn: bool = False
    calibration_images: int = 1024
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "quantize"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = KINDS
    ours: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._ranges()  # checks its own settings
        choices = {"granularity": GRANULARITIES, "grid": GRIDS, "weight_range": WEIGHT_RANGES}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"`{name}` (={getattr(self, name)!r}) must be one of {', '.join(known)}.")
        weights = {"weight_bits": self.weight_bits} | {f"layers.{name}": bits for name, bits in self.layers.items()}
        others = {f"inputs.{name}": bits for name, bits in self.inputs.items()}
        for name in ("activation_bits", "first_last_bits"):
            if getattr(self, name) is not None:
                others[name] = getattr(self, name)
        for name, bits in others.items():
            if not 2 <= bits <= 8:
                raise ConfigError(f"`{name}` (={bits}) must be between 2 and 8{_remedy(bits, 'leave the stage out')}.")
        for name, bits in weights.items():
            most = MOST_BITS[self.grid]
            if not 2 <= bits <= most:
                more = "leave the stage out" if most == 8 else "take `grid: uniform`: they would not fit int8"
                raise ConfigError(f"`{name}` (={bits}) must be between 2 and {most}{_remedy(bits, more)}.")
        if self.grid == "power_of_two" and not self.symmetric:
            raise ConfigError("`symmetric` (=False) must be true for powers of two, which stand around zero.")
        if self.group_size < 1:
            raise ConfigError(f"`group_size` (={self.group_size}) must be at least 1.")
        if self.activation_bits is None and self.inputs:
            raise ConfigError("`inputs` gives bits to activations, which `activation_bits: null` leaves in float.")

    def check(self, model: nn.Module) -> None:
        """Raise `ConfigError` for patterns that match no layer of the model."""
        names = list(layers_and_ours(model, self.kinds))
        by_pattern("layers", self.layers, names)
        by_pattern("inputs", self.inputs, names)

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        weights = WeightGrid(
            self.granularity, self.group_size, self.symmetric, self.grid, self.weight_range, self.learn
        )
        plan = Plan(
            weights,
            self._ranges() if self.activation_bits is not None else None,
            self._weight_bits,
            self._activation_bits,
            self.activation_bits or 8,
            self.learn,
            self.include,
            self.exclude,
        )
        return quantize(model, task, work, plan)

    def _ranges(self) -> Ranges:
        return Ranges(self.observer, self.percentile, self.symmetric_activations, self.calibration_images)

    def _weight_bits(self, names: list[str]) -> dict[str, int]:
        return self._ends(names, self.weight_bits) | _overridden("layers", self.layers, names)

    def _activation_bits(self, names: list[str]) -> dict[str, int]:
        return self._ends(names, self.activation_bits or 8) | _overridden("inputs", self.inputs, names)

    def _ends(self, names: list[str], bits: int) -> dict[str, int]:
        """The bits of each layer, where the first and the last may have their own."""
        ends = bits if self.first_last_bits is None else self.first_last_bits
        return {name: ends if name in (names[0], names[-1]) else bits for name in names}


def _remedy(bits: int, for_more: str) -> str:
    return f"; for more, {for_more}" if bits > 2 else ": one bit is a sign without zero, which no runtime here computes"


def _overridden(setting: str, patterns: dict[str, int], names: list[str]) -> dict[str, int]:
    return {name: patterns[pattern] for name, pattern in by_pattern(setting, patterns, names).items()}
