"""What every stage shares that puts a model on integers: which layers, which tensors, and the walk that does it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from compress.calibration import Ranges, calibrated
from compress.errors import ConfigError
from compress.lower.fold import fold_batch_norm
from compress.lower.tensors import Tensors, quantizable, round_biases
from compress.nn.dynamic import FakeQuantizeDynamic, Float8Weight
from compress.nn.masked import MaskedWeight
from compress.nn.places import place_quantizers, quantizer_places, trace
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight
from compress.stage import Edit, Site
from compress.surgery import describe, layers_and_ours, matching, replace, require_change, weighted
from compress.task import Task, Work

KINDS: tuple[type[nn.Module], ...] = (nn.Conv2d, nn.Linear)
GRANULARITIES = ("channel", "tensor", "group")
WEIGHT_RANGES = ("max", "mse")
CLIPS = torch.linspace(0.2, 1.0, 81)  # shares of the largest weight that "mse" tries


@dataclass(frozen=True)
class WeightGrid:
    """How weights are put on integers: one scale for each output channel, group or tensor, and how it is found."""

    granularity: str = "channel"
    group_size: int = 32
    symmetric: bool = True
    grid: str = "uniform"
    range: str = "max"
    learn: bool = False

    def of(self, weight: Tensor, bits: int) -> FakeQuantizeWeight:
        """The grid for this weight (first axis: output channels), whose sizes were checked."""
        grid = FakeQuantizeWeight(bits, self._scales(weight), self.symmetric, self.grid, self._step())
        grid = grid.to(weight.device)
        grid.follow(weight)
        if self.range == "mse":
            fit_squared_error(grid, weight.detach())
        return grid.eval()

    def _step(self) -> str:
        if self.learn:
            return "learn"
        return "follow" if self.range == "max" else "fixed"

    def _scales(self, weight: Tensor) -> int:
        if self.granularity == "tensor":
            return 1
        if self.granularity == "channel":
            return len(weight)
        return weight.numel() // self.group_size

    def check(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Raise ConfigError for a group size that does not divide what an output has in one of (layer, weight)."""
        each = [(name, weight[0].numel()) for name, weight in weights]
        uneven = [f"{name} has {size}" for name, size in each if size % self.group_size]
        if self.granularity != "group" or not uneven:
            return
        common = math.gcd(*(size for _, size in each))
        best = max(size for size in range(1, self.group_size + 1) if common % size == 0)
        raise ConfigError(
            f"`group_size` (={self.group_size}) must divide the weights that each output of a layer has, and "
            f"{', '.join(uneven)}; take {best}, which divides those of all layers, or exclude "
            f"{'it' if len(uneven) == 1 else 'them'}."
        )


@torch.no_grad()
def fit_squared_error(grid: FakeQuantizeWeight, weight: Tensor) -> None:
    """Shrink each scale of `grid`, fitted to the largest weight, to where rounding and clipping err least together."""
    largest, best = grid.scale.detach().clone(), grid.scale.detach().clone()
    least = torch.full_like(largest, float("inf"))
    was_training = grid.training
    grid.eval()
    for clip in CLIPS.tolist():
        grid.set_scale(largest * clip)
        error = (grid(weight) - weight).square().reshape(len(largest), -1).sum(1)
        best = torch.where(error < least, grid.scale.detach(), best)
        least = torch.minimum(error, least)
    grid.set_scale(best)
    grid.train(was_training)


@dataclass(frozen=True)
class Plan:
    """What a stage wants: grids, ranges, and how many bits each layer's weights and inputs get."""

    weights: WeightGrid
    activations: Ranges | None  # None: activations stay in float
    weight_bits: Callable[[list[str]], Mapping[str, int]]  # the layers in the order of the forward pass -> bits
    activation_bits: Callable[[list[str]], Mapping[str, int]]
    other_bits: int  # of tensors that no layer reads
    learn: bool
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)


def quantize(model: nn.Module, task: Task, work: Work, plan: Plan) -> Edit:
    """Put weights and activations on integers as `plan` says; batch norm is folded first.

    Raises:
        ConfigError: the model is quantized already, a pattern matches nothing, nothing is left to quantize, or a layer
            cannot have what is asked for (it is named).
    """
    if is_quantized(model):
        raise ConfigError("the model is quantized already; keep one of the stages that quantize.")
    found = layers_and_ours(model, KINDS)
    kept = _kept(found, plan)
    was_training = model.training
    model.eval()
    for layer in found.values():
        if hasattr(layer, "settle"):
            layer.settle()  # type: ignore[operator]  # a method, by the layers' contract
    before = {name: describe(layer) for name, layer in found.items()}
    folded = fold_batch_norm(model)
    graph, untraced = _trace(model)
    tensors = Tensors()
    order = list(found)
    if graph is not None:
        _keep_unreached(kept, found, graph, model)
        chosen = [layer for name, layer in found.items() if not kept[name]]
        if plan.activations is not None:
            floating = _floating(model, graph, task.example.to(task.device))
            tensors = quantizable(graph, model, chosen, floating)
        order = _order(graph, model, found)
    taken = [name for name in order if not kept[name]]
    weight_bits, input_bits = plan.weight_bits(taken), plan.activation_bits(taken)
    sites = tuple(
        Site(name, before[name], None, kept[name])
        if kept[name]
        else _site(name, before[name], weight_bits[name], input_bits[name], plan, tensors, untraced)
        for name in found
    )
    require_change(sites)
    grids = _grids(found, taken, weight_bits, plan.weights)
    if tensors.places:
        bits = dict.fromkeys(tensors.places, plan.other_bits)
        for place, readers in _readers(tensors).items():
            bits[place] = max(input_bits[name] for name in readers)
        assert plan.activations is not None
        model = place_quantizers(model, calibrated(model, bits, plan.activations, plan.learn, task, work))
    for layer, grid in grids:
        parametrize.register_parametrization(layer, "weight", grid)
    round_biases(model)
    notes: dict[str, Any] = {
        "weight_bits": _told(weight_bits),
        "activation_bits": _told({n: input_bits[n] for n in taken}) if tensors.places else None,
        "places": len(tensors.places),
        "batch_norms_folded": len(folded),
    }
    if untraced and plan.activations is not None:
        notes["activations"] = f"float: {untraced}"
    return Edit(model.to(task.device).train(was_training), sites, notes)


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight or activation of the model is quantized."""
    grids = FakeQuantizeWeight | Float8Weight | FakeQuantizeDynamic
    return bool(quantizer_places(model)) or any(isinstance(module, grids) for module in model.modules())


def own_grid(layer: nn.Module) -> FakeQuantizeWeight | None:
    """The grid of a `Conv2d` or `Linear` whose weight is float numbers, masked or not, put on it, and nothing else."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    chain = layer.parametrizations.weight  # type: ignore[union-attr]  # a module dict, by torch
    assert isinstance(chain, parametrize.ParametrizationList)
    own = [part for part in chain if not isinstance(part, MaskedWeight)]
    return own[0] if len(own) == 1 and isinstance(own[0], FakeQuantizeWeight) else None


