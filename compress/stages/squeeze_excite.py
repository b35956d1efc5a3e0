"""SqueezeExcite: gates that weigh the channels of each residual branch, put into a trained network.

What it does. Behind the batch norm (or the convolution, where none follows) at the end of each residual branch a
`SqueezeExcitation` is put: the means of all channels give a factor for each channel. Of the two sides of an addition
the one with more convolutions is the branch. In a network without such branches the gates stand behind every
convolution wider than 1x1 and its batch norm. Every gate starts at exactly 1, so the network computes what it did.

When to use it, and when not. It recovers accuracy: put it in after a stage that cost some, and train afterwards. It
saves nothing. Each gate costs about 2 * channels^2 / `reduction` parameters, and time: a mean, two small convolutions
and a multiplication. Mobile networks made for quantization leave it out (EfficientNet-Lite does). Train before
`Quantize`: it calibrates the ranges on the gates as they are then, and a gate that is still 1 could never grow.

Knobs. `reduction`: channels of the layer to units of the gate's bottleneck, which has at least 4. `include`, `exclude`:
by the name of the layer that the gate stands behind, which later stages know as NAME.0.

Measured. ResNet-20 on CIFAR-10 (91.73 %), recipe `squeeze_excite`: 91.94 % after ten epochs, in 1.12 of the time in
onnxruntime (one image, 2 cores).

Reference. Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import fx, nn

from compress.errors import ConfigError
from compress.nn.flow import ADDITIONS, CLIPPING_LAYERS, CLIPS, is_one_of, operator_name
from compress.nn.places import trace
from compress.nn.squeeze_excite import SqueezeExcitation
from compress.stage import Edit, Keep, Site
from compress.surgery import describe, kind, layers, leaves, matching, require_change, swap
from compress.task import Task, Work

_PASSING = (nn.Identity, nn.Dropout, nn.Dropout2d)
_GATED = "squeeze-and-excitation stands behind it already"


@dataclass(frozen=True)
class SqueezeExcite:
    """Settings of the stage; see the module's card."""

    reduction: int = 16
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "substitute"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.BatchNorm2d)

    def __post_init__(self) -> None:
        if self.reduction < 1:
            raise ConfigError(f"`reduction` (={self.reduction}) must be at least 1; 16 is usual.")

    def check(self, model: nn.Module) -> None:
        """Raise `ConfigError` for patterns that match nothing or leave no place, and for layers that have gates."""
        found = layers(model, _kinds(model, self.kinds))
        reasons = matching(list(found), self.include, self.exclude)
        why = without_gate(model, found)
        twice = [name for name in found if why[name] == _GATED and not reasons[name]]
        if twice:
            raise ConfigError(
                f"the model has squeeze-and-excitation already behind {', '.join(twice)}; "
                "put these layers into `exclude`, or leave the stage out."
            )
        sites = [(name, _text(layer), reasons[name] or why[name]) for name, layer in found.items()]
        require_change(tuple(Site(name, text, None if reason else text, reason) for name, text, reason in sites))

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        self.check(model)
        kinds = _kinds(model, self.kinds)
        found = layers(model, kinds)
        why, texts = without_gate(model, found), {name: _text(layer) for name, layer in found.items()}
        like = next(model.parameters())
        gates: dict[str, SqueezeExcitation] = {}

        def rule(name: str, layer: nn.Module) -> nn.Module:
            if why[name]:
                raise Keep(why[name])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(work.seed(task.seed, name))
                gates[name] = SqueezeExcitation(_channels(layer), self.reduction)
            return nn.Sequential(layer, gates[name].to(device=like.device, dtype=like.dtype))

        model, sites = swap(model, rule, kinds, self.include, self.exclude)
        after = {name: f"{texts[name]} + {describe(gate)}" for name, gate in gates.items()}
        told = tuple(replace(site, before=texts[site.name], after=after.get(site.name)) for site in sites)
        added = sum(parameter.numel() for gate in gates.values() for parameter in gate.parameters())
        return Edit(model, told, {"reduction": self.reduction, "gates": len(gates), "params_added": added})


