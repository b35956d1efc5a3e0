"""AdaRound: after quantization, each weight is rounded the way that serves the layer's output, not to the nearest.

What it does. Layer by layer in the order of the forward pass, integers are chosen so that the layer, fed with what the
quantized network gives it, comes as near as it can to the output of the same network with its grids switched off, on
calibration images. Scales of output channels are chosen by that error too, and biases are solved for. The errors of
earlier layers, and of rounded activations, are thereby made good by later ones.

When to use it, and when not. Behind `Quantize` at 2 to 5 bits, without training or before it: fine-tuning starts from
what it finds. At 8 bits with a scale for each channel there is nothing to win. It needs some hundred images.

Knobs. `images`: how many calibration images. `ridge`: the pull towards the float weights, which keeps weights in place
of which the images say little. `scales`: false leaves the scales as `Quantize` found them; with one scale for a tensor
or a group they stay anyway. `sweeps`: how often every weight is looked at again, at most. `include`, `exclude`: layers
by name pattern. Scales do not follow the weights in later training: they are fixed, or learn where `Quantize` says so.

Measured. At 4, 3 and 2 bits beside other roundings: `benchmarks/low_bits.py`, its table in benchmarks/README.md.

Reference. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, for the problem; the
solver is that of Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022, and single moves after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from compress.errors import ConfigError
from compress.lower.tensors import round_biases
from compress.nn.quantized import FakeQuantizeWeight
from compress.nn.shift import ShiftConv2d
from compress.quantization import own_grid, without_grids
from compress.reconstruct import Pairs, execution_order, plain_images
from compress.rounding import LayerRounding, weight_holder
from compress.stage import Edit, Site
from compress.surgery import describe, layers_and_ours, matching, require_change, tied
from compress.task import Task, Work


@dataclass(frozen=True)
class AdaRound:
    """Settings of the stage; see the module's card."""

    images: int = 1024
    ridge: float = 1e-2
    scales: bool = True
    sweeps: int = 10
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "correct"
    needs: ClassVar[tuple[str, ...]] = ("Quantize", "MixedPrecision", "QuantizeDynamic")
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear, ShiftConv2d)
    ours: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, low in {"images": 1, "sweeps": 0}.items():
            if getattr(self, name) < low:
                raise ConfigError(f"`{name}` (={getattr(self, name)}) must be at least {low}.")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ConfigError(f"`ridge` (={self.ridge}) must be a finite number, 0 or more.")

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        found = layers_and_ours(model, self.kinds)
        kept = matching(list(found), self.include, self.exclude)
        if not any(isinstance(module, FakeQuantizeWeight) for module in model.modules()):
            raise ConfigError("the model's weights are not quantized; put `AdaRound` behind `Quantize`.")
        was_training = model.training
        model.eval()
        reference = without_grids(model)
        calls = execution_order(model, found, task.example.to(task.device))
        shared = tied(model)
        for name, layer in found.items():
            kept[name] = kept[name] or _why_kept(layer, calls.get(name, 0), shared)
        images = plain_images(task.calibration, self.images, task.device)
        pairs = Pairs(model, reference, images)
        taken = [name for name in calls if not kept[name]]
        errors: dict[str, tuple[float, float]] = {}
        work.progress.start("round", len(taken))
        for name in taken:
            work.progress.step(name)
            problem = LayerRounding(found[name], calls[name] * sum(map(len, images)))
            for x, y in pairs.of(found[name], reference.get_submodule(name), calls[name]):
                problem.add(x, y)
            errors[name] = self._round(problem)
        work.progress.end()
        round_biases(model)
        sites = tuple(
            Site(name, describe(layer), None, kept[name])
            if kept[name]
            else Site(name, describe(layer), "output off by {1:.2%}, rounded to nearest {0:.2%}".format(*errors[name]))
            for name, layer in found.items()
        )
        require_change(sites)
        notes: dict[str, Any] = {
            "images": sum(map(len, images)),
            "relative_error": {name: float(f"{after:.3g}") for name, (_, after) in errors.items()},
            "relative_error_of_nearest": {name: float(f"{before:.3g}") for name, (before, _) in errors.items()},
        }
        return Edit(model.train(was_training), sites, notes)

    def _round(self, problem: LayerRounding) -> tuple[float, float]:
        """Set the layer's weights and bias; gives back the output's relative error, to nearest and as chosen."""
        grid = own_grid(problem.holder)
        assert grid is not None
        chosen = problem.chosen(grid, self.ridge, self.scales, self.sweeps)
        problem.holder.parametrizations.weight.original.data.copy_(chosen.weight)  # type: ignore[operator,union-attr]  # there, as it has a grid
        if grid.step == "follow":
            grid.step = "fixed"
        if chosen.bias is not None:
            problem.holder.bias.data.copy_(chosen.bias)  # type: ignore[union-attr]  # it is what was solved for
        return chosen.error_of_nearest, chosen.error


def _why_kept(layer: nn.Module, calls: int, shared: set[int]) -> str:
    inner = weight_holder(layer)
    if inner is None:
        return "it has no weights that could be rounded another way"
    if not any(isinstance(module, FakeQuantizeWeight) for module in layer.modules()):
        return "it has no quantized weights"
    if own_grid(inner) is None:
        return "its weights are clustered, so that none can be rounded by itself"
    if id(inner.parametrizations.weight.original) in shared:  # type: ignore[union-attr]  # there, as it has a grid
        return "it shares its weights with another layer"
    return "" if calls else "never reached by the forward pass"