def without_grids(model: nn.Module) -> nn.Module:
    """A copy of a quantized model that computes with its latent weights and unrounded activations."""
    result = copy.deepcopy(model)
    for module in list(result.modules()):
        if isinstance(module, FakeQuantize | FakeQuantizeWeight):
            replace(result, module, nn.Identity())
    return result.eval()


def _kept(found: Mapping[str, nn.Module], plan: Plan) -> dict[str, str]:
    kept = matching(list(found), plan.include, plan.exclude)
    fractional = []
    for name, layer in found.items():
        if not kept[name] and not weighted(layer):
            kept[name] = "it only displaces its input: there are no weights to quantize"
        elif not kept[name] and not any(bool(inner.weight.any()) for inner in weighted(layer)):  # type: ignore[operator]  # a tensor
            kept[name] = "its weights are all zero, so that it gives nothing to find a range from; train it first"
        elif not kept[name] and getattr(layer, "integer", True) is False:
            fractional.append(name)
    if fractional:
        raise ConfigError(
            f"{', '.join(fractional)}: displaced by fractions of a pixel, which mixes the weights, so that no grid "
            "holds them; set `quantize: true` in `Shift`, or put the names into `exclude`."
        )
    return kept


def _site(name: str, before: str, bits: int, input_bits: int, plan: Plan, tensors: Tensors, untraced: str) -> Site:
    each = {"channel": "per channel", "tensor": "per tensor", "group": f"per {plan.weights.group_size}"}
    kind_ = f"int{bits}" if plan.weights.grid == "uniform" else f"{bits}-bit power-of-two"
    weights = f"{kind_} weights {each[plan.weights.granularity]}"
    if plan.activations is None:
        return Site(name, before, weights)
    if untraced:
        return Site(name, before, weights, f"activations stay float: {untraced}")
    if all(tensors.inputs.get(name, [None])):
        return Site(name, before, f"{weights}, uint{input_bits} activations")
    return Site(name, before, weights, "activations stay float: its input is no float tensor of the trace")


def _grids(
    found: Mapping[str, nn.Module], taken: list[str], bits: Mapping[str, int], how: WeightGrid
) -> list[tuple[nn.Module, FakeQuantizeWeight]]:
    names: dict[nn.Module, str] = {}
    for name in taken:
        for layer in weighted(found[name]):
            names.setdefault(layer, name)
    how.check([(name, _weight(layer)) for layer, name in names.items()])
    return [(layer, how.of(_weight(layer), bits[name])) for layer, name in names.items()]


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _readers(tensors: Tensors) -> dict[str, list[str]]:
    readers: dict[str, list[str]] = {}
    for name, places in tensors.inputs.items():
        for place in places:
            if place is not None:
                readers.setdefault(place, []).append(name)
    return readers


def _told(bits: Mapping[str, int]) -> int | dict[str, int]:
    """One number where all layers have the same, else bits by layer."""
    return next(iter(bits.values())) if len(set(bits.values())) == 1 else dict(bits)


def _trace(model: nn.Module) -> tuple[fx.Graph | None, str]:
    try:
        return trace(model), ""
    except ValueError as error:
        return None, str(error)


def _order(graph: fx.Graph, model: nn.Module, found: Mapping[str, nn.Module]) -> list[str]:
    """The layers in the order of the forward pass; those it does not reach come last."""
    names = {id(layer): name for name, layer in found.items()}
    called = [id(model.get_submodule(str(n.target))) for n in graph.nodes if n.op == "call_module"]
    reached = dict.fromkeys(names[module] for module in called if module in names)
    return [*reached, *(name for name in found if name not in reached)]


def _floating(model: nn.Module, graph: fx.Graph, example: Tensor) -> set[str]:
    """Names of the nodes that are float tensors."""
    names = set()

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.is_floating_point():
                names.add(n.name)
            return value

    with torch.no_grad():
        Watch(model, graph=graph).run(example)
    return names


def _keep_unreached(kept: dict[str, str], found: Mapping[str, nn.Module], graph: fx.Graph, model: nn.Module) -> None:
    reached = {id(model.get_submodule(str(n.target))) for n in graph.nodes if n.op == "call_module"}
    for name, layer in found.items():
        if not kept[name] and id(layer) not in reached:
            kept[name] = "never reached by the forward pass"