def _kinds(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> tuple[type[nn.Module], ...]:
    """`kinds`, and the layers of `compress.nn` in the model that stand in for convolutions."""
    found = {kind(layer): None for _, layer in leaves(model) if _is_unit(layer) and hasattr(layer, "out_channels")}
    return (*kinds, *found)


def _is_unit(module: nn.Module) -> bool:
    return kind(module).__module__.startswith("compress.nn.")


def _text(layer: nn.Module) -> str:
    return f"BatchNorm2d({layer.num_features})" if isinstance(layer, nn.BatchNorm2d) else describe(layer)


def _channels(layer: nn.Module) -> int:
    return int(layer.num_features if isinstance(layer, nn.BatchNorm2d) else layer.out_channels)  # type: ignore[arg-type]


def without_gate(model: nn.Module, found: Mapping[str, nn.Module]) -> dict[str, str]:
    """Why no gate belongs behind each of the layers; "" for those behind which one does."""
    if list(found) == [""]:
        return {"": ""}
    try:
        graph = trace(model)
    except ValueError as error:
        return dict.fromkeys(found, f"where branches end cannot be seen: {error}")
    return _Search(graph, model, found).run()


class _Search:
    """The layers of a traced model behind which gates belong. A layer made of several counts as one."""

    def __init__(self, graph: fx.Graph, model: nn.Module, found: Mapping[str, nn.Module]) -> None:
        self.graph, self.model, self.found = graph, model, found
        self.names = {id(layer): name for name, layer in found.items()}
        self.units = {node: self._unit(node) for node in graph.nodes}
        self.behind: dict[fx.Node, set[fx.Node]] = {}  # what a tensor is computed from, itself included
        for node in graph.nodes:
            self.behind[node] = {node}.union(*(self.behind[source] for source in node.all_input_nodes))

    def run(self) -> dict[str, str]:
        ends, shortcuts = self._branches()
        rest = "no residual branch ends here"
        if not ends:
            ends, shortcuts = self._wide(), set()
            rest = "no convolution wider than 1x1 ends here"
        why = dict.fromkeys(self.found, "never reached by the forward pass")
        for node, unit in self.units.items():
            inner = self.names.get(id(self._called(node)))
            if inner is not None and unit is not None:
                why[inner] = f"it is a part of {describe(unit)}"
            if (name := self._name(node)) is not None:
                why[name] = rest
        why |= dict.fromkeys(shortcuts, "it ends the shortcut: the branch beside it has more convolutions")
        for name, node in ends.items():
            gated = any(isinstance(self.units[reader], SqueezeExcitation) for reader in node.users)
            why[name] = _GATED if gated else ""
        return why

    def _branches(self) -> tuple[dict[str, fx.Node], set[str]]:
        """The layers at the end of residual branches, and those at the end of what is added to them."""
        ends: dict[str, fx.Node] = {}
        shortcuts: set[str] = set()
        for node in self.graph.nodes:
            if not _adds(node) or len(node.all_input_nodes) != 2:
                continue
            one, other = node.all_input_nodes
            if not self.behind[one] & self.behind[other]:  # a parameter is added
                continue
            branch = one if self._length(one, other) >= self._length(other, one) else other
            for side in (one, other):
                end = self._end(side, clipped=side is branch)
                name = self._name(end)
                if name is not None and side is branch:
                    ends[name] = end
                elif name is not None:
                    shortcuts.add(name)
        return ends, shortcuts - set(ends)

    def _length(self, side: fx.Node, other: fx.Node) -> int:
        """How many convolutions `side` is computed with and `other` is not."""
        names = [self._name(node) for node in self.behind[side] - self.behind[other]]
        return sum(name is not None and not self._is_norm(name) for name in names)

    def _wide(self) -> dict[str, fx.Node]:
        """The convolutions wider than 1x1, or the batch norms behind them."""
        ends = {}
        for node in self.graph.nodes:
            name = self._name(node)
            if name is None or math.prod(getattr(self.found[name], "kernel_size", ())) == 1:
                continue
            reader = next(iter(node.users), node)
            norm = self._name(reader)
            if len(node.users) == 1 and norm is not None and self._is_norm(norm):
                ends[norm] = reader
            else:
                ends[name] = node
        return ends

    def _is_norm(self, name: str) -> bool:
        return kind(self.found[name]) is nn.BatchNorm2d

    def _called(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _name(self, node: fx.Node) -> str | None:
        """The layer of which this is the output."""
        unit = self.units[node]
        if unit is None:
            return self.names.get(id(self._called(node)))
        leaves_it = any(self.units[reader] is not unit for reader in node.users)
        return self.names.get(id(unit)) if leaves_it else None

    def _end(self, node: fx.Node, clipped: bool) -> fx.Node:
        """The tensor that this one was in front of gates, dropout and the like; with `clipped` also of ReLUs."""
        names, kinds = (CLIPS, {*_PASSING, *CLIPPING_LAYERS}) if clipped else ((), _PASSING)
        while True:
            unit, sources = self.units[node], []
            if isinstance(unit, SqueezeExcitation):
                sources = [source for source in node.all_input_nodes if self.units[source] is not unit]
            elif unit is None and is_one_of(node, self.model, names, kinds):
                sources = node.all_input_nodes
            if not sources:
                return node
            node = sources[0]

    def _unit(self, node: fx.Node) -> nn.Module | None:
        """The outermost layer of `compress.nn` in whose forward this is computed."""
        if node.op in ("placeholder", "output"):
            return None
        path = str(node.meta["place"]).partition(":")[0]
        steps = path.split(".") if path else []
        inside = steps[:-1] if node.op == "call_module" else steps
        within = [self.model.get_submodule(".".join(inside[:depth])) for depth in range(len(inside) + 1)]
        return next((module for module in within if _is_unit(module)), None)


def _adds(node: fx.Node) -> bool:
    return operator_name(node) in ADDITIONS
