"""What the numbers in front of a quantizer are whole multiples of, so that it can round as an integer kernel does.

A layer with integer weights between two grids gives, for each output channel, a whole number of units: the step of its
input's grid times that of its weights. Integer kernels multiply that whole number by one float32 number and round. In
float the sum comes with an error, small as it is, and one number that rounds the other way spreads through all layers
behind it; so the quantizer has to know the unit.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from compress.nn.flow import called, is_one_of, source
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight

_EDGE_AT_6 = {"relu6"}, {nn.ReLU6}
_PASSED = {"relu", "relu_", "relu6"}, {nn.ReLU, nn.ReLU6, nn.Identity}  # whose edges stay what they are


@dataclass(frozen=True)
class Sums:
    """Where a quantizer reads a layer's sums: the nodes that call it, the layer, and the grid the layer reads.

    What exceeds `top` is cut off on the way; infinite where nothing is.
    """

    quantizer: fx.Node
    layer: fx.Node
    grid: fx.Node
    top: float


def sums(graph: fx.Graph, model: nn.Module) -> Iterator[Sums]:
    """All quantizers of the graph that stand behind a layer which reads a grid, a ReLU between them or not."""
    for node in graph.nodes:
        if not isinstance(called(node, model), FakeQuantize):
            continue
        layer, top = node.all_input_nodes[0], float("inf")
        while is_one_of(layer, model, *_PASSED):
            top = 6.0 if is_one_of(layer, model, *_EDGE_AT_6) else top
            layer = layer.all_input_nodes[0]
        if _weights(called(layer, model)) and layer.all_input_nodes:
            grid = source(layer.all_input_nodes[0], model)
            if isinstance(called(grid, model), FakeQuantize):
                yield Sums(node, layer, grid, top)


def unit(quantizer: nn.Module, layer: nn.Module, grid: nn.Module, top: float) -> Tensor | None:
    """The unit of each output channel, in the shape that broadcasts over the layer's output.

    None where the layer's weights are on no grid, or on one with several scales for a channel, and where the quantizer
    reaches beyond `top`: what was cut off there is no whole number of units. Behind a finite `top` it is None on a GPU
    too, which asking for the reach would wait for.
    """
    if not isinstance(quantizer, FakeQuantize) or not isinstance(grid, FakeQuantize):
        return None
    if top < float("inf") and (not quantizer.scale.is_cpu or quantizer.highest > top * (1 + 1e-5)):
        return None
    parts = _weights(layer)
    scales = [_scale(part) for part in parts]
    known = [scale for scale in scales if scale is not None]
    if not known or len(known) < len(parts):
        return None
    each = grid.scale.detach() * torch.cat(known)
    return each if isinstance(parts[0], nn.Linear) else each.view(-1, 1, 1)


def known_units(model: nn.Module) -> dict[str, Tensor]:
    """The unit of what each quantizer rounds, by the quantizer's name; without those that stand in several places."""
    if not isinstance(model, fx.GraphModule):
        return {}
    calls = Counter(node.target for node in model.graph.nodes)
    known = {}
    for found in sums(model.graph, model):
        modules = [model.get_submodule(str(n.target)) for n in (found.quantizer, found.layer, found.grid)]
        each = unit(modules[0], modules[1], modules[2], found.top)
        if each is not None and calls[found.quantizer.target] == 1:
            known[str(found.quantizer.target)] = each
    return known


def quantized(quantizer: nn.Module, x: Tensor, layer: nn.Module, grid: nn.Module, top: float) -> Tensor:
    """What `quantizer` gives for a layer's sums `x`; see `Sums`.

    In training, and under `torch.compile`, which would have to stop and ask for numbers, it knows no unit.
    """
    plain = quantizer.training or torch.compiler.is_compiling()
    each = None if plain else unit(quantizer, layer, grid, top)
    result: Tensor = quantizer(x) if each is None else quantizer(x, each)
    return result


def passing_units(graph: fx.Graph, model: nn.Module) -> fx.Graph:
    """The graph as it is run: a copy whose quantizers learn the unit of what they round."""
    run = copy.deepcopy(graph)
    for found in list(sums(run, model)):
        node = found.quantizer
        with run.inserting_before(node):
            modules = [run.get_attr(str(n.target)) for n in (node, found.layer, found.grid)]
            made = run.call_function(quantized, (modules[0], node.args[0], *modules[1:], found.top))
        node.replace_all_uses_with(made)
        run.erase_node(node)
    return run


def _weights(layer: nn.Module | None) -> tuple[nn.Module, ...]:
    """The `Conv2d` or `Linear` modules whose outputs, side by side, are this layer's sums; () for any other layer."""
    if layer is None:
        return ()
    if parametrize.type_before_parametrizations(layer) in (nn.Conv2d, nn.Linear):
        return (layer,)
    return tuple(layer.output_convolutions()) if hasattr(layer, "output_convolutions") else ()  # type: ignore[operator]  # by the layers' contract


def _scale(layer: nn.Module) -> Tensor | None:
    """The step of each output channel's weights (O,)."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    chain: Any = layer.parametrizations.weight  # type: ignore[union-attr]  # a module dict, by torch
    grid, outputs = chain[-1], len(chain.original)
    if not isinstance(grid, FakeQuantizeWeight) or grid.channels not in (1, outputs):
        return None
    return grid.finest_scale.expand(outputs)
