"""AdaRound: after quantization, each weight is rounded the way that serves the layer's output, not to the nearest.

What it does. Layer by layer in the order of the forward pass, integers are chosen so that the layer, fed with what the
quantized network gives it, comes as near as it can to the output of the same network with its grids switched off, on
calibration images. Scales of output channels are chosen by that error too, and biases are solved for. The errors of
earlier layers, and of rounded activations, are thereby made good by later ones.

When to use it, and when not. Behind `Quantize` at 2 to 5 bits, without training or before it: fine-tuning starts from
what it finds. At 8 bits there is nothing to win. It needs some hundred images, and seconds to minutes.

Knobs. `images`: how many calibration images. `ridge`: the pull towards the float weights, which keeps weights in place
of which the images say little. `scales`: false leaves the scales as `Quantize` found them; with one scale for a tensor
or a group they stay anyway. `sweeps`: how often every weight is looked at again, at most. `include`, `exclude`: layers
by name pattern. Scales do not follow the weights in later training: they are fixed, or learn where `Quantize` says so.

Measured. Not yet measured.

Reference. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020, for the problem; the
solver is that of Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022, and single moves after it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.errors import ConfigError
from compress.lower.tensors import round_biases
from compress.nn.geometry import spatial_config
from compress.nn.quantized import FakeQuantizeWeight
from compress.nn.shift import ShiftConv2d
from compress.nn.taps import taps
from compress.quantization import own_grid, without_grids
from compress.reconstruct import Equations, execution_order, plain_images, seen_by
from compress.rounding import Integers, Output, fitted_scale, rounded
from compress.stage import Edit, Site
from compress.surgery import describe, is_ours, kind, leaves, matching, require_change
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
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear, ShiftConv2d)

    def __post_init__(self) -> None:
        for name, low in {"images": 1, "sweeps": 0}.items():
            if getattr(self, name) < low:
                raise ConfigError(f"`{name}` (={getattr(self, name)}) must be at least {low}.")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ConfigError(f"`ridge` (={self.ridge}) must be a finite number, 0 or more.")

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        if not any(isinstance(module, FakeQuantizeWeight) for module in model.modules()):
            raise ConfigError("the model's weights are not quantized; put `AdaRound` behind `Quantize`.")
        was_training = model.training
        model.eval()
        reference = without_grids(model)
        found = {name: layer for name, layer in leaves(model) if kind(layer) in self.kinds or is_ours(layer)}
        kept = matching(list(found), self.include, self.exclude)
        calls = execution_order(model, found, task.example.to(task.device))
        tied = _tied(model)
        for name, layer in found.items():
            kept[name] = kept[name] or _why_kept(layer, calls.get(name, 0), tied)
        images = plain_images(task.calibration, self.images, task.device)
        taken = [name for name in calls if not kept[name]]
        errors: dict[str, tuple[float, float]] = {}
        work.progress.start("round", len(taken))
        for name in taken:
            work.progress.step(name)
            problem = _Layer(found[name], calls[name] * sum(map(len, images)))
            for batch in images:
                now = seen_by(model, found[name], calls[name], batch)
                then = seen_by(reference, reference.get_submodule(name), calls[name], batch)
                for (x, _), (_, y) in zip(now, then, strict=True):
                    problem.add(x, y)
            errors[name] = problem.round(self.ridge, self.scales, self.sweeps)
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


def _tied(model: nn.Module) -> set[int]:
    """Weights (by id) that several layers share."""
    originals = Counter(
        id(module.original) for module in model.modules() if isinstance(module, parametrize.ParametrizationList)
    )
    return {weight for weight, holders in originals.items() if holders > 1}


def _why_kept(layer: nn.Module, calls: int, tied: set[int]) -> str:
    inner = _weighted(layer)
    if inner is None:
        return "it has no weights that could be rounded another way"
    if not any(isinstance(module, FakeQuantizeWeight) for module in layer.modules()):
        return "it has no quantized weights"
    if own_grid(inner) is None:
        return "its weights are clustered, so that none can be rounded by itself"
    if id(inner.parametrizations.weight.original) in tied:  # type: ignore[union-attr]  # there, as it has a grid
        return "it shares its weights with another layer"
    return "" if calls else "never reached by the forward pass"


def _weighted(layer: nn.Module) -> nn.Conv2d | nn.Linear | None:
    """The module whose weights make this layer's output."""
    inner = layer.pointwise if isinstance(layer, ShiftConv2d) else layer
    return inner if isinstance(inner, nn.Conv2d | nn.Linear) else None


