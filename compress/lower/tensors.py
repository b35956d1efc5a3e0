"""Which tensors of a model an integer runtime wants quantized."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from compress.nn.flow import called, clips, is_one_of, moves, source
from compress.nn.places import Placed
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight
from compress.surgery import output_layers

_ARITHMETIC = {"add", "iadd", "sub", "mul", "imul", "cat", "concat", "concatenate", "add_", "mul_"}
# What stays among integers when its input comes from there, each with a grid of its own behind it.
_FOLLOWING = {
    *("avg_pool2d", "adaptive_avg_pool2d", "mean", "interpolate", "relu", "relu_", "relu6", "leaky_relu", "elu"),
    *("sigmoid", "tanh", "gelu", "silu", "hardswish", "hardsigmoid"),
}
_FOLLOWING_LAYERS = {
    *(nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Upsample, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.PReLU),
    *(nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.BatchNorm2d),
}
_LAST = {"softmax", "log_softmax", "sigmoid"}
_LAST_LAYERS = {nn.Softmax, nn.LogSoftmax, nn.Sigmoid}


@dataclass
class Tensors:
    """What was found: the places to quantize in the order of the forward pass, and each layer's call sites."""

    places: list[str] = field(default_factory=list)
    inputs: dict[str, list[str | None]] = field(default_factory=dict)  # layer -> place its input is quantized at


def quantizable(graph: fx.Graph, model: nn.Module, chosen: Collection[nn.Module], floating: Collection[str]) -> Tensors:
    """The places to quantize so that the `chosen` layers, and additions and pools among them, run on integers.

    A tensor is quantized once, behind its ReLU where only the ReLU reads it, for all its readers; what only moves
    numbers keeps the grid of its input; what the model returns stays float. `floating` names the nodes that are
    float tensors (shapes and sizes are not).
    """
    return _Search(graph, model, chosen, floating).run()


@torch.no_grad()
def round_biases(model: nn.Module) -> None:
    """Biases to whole units of input scale x weight scale, as integer kernels have them, so that every file agrees.

    In place, on a model with quantizers. A layer with float weights, or whose input is float or on more than one grid,
    keeps its bias.
    """
    if not isinstance(model, Placed):
        return
    search = _Search(model.graph, model, (), ())
    steps: dict[str, set[float | None]] = {}
    for node in model.graph.nodes:
        if node.op == "call_module" and node.all_input_nodes:
            steps.setdefault(str(node.target), set()).add(search.step(node.all_input_nodes[0]))
    for name, found in steps.items():
        step = found.pop()
        if step is not None and not found:
            for layer in output_layers(model.get_submodule(name)):
                _round_bias(layer, step)


def _round_bias(layer: nn.Module, input_scale: float) -> None:
    bias = getattr(layer, "bias", None)
    if bias is None or not parametrize.is_parametrized(layer, "weight"):
        return
    grid = layer.parametrizations.weight[-1]  # type: ignore[index,union-attr]  # a list, where there are any
    if isinstance(grid, FakeQuantizeWeight) and grid.channels in (1, len(bias)):
        unit = input_scale * grid.finest_scale
        bias.copy_((bias.double() / unit.double()).round().float() * unit)


class _Search:
    def __init__(
        self, graph: fx.Graph, model: nn.Module, chosen: Collection[nn.Module], floating: Collection[str]
    ) -> None:
        self.graph, self.model = graph, model
        self.chosen = {id(layer) for layer in chosen}
        self.floating = set(floating)
        self.integer: set[fx.Node] = set()

    def run(self) -> Tensors:
        for node in self.graph.nodes:
            if self._layer(node) or (
                self._is(node, _ARITHMETIC | _FOLLOWING, _FOLLOWING_LAYERS)
                and any(self._source(n) in self.integer for n in node.all_input_nodes)
            ):
                self.integer.add(node)
        returned = self._returned()
        wanted = {
            self._behind_clip(node)
            for node in self.graph.nodes
            if node.name in self.floating and not self._moves(node) and (self._makes(node) or self._read(node))
        }
        quantized = {node for node in wanted if node not in returned and node.name in self.floating}
        found = Tensors()
        for node in self.graph.nodes:
            if node in quantized:
                found.places.append(node.meta["place"])
            if self._layer(node):
                read = self._source(node.all_input_nodes[0])
                found.inputs.setdefault(str(node.target), []).append(read.meta["place"] if read in quantized else None)
        return found

    def _layer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and id(self.model.get_submodule(str(node.target))) in self.chosen

    def _is(self, node: fx.Node, names: Collection[str], layers: Collection[type[nn.Module]]) -> bool:
        return is_one_of(node, self.model, names, layers)

    def _moves(self, node: fx.Node) -> bool:
        return moves(node, self.model)

    def _source(self, node: fx.Node) -> fx.Node:
        return source(node, self.model)

    def step(self, node: fx.Node) -> float | None:
        """The step of the grid that these numbers were put on; None if it was none."""
        grid = called(self._source(node), self.model)
        return float(grid.scale) if isinstance(grid, FakeQuantize) else None

    def _makes(self, node: fx.Node) -> bool:
        """Whether an integer kernel computes this, so that its output has to be quantized for it to be one."""
        return node in self.integer and (self._layer(node) or self._is(node, _ARITHMETIC, ()))

    def _read(self, node: fx.Node) -> bool:
        """Whether an integer kernel reads this tensor, moved or not, behind a clip that only it has or not."""
        waiting = [self._behind_clip(node)]
        while waiting:
            for reader in waiting.pop().users:
                if self._moves(reader):
                    waiting.append(reader)
                elif reader in self.integer:
                    return True
        return False

    def _behind_clip(self, node: fx.Node) -> fx.Node:
        """The ReLU that alone reads this tensor, moved or not, else the tensor itself.

        A layer's kernel clips only where nothing stands between; what else computes in float up to the ReLU.
        """
        following = node
        while len(following.users) == 1:
            following = next(iter(following.users))
            if clips(following, self.model):
                return following
            if not (self._is(following, (), {nn.Identity}) or (self._moves(following) and not self._layer(node))):
                break
        return node

    def _returned(self) -> set[fx.Node]:
        """What the model returns, and what it is moved or normalised from: the logits."""
        output = next(node for node in self.graph.nodes if node.op == "output")
        found: set[fx.Node] = set()
        waiting = list(output.all_input_nodes)
        while waiting:
            node = waiting.pop()
            found.add(node)
            if self._moves(node) or self._is(node, _LAST, _LAST_LAYERS):
                waiting.append(node.all_input_nodes[0])
        return found
