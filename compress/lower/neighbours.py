"""Which layers stand directly behind one another, channel by channel, so that a scale can move from one to the next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from compress.lower.fold import shown
from compress.nn.flow import operator_name
from compress.nn.places import trace, traced_shapes
from compress.stage import Keep
from compress.surgery import is_ours, kind, leaves, output_layers

# What a positive factor of a channel goes through unchanged.
_APART = {
    *("relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"),
    *("interpolate", "contiguous"),
}
_APART_LAYERS = {
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Upsample),
}
_FLATTENS = {"flatten", "view", "reshape", "squeeze"}
_ASKS = {"size", "dim"}
_ASKED = {"shape", "dtype", "device", "ndim"}  # attributes


@dataclass(frozen=True)
class Pair:
    """Two layers by name, the second of which alone reads the first one's output, each channel for itself.

    `positions` is how many inputs of the second belong to one output channel of the first: more than 1 for a `Linear`
    behind a flattened map. `clips` names the `ReLU6` modules between them: a scale goes through these only where they
    do not clip. `padded`: zeros are put around the map on the way, or by the second layer itself.
    """

    first: str
    second: str
    positions: int
    clips: tuple[str, ...]
    padded: bool


def neighbours(model: nn.Module, example: Tensor, left_out: Mapping[str, str]) -> tuple[list[Pair], dict[str, str]]:
    """All pairs of `Conv2d` and `Linear` layers, and why each other layer is not the first one of a pair.

    Pairs stand in the order of the forward pass. `left_out` names every layer, with the reason why it must not be in a
    pair ("" if it may).
    """
    try:
        graph = trace(model)
    except ValueError as error:
        return [], {name: why or f"who reads what is not known: {error}" for name, why in left_out.items()}
    return _Search(model, graph, example, left_out).run()


class _Search:
    def __init__(self, model: nn.Module, graph: fx.Graph, example: Tensor, left_out: Mapping[str, str]) -> None:
        self.model, self.graph, self.left_out = model, graph, left_out
        self.names = {id(layer): name for name, layer in leaves(model)}
        self.calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        self.owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
        self.shapes = traced_shapes(model, graph, example)

    def run(self) -> tuple[list[Pair], dict[str, str]]:
        pairs = []
        kept = {name: why or "never reached by the forward pass" for name, why in self.left_out.items()}
        for node in self.graph.nodes:
            layer = self._called(node)
            if layer is None or self.names[id(layer)] not in kept:
                continue
            try:
                pairs.append(self._pair(node))
                del kept[self.names[id(layer)]]
            except Keep as reason:
                kept[self.names[id(layer)]] = str(reason)
        return pairs, kept

    def _pair(self, first: fx.Node) -> Pair:
        self._check(first)
        positions, clips, padded, node = 1, [], False, first
        while True:
            reader = self._reader(node)
            layer = self._called(reader)
            if layer is not None and self.names[id(layer)] in self.left_out and not _displaces(layer):
                break
            if layer is not None and kind(layer) is nn.ReLU6:
                clips.append(self._clip(reader))
            padded |= self._pass(node, reader)
            if len(self.shapes[node.name]) > 2 == len(self.shapes[reader.name]) and _flat(reader, layer):
                positions = math.prod(self.shapes[node.name][2:])
            node = reader
        try:
            self._check(reader)
        except Keep as reason:
            raise Keep(f"{shown(reader)} reads it: {reason}") from None
        wanted = 4 if kind(layer) is nn.Conv2d else 2
        if len(self.shapes[node.name]) != wanted:
            raise Keep(f"{shown(reader)} reads it as {self.shapes[node.name]}, whose channels stand elsewhere")
        padded |= kind(layer) is nn.Conv2d and _pads(layer)
        return Pair(self.names[id(self._called(first))], self.names[id(layer)], positions, tuple(clips), padded)

    def _check(self, node: fx.Node) -> None:
        """Raise `Keep` for a layer that cannot be scaled."""
        layer = self._called(node)
        assert layer is not None
        why = self.left_out[self.names[id(layer)]]
        if why:
            raise Keep(why)
        if _displaces(layer):
            raise Keep("it only displaces its input: it has no weights to scale")
        if is_ours(layer):
            raise Keep("it takes no scales; put this stage before the one that made it")
        if parametrize.is_parametrized(layer, "weight"):
            raise Keep("its weight is parametrized; put this stage before the one that did it")
        if self.calls[str(node.target)] > 1:
            raise Keep("it is called several times, with a neighbour each time")
        if any(self.owners[id(p)] > 1 for p in layer.parameters()):
            raise Keep("it shares its weight with another layer")
        if len(self.shapes.get(node.name, ())) != (4 if kind(layer) is nn.Conv2d else 2):
            raise Keep(f"it gives {self.shapes.get(node.name)}, whose channels stand elsewhere")

    def _reader(self, node: fx.Node) -> fx.Node:
        readers = [reader for reader in node.users if not _asks(reader)]
        if len(readers) != 1:
            raise Keep(f"{' and '.join(map(shown, readers)) or 'nobody'} read{'s' * (not readers)} its output")
        if readers[0].op == "output":
            raise Keep("it is what the model returns")
        return readers[0]

    def _pass(self, node: fx.Node, reader: fx.Node) -> bool:
        """Raise `Keep` for what does not let a channel's factor through; else whether it puts zeros around the map."""
        layer, name = self._called(reader), operator_name(reader)
        given, made = self.shapes[node.name], self.shapes.get(reader.name, ())
        reason = Keep(f"{shown(reader)} reads it, which does not let a scale through")
        if name == "relu6":
            raise Keep("the function `relu6` reads it, which clips at 6; use the module `nn.ReLU6`")
        if kind(layer) is nn.Flatten if layer is not None else name in _FLATTENS:
            if made not in ((given[0], math.prod(given[1:])), (*given[:2], math.prod(given[2:]))):
                raise reason
            return False
        if name == "mean":
            if len(given) < 3 or not _over_positions(reader, len(given)):
                raise reason
            return False
        pads = name == "pad" and _pads_zeros(reader)
        if layer is not None:
            pads = kind(layer) is nn.ZeroPad2d or _displaces(layer)
        passes = kind(layer) in _APART_LAYERS if layer is not None else name in _APART
        if not (passes or pads) or len(made) != len(given) or made[:2] != given[:2]:
            raise reason
        averages = kind(layer) is nn.AvgPool2d if layer is not None else name == "avg_pool2d"
        return pads or (averages and (layer is None or getattr(layer, "padding", 0) not in (0, (0, 0))))

    def _clip(self, node: fx.Node) -> str:
        if self.calls[str(node.target)] > 1:
            raise Keep(f"{shown(node)} reads it, which clips at 6 in several places")
        return self.names[id(self._called(node))]

    def _called(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None


def _asks(node: fx.Node) -> bool:
    """Whether a node wants to know what a tensor is like, and reads none of its numbers."""
    name = operator_name(node)
    return name in _ASKS or (name == "getattr" and node.args[1] in _ASKED)


def _flat(node: fx.Node, layer: nn.Module | None) -> bool:
    return operator_name(node) in _FLATTENS or (layer is not None and kind(layer) is nn.Flatten)


def _over_positions(node: fx.Node, axes: int) -> bool:
    """Whether a mean over some of so many axes goes over all positions, and nothing else."""
    over = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    over = over if isinstance(over, list | tuple) else [over]
    whole = all(isinstance(axis, int) for axis in over)
    return whole and sorted(int(axis) % axes for axis in over) == list(range(2, axes))  # type: ignore[arg-type]


def _pads_zeros(node: fx.Node) -> bool:
    """Whether the function `pad` puts zeros."""
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | dict(node.kwargs)
    return given.get("mode", "constant") == "constant" and given.get("value") in (None, 0)


def _displaces(layer: nn.Module) -> bool:
    """Whether this is a layer of ours without convolutions, which displaces each channel for itself."""
    return is_ours(layer) and hasattr(layer, "displacement") and not output_layers(layer)


def _pads(layer: nn.Module | None) -> bool:
    """Whether a convolution puts zeros around its input."""
    assert isinstance(layer, nn.Conv2d)
    if isinstance(layer.padding, str):
        around = layer.padding == "same" and max(layer.kernel_size) > 1
    else:
        around = any(layer.padding)
    return around and layer.padding_mode == "zeros"
