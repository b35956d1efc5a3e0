"""From a trained model to plain torch layers: the form that is exported."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.lower.fold import fold_batch_norm
from compress.nn.dynamic import DynamicLinear, DynamicPointwise
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight
from compress.nn.straight_through import requantized_units
from compress.nn.units import known_units
from compress.surgery import is_ours, kind, leaves, output_layers, replace


class Grid(nn.Module):
    """Puts a tensor on a fixed grid: `FakeQuantize` in arithmetic, bit for bit.

    torch's own operator cannot be exported with a dynamic batch (2.13: it has no kernel that only tells the shape).
    `unit` is what it is in `compress.nn.units`.
    """

    unit: Tensor | None

    def __init__(self, scale: float, zero_point: int, largest: int, unit: Tensor | None = None) -> None:
        super().__init__()
        self.scale, self.zero_point, self.largest = scale, zero_point, largest
        self.inverse = float(1 / torch.tensor(scale))  # in float32, as torch's kernel has it
        self.register_buffer("unit", unit)

    def forward(self, x: Tensor) -> Tensor:
        if self.unit is not None:
            return requantized_units(x, self.unit, self.scale, -self.zero_point, self.largest - self.zero_point)
        integers = (x * self.inverse + self.zero_point).round().clamp(0, self.largest)
        return (integers - self.zero_point) * self.scale


def lower(model: nn.Module, target: str, forms: Mapping[str, str] | None = None) -> nn.Module:
    """A copy in evaluation mode that computes the same with torch's own layers, as fast as `target` can run it.

    Parametrizations are baked into their weights, batch norm is folded, layers of ours are replaced by what their
    `lower(target)` gives, activation quantizers get fixed numbers. `model.input` is kept. `forms` names, by layer, the
    form to take out of those that the layer's `forms(target)` has; see `compress.lower.forms`.

    Raises:
        ValueError: `forms` names a layer or a form that there is not.
    """
    wanted = dict(forms or {})
    units = known_units(model)
    lowered = copy.deepcopy(model).eval()
    for module in list(lowered.modules()):
        if parametrize.is_parametrized(module):
            bake(module)
    fold_batch_norm(lowered)
    for name, module in list(leaves(lowered)):
        new = module
        if name in wanted and hasattr(kind(module), "forms"):
            new = _form(name, module.forms(target), wanted.pop(name))  # type: ignore[operator]  # by its contract
        elif is_ours(module):
            new = module.lower(target)  # type: ignore[operator]  # by its contract
        elif isinstance(module, FakeQuantize):
            new = Grid(float(module.scale.detach()), int(module.zero_point), module.largest, units.get(name))
        if new is not module:
            lowered = replace(lowered, module, new.eval())
    if wanted:
        raise ValueError(f"`forms` names {', '.join(map(repr, wanted))}: no layer that has several forms.")
    for parameter in lowered.parameters():
        parameter.requires_grad_(False)
    return lowered


def _form(name: str, forms: Mapping[str, nn.Module], wanted: str) -> nn.Module:
    if wanted not in forms:
        raise ValueError(f"`forms[{name!r}]` (={wanted!r}) must be one of {', '.join(forms)}.")
    return forms[wanted]


def bake(module: nn.Module) -> None:
    """Make the parametrized tensors of this one module plain parameters of the values they have now.

    Unlike torch's `remove_parametrizations` this leaves the class alone, which a deep copy shares with its original:
    there, baking the copy breaks the original.
    """
    lists = module.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    values = {name: getattr(module, name).detach().clone() for name in lists}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


@dataclass(frozen=True)
class Steps:
    """The grid of a weight: integers times a scale, one for each of equal runs of the weight in the order of memory.

    There are as many runs as outputs, or a multiple. The integers are 0 for a weight of 0; with their run's
    `zero_point` they fit int8, without it too where that is None.
    """

    scale: Tensor
    zero_point: Tensor | None = None

    def integers(self, weight: Tensor) -> Tensor | None:
        """What `weight` is in units of the scales, int16, same shape; None where it is not on this grid."""
        runs = len(self.scale)
        if runs % len(weight) or weight.numel() % runs:
            return None
        integers = (weight.double().reshape(runs, -1) / self.scale.double().unsqueeze(1)).round()
        stored = integers if self.zero_point is None else integers + self.zero_point.unsqueeze(1)
        low = -127 if self.zero_point is None else -128
        again = (integers.float() * self.scale.unsqueeze(1)).view_as(weight)
        if not (low <= float(stored.min()) and float(stored.max()) <= 127):
            return None
        return integers.to(torch.int16).view_as(weight) if torch.allclose(again, weight, rtol=1e-5, atol=0) else None


def matching_steps(model: nn.Module, plain: nn.Module) -> tuple[dict[str, Steps], dict[str, str]]:
    """The grids of `model` by the names of the layers of `plain` (= `lower(model)`) whose weights are on them.

    What became of one layer is searched for the weights that are on the grid of one of its parts, or of its output
    convolutions side by side.

    Returns:
        the grids, and the layers of `model` with a grid that no plain weight is on, with the reason.
    """
    found: dict[str, Steps] = {}
    lost = {}
    for name, layer in leaves(model):
        inside = layer.modules() if is_ours(layer) else (layer,)
        parts = {id(part): steps for part in inside if (steps := _steps(part)) is not None}
        side_by_side = [parts[id(output)] for output in output_layers(layer) if id(output) in parts]
        candidates = [*parts.values(), *([_joined(side_by_side)] if len(side_by_side) > 1 else [])]
        used = set()
        for inner, place in plain.get_submodule(name).named_modules() if parts else ():
            if kind(place) in (nn.Conv2d, nn.Linear):
                on = [i for i, steps in enumerate(candidates) if steps.integers(place.weight) is not None]
                if on:
                    found[f"{name}.{inner}".strip(".")] = candidates[on[0]]
                    used.update(on)
        if not used >= set(range(len(parts))) and len(parts) not in used:
            lost[name] = "in this file its weights are mixed, or in another order than their scales"
    return found, lost


def computed_in_float(model: nn.Module) -> dict[str, str]:
    """The layers that only torchao's kernels multiply in low precision, with what a file has in their place."""
    stored = {"int8": "as integers", "float8": "in 32 bits"}
    why = "its input finds its own scale each time: stored {}, computed in float"
    return {
        f"{name}.linear".lstrip("."): why.format(stored[module.dtype])
        for name, module in model.named_modules()
        if isinstance(module, DynamicLinear | DynamicPointwise)
    }