class _Layer:
    """A quantized layer as the problem of rounding it: what it sees, and what it should give for that."""

    def __init__(self, layer: nn.Module, images: int) -> None:
        inner = _weighted(layer)
        assert inner is not None
        grid = own_grid(inner)
        assert grid is not None
        self.layer, self.inner, self.grid = layer, inner, grid
        self.bias = inner.bias
        self.groups = 1 if isinstance(layer, nn.Linear) else int(layer.groups)  # type: ignore[arg-type]
        self.equations = Equations(_convolution(layer), images, self.bias is not None)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in a batch: the layer's input, and the output wanted for it."""
        if isinstance(self.layer, nn.Linear):  # a pointwise convolution over whatever lies between
            x, y = (z.reshape(len(z), -1, z.shape[-1]).mT.unsqueeze(-1) for z in (x, y))
        self.equations.add(x, y)

    def round(self, ridge: float, scales: bool, sweeps: int) -> tuple[float, float]:
        """Set weights and bias; gives back the relative squared error of the output, rounded to nearest and now."""
        normal = self.equations.normal()
        rows = self._features().unsqueeze(2)
        gram = normal.gram.take_along_dim(rows, 1)
        constant, count, wanted = gram[:, :, -1:], normal.gram[:, -1:, -1:], normal.cross[:, -1:]
        gram = gram.take_along_dim(rows.mT, 2)
        cross, power = normal.cross.take_along_dim(rows, 1), float(normal.power.sum())
        if self.bias is not None:
            gram = gram - constant @ constant.mT / count
            cross = cross - constant @ wanted / count
            power -= float((wanted.square() / count).sum())
        latent = self.inner.parametrizations.weight.original  # type: ignore[union-attr]  # there, as it has a grid
        assert isinstance(latent, Tensor)
        output = Output(gram, cross, self._by_feature(latent), power)
        integers = self._integers(latent)
        before = output.error(integers.of(output.start) * integers.scale)
        if scales and self.grid.channels == len(latent):
            self.grid.set_scale(fitted_scale(output, integers, ridge).flatten().to(self.grid.scale))
            integers = self._integers(latent)
        chosen = rounded(output, integers, ridge, sweeps)
        weights = chosen * integers.scale
        by_output = chosen.mT.reshape(latent.shape).to(self.grid.integer_dtype)
        latent.data.copy_(self.grid.values(by_output.to(latent.device), latent.dtype))
        if self.grid.step == "follow":
            self.grid.step = "fixed"
        if self.bias is not None:
            self.bias.data.copy_(((wanted - constant.mT @ weights) / count).flatten())
        return before, output.error(weights)

    def _integers(self, latent: Tensor) -> Integers:
        each = (self.grid.scale.detach(), *self.grid.bounds)
        scale, low, high = (self._by_feature(self.grid.spread(one, latent)) for one in each)
        return Integers(scale, low, high, self.grid.nearest)

    def _by_feature(self, weight: Tensor) -> Tensor:
        """(O, F, ...) -> (groups, F, O / groups), in float64 on the CPU, where the equations are."""
        return weight.detach().cpu().double().reshape(self.groups, len(weight) // self.groups, -1).mT

    def _features(self) -> Tensor:
        """Which of the window positions of each group's channels the weights belong to: (groups, F)."""
        layer = self.layer
        if not isinstance(layer, ShiftConv2d):
            return torch.arange(self.inner.weight[0].numel()).expand(self.groups, -1)
        places = taps(layer.displacement.detach(), layer.kernel_size, True).flatten(2).argmax(-1).cpu()
        places = places.view(self.groups, -1, layer.taps)
        channels = torch.arange(places.shape[1]).unsqueeze(1)
        return (channels * math.prod(layer.kernel_size) + places).flatten(1)


def _convolution(layer: nn.Module) -> nn.Conv2d:
    """A convolution of this layer's geometry."""
    if isinstance(layer, nn.Conv2d):
        return layer
    with torch.device("meta"):
        if isinstance(layer, nn.Linear):
            return nn.Conv2d(layer.in_features, layer.out_features, 1)
        assert isinstance(layer, ShiftConv2d)
        return nn.Conv2d(layer.in_channels, layer.out_channels, **spatial_config(layer), groups=layer.groups)
