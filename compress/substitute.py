"""What every stage shares that replaces convolutions by a cheaper operator: the walk, and what each layer is fitted to.

A stage supplies the start: given a convolution, what it sees in the network as substituted so far and what the original
gave there, return the new layer and how far its output is off, or raise `Keep`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.gate import Gate, check_gate
from compress.nn.clustered import ClusteredWeight
from compress.nn.masked import mask_of
from compress.quantization import is_quantized
from compress.reconstruct import ROWS, Normal, Pairs, execution_order, normal_equations, plain_images, seen_by
from compress.stage import Edit
from compress.surgery import layers, left_out, swap
from compress.task import Task, Work


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """The settings that these stages have in common; their cards explain them."""

    images: int = 1024
    ridge: float = 1e-4
    gate: str = "none"
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "substitute"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d,)


def check_settings(settings: Substitution, **least: int) -> None:
    """Raise `ConfigError` for settings in common that make no sense, and for others (by name) below their least."""
    check_gate(settings.gate)
    for name, low in {**least, "images": 1}.items():
        if getattr(settings, name) < low:
            raise ConfigError(f"`{name}` (={getattr(settings, name)}) must be at least {low}.")
    if not (math.isfinite(settings.ridge) and settings.ridge >= 0):
        raise ConfigError(f"`ridge` (={settings.ridge}) must be a finite number, 0 or more.")


def require_own_weights(model: nn.Module, settings: Substitution, kinds: Sequence[type[nn.Module]]) -> None:
    """Raise `ConfigError` where layers to be replaced are pruned, clustered or quantized: what is computed anew would
    be neither. Between the stages of a recipe their order sees to that; a model may come so."""
    stage = type(settings).__name__
    if is_quantized(model):
        raise ConfigError(f"the model is quantized already; put `{stage}` before `Quantize`.")
    if any(isinstance(module, ClusteredWeight) for module in model.modules()):
        raise ConfigError(f"the model is clustered already; put `{stage}` before `Cluster`.")
    found = layers(model, kinds)
    reasons = left_out(model, found, settings.include, settings.exclude)
    masked = [name for name, layer in found.items() if not reasons[name] and mask_of(layer) is not None]
    if masked:
        raise ConfigError(
            f"pruned weights stay zero, which new ones would not, in {', '.join(masked)}; put `{stage}` before "
            "`Prune`, or exclude these layers."
        )


@dataclass(frozen=True)
class Old:
    """A convolution about to be replaced; a linear layer is shown as the 1x1 convolution, of any map, that it is."""

    name: str
    layer: nn.Conv2d
    module: nn.Module
    original: nn.Module
    calls: int
    pairs: Pairs

    @property
    def images(self) -> int:
        """Over how many images `seen` goes, each call of the layer counted."""
        return self.calls * sum(len(batch) for batch in self.pairs.images)

    def seen(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batch by batch: what the layer sees in the network as substituted so far, what the original gave there."""
        pairs = self.pairs.of(self.module, self.original, self.calls)
        if self.module is self.layer:
            return pairs
        return ((as_map(x), as_map(y)) for x, y in pairs)

    def normal(self, rows: int = ROWS) -> Normal:
        """The normal equations of a convolution of this geometry, with a bias if the layer has one."""
        bias = self.layer.bias is not None
        return normal_equations(self.layer, self.seen(), self.images, bias, rows, self.name)


def as_convolution(layer: nn.Module) -> nn.Conv2d:
    """A convolution as it is, a linear layer as a 1x1 convolution of the same weights."""
    if isinstance(layer, nn.Conv2d):
        return layer
    assert isinstance(layer, nn.Linear)
    with torch.device("meta"):
        new = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
    new.weight = nn.Parameter(layer.weight.detach()[..., None, None])
    new.bias = layer.bias
    return new


def as_map(x: Tensor) -> Tensor:
    """Features on the last axis, as a map of as many pixels as the axes between hold: (N, ..., F) -> (N, F, L, 1)."""
    return x.reshape(len(x), -1, x.shape[-1]).mT.unsqueeze(-1)


def substitute(
    model: nn.Module,
    task: Task,
    work: Work,
    settings: Substitution,
    start: Callable[[Old], tuple[nn.Module, float]],
    notes: Mapping[str, Any],
    kinds: Sequence[type[nn.Module]] = (nn.Conv2d,),
) -> Edit:
    """Replace every layer of `kinds` that the patterns choose by what `start` makes of it, in the forward pass's order.

    `start` gives back the new layer and the squared error of its output as a share of the original output's sum of
    squares; the errors join `notes`.

    A layer that does not pay by `settings.gate` is kept, with the figures as its reason.

    Raises:
        ConfigError: a pattern that matches nothing, or no layer was changed at all; weights that are pruned, clustered
            or quantized already.
        DataError: NaN or infinity at a layer.
    """
    require_own_weights(model, settings, kinds)
    original = copy.deepcopy(model).eval()
    was_training = model.training
    model.eval()
    found, old = layers(model, kinds), layers(original, kinds)
    calls = execution_order(model, found, task.example.to(task.device))
    pairs = Pairs(model, original, plain_images(task.calibration, settings.images, task.device))
    errors: dict[str, float] = {}
    gains: dict[str, str] = {}
    gate = Gate(settings.gate, work)
    work.progress.start(type(settings).__name__.lower(), len(calls))

    def rule(name: str, layer: nn.Module) -> nn.Module:
        work.progress.step(name)
        convolution = as_convolution(layer)
        new, error = start(Old(name, convolution, layer, old[name], calls[name], pairs))
        new = new.to(device=convolution.weight.device, dtype=convolution.weight.dtype).eval()
        if settings.gate != "none":
            x, _ = seen_by(model, layer, 1, pairs.images[0][:1])[0]
            gains[name] = gate.require(layer, new, x)
        errors[name] = round(error, 4)
        return new

    model, sites = swap(model, rule, kinds, settings.include, settings.exclude, order=list(calls))
    work.progress.end()
    told: dict[str, Any] = {**notes, "relative_error": errors}
    if gains:
        told["gate"] = gains
    return Edit(model.train(was_training), sites, told)