def weight_parts(layer: nn.Module) -> list[nn.Module]:
    """What computes the layer's weight, in order; [] where it is a plain one."""
    if not parametrize.is_parametrized(layer, "weight"):
        return []
    return list(layer.parametrizations.weight)  # type: ignore[union-attr,arg-type]  # untyped in torch


def _steps(layer: nn.Module) -> Steps | None:
    if kind(layer) not in (nn.Conv2d, nn.Linear):
        return None
    grid = next((part for part in reversed(weight_parts(layer)) if isinstance(part, FakeQuantizeWeight)), None)
    if grid is None:
        return None
    runs = max(grid.channels, len(layer.weight))  # type: ignore[arg-type]  # a tensor
    scale = grid.scale.detach().cpu().expand(runs)
    return Steps(scale, None if grid.symmetric else grid.zero_point.cpu().expand(runs))


def has_grid(layer: nn.Module) -> bool:
    """Whether the weight of this one layer is on a grid."""
    return _steps(layer) is not None


def _joined(parts: list[Steps]) -> Steps:
    scale = torch.cat([part.scale for part in parts])
    if all(part.zero_point is None for part in parts):
        return Steps(scale)
    zeros = [torch.zeros(len(p.scale), dtype=torch.int32) if p.zero_point is None else p.zero_point for p in parts]
    return Steps(scale, torch.cat(zeros))


def weight_scales(model: nn.Module) -> dict[str, Tensor]:
    """Layer name -> the scale of each output channel (N,), for layers whose weights are integers times it.

    For a layer of ours these are the scales of its output convolutions, one after the other.
    """
    scales = {}
    for name, layer in leaves(model):
        parts = [_scale(output) for output in output_layers(layer)]
        known = [part for part in parts if part is not None]
        if known and len(known) == len(parts):
            scales[name] = torch.cat(known).detach().cpu()
    return scales


def matching_scales(model: nn.Module, plain: nn.Module) -> dict[str, Tensor]:
    """The scales of `model` by the names of the layers of `plain` (= `lower(model)`) whose weights have them.

    What became of one layer is searched for the layer whose weights are integers times the scales.
    """
    found = {}
    for name, scale in weight_scales(model).items():
        place = plain.get_submodule(name)
        for inner, layer in place.named_modules():
            if kind(layer) in (nn.Conv2d, nn.Linear) and integer_weights(layer.weight, scale) is not None:
                found[f"{name}.{inner}".strip(".")] = scale
    return found


def integer_weights(weight: Tensor, scale: Tensor) -> Tensor | None:
    """The int8 integers with `weight == integers * scale` (axis 0), or None where the weight is not on that grid."""
    if len(scale) != len(weight):
        return None
    integers = Steps(scale).integers(weight)
    return None if integers is None else integers.to(torch.int8)


def _scale(layer: nn.Module) -> Tensor | None:
    parts = weight_parts(layer)
    last = parts[-1] if parts else None
    outputs = len(layer.weight)  # type: ignore[arg-type]  # a tensor
    if not isinstance(last, FakeQuantizeWeight) or last.channels not in (1, outputs):
        return None
    return last.scale.detach().expand(outputs)
