"""Where a tensor stands in a model, by name: tracing, and modules put at traced places.

A place is "<module path>:<operator>:<occurrence>", such as "layer1.0:add:0" (the first addition that the forward of
`layer1.0` computes itself), "layer1.0.conv1:call:0" (the output of that layer, called the first time) or
"x:input:0" (the argument `x` of the model). It depends on the model's code, not on the version of torch.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from compress.nn.flow import ADDITIONS, called, in_place, operator_name
from compress.nn.quantized import FakeQuantize
from compress.nn.units import passing_units
from compress.nn.zero import Zero

_RANDOM_IN_TRAINING = {"dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "rrelu", "batch_norm"}


class Placed(fx.GraphModule):
    """A traced model with its whole module tree as it was, and one more child, `quantizers`.

    `places` tells which child of `quantizers` stands at which place. In evaluation mode a quantizer behind a layer
    rounds as the integer kernel does that a runtime makes of the two, see `compress.nn.units`.
    """

    places: dict[str, str]

    def recompile(self) -> Any:
        graph = self._graph
        self._graph = passing_units(graph, self)
        try:
            code = super().recompile()
        finally:
            self._graph = graph
        self._lineno_map = {}  # its lines are not those of `graph`, in which torch.compile would look them up
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        # torch copies only what the graph mentions; containers, unused modules and attributes belong to the tree too
        result = super().__deepcopy__(memo)
        return _adopt(self, result, lambda value: copy.deepcopy(value, memo))


def trace(model: nn.Module) -> fx.Graph:
    """The model's operations as a graph; each node has its place in `node.meta["place"]`.

    Layers of torch and of ours are single nodes. To add a `Zero` is no operation, and what leads to it is none. A model
    that `place_quantizers` made gives its graph as it is.

    Raises:
        ValueError: the forward cannot be traced, or the trace would freeze what depends on the training mode.
    """
    if isinstance(model, Placed):
        return copy.deepcopy(model.graph)
    if _is_leaf(model):
        raise ValueError("the model is a single layer, so there is nothing to trace inside it")
    modes = {module: module.training for module in model.modules()}
    tracer = _Tracer()
    try:
        graphs = []
        for training in (True, False):
            for module in modes:
                module.training = training
            tracer = _Tracer()
            graphs.append(_without_zeros(tracer.trace(model), model))
    except Exception as error:  # the model's own code runs on stand-ins: anything can go wrong in it
        reason = str(error).strip().split("\n")[0].rstrip(".")
        place = f", in `{tracer.failed[1]}`" if tracer.failed[0] is error else ""
        raise ValueError(f"the forward cannot be traced ({type(error).__name__}: {reason}{place})") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    for node in graphs[1].nodes:
        _refuse_frozen(node, model)
    if _text(graphs[0]) != _text(graphs[1]):
        raise ValueError("the forward computes something else in training mode, which a trace would freeze")
    return graphs[1]


def _without_zeros(graph: fx.Graph, model: nn.Module) -> fx.Graph:
    """The graph without the additions of a `Zero`, and without what was computed for it alone."""
    unread = [node for node in graph.nodes if isinstance(called(node, model), Zero)]
    for node in unread:
        for addition in list(node.users):
            others = [argument for argument in addition.args if argument is not node]
            plain = operator_name(addition) in ADDITIONS and not addition.kwargs
            if plain and len(others) == 1 and isinstance(others[0], fx.Node):
                addition.replace_all_uses_with(others[0])
                graph.erase_node(addition)
    for node in reversed(list(graph.nodes)) if unread else ():
        if node in unread and not node.users and node.op != "placeholder":
            unread += node.all_input_nodes
            graph.erase_node(node)
    return graph


def executed(model: nn.Module) -> fx.Graph:
    """The model's operations as its forward runs them: as in `trace`, where no quantizer stands behind a layer."""
    return passing_units(model.graph, model) if isinstance(model, Placed) else trace(model)


def traced_shapes(model: nn.Module, graph: fx.Graph, example: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a node of the model's graph gives for this example, by the node's name."""
    shapes: dict[str, tuple[int, ...]] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                shapes[n.name] = tuple(value.shape)
            return value

    with torch.no_grad():
        Watch(model, graph=graph).run(example)
    return shapes


def place_quantizers(model: nn.Module, places: Mapping[str, nn.Module]) -> fx.GraphModule:
    """Put each module behind the tensor at its place, so that everybody who reads the tensor reads its output.

    The same module at two places stays one module. The model's own modules are taken over, not copied.

    Raises:
        ValueError: the model cannot be traced, or a place (named) is not in it.
    """
    if quantizer_places(model):
        raise ValueError("the model has quantizers already; place all of them at once.")
    graph = trace(model)
    nodes = {node.meta["place"]: node for node in graph.nodes if "place" in node.meta}
    for place in places:
        if place not in nodes:
            raise ValueError(f"`places` has {place!r}, which is not in the traced model; it has: {', '.join(nodes)}.")
    children = nn.Module()
    taken: dict[str, str] = {}
    names: dict[int, str] = {}
    for place, node in nodes.items():
        if place not in places:
            continue
        module = places[place]
        if id(module) not in names:
            names[id(module)] = _child_name(place, children)
            children.add_module(names[id(module)], module)
        taken[place] = names[id(module)]
        _insert(graph, node, f"quantizers.{taken[place]}")
    model.add_module("quantizers", children)
    result = Placed(model, graph, type(model).__name__)
    _adopt(model, result, lambda value: value)
    del model._modules["quantizers"]
    result.places = taken
    return result


def quantizer_places(model: nn.Module) -> dict[str, str]:
    """Place -> name of the child of `model.quantizers` that stands there; {} for a model without quantizers."""
    return dict(model.places) if isinstance(model, Placed) else {}


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.path = [""]
        self.failed: tuple[Exception | None, str] = None, ""  # an error, and the innermost module that it left
        self.seen: Counter[tuple[str, str]] = Counter()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.path.append(self.path_of_module(m))
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if error is not self.failed[0]:
                self.failed = error, self.path[-1]
            raise
        finally:
            self.path.pop()

    def create_arg(self, a: Any) -> Any:
        # A tensor that a forward pass makes is kept on the model under a new name each time, unless it is known.
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs:
            for name, known in vars(self.root).items():
                if name.startswith("_tensor_constant") and isinstance(known, Tensor) and _alike(known, a):
                    self.tensor_attrs[a] = name
                    break
        return super().create_arg(a)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        if kind == "output":
            return node
        path, operator = self.path[-1], _operator(kind, target)
        if kind == "placeholder":
            path = str(target)
        count = self.seen[path, operator]
        self.seen[path, operator] += 1
        node.meta["place"] = f"{path}:{operator}:{count}"
        return node


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


def _is_leaf(module: nn.Module) -> bool:
    kind = parametrize.type_before_parametrizations(module)
    if isinstance(module, FakeQuantize) or (hasattr(kind, "lower") and hasattr(kind, "config")):
        return True
    containers = nn.Sequential | nn.ModuleList | nn.ModuleDict
    return kind.__module__.startswith("torch.nn.") and not isinstance(module, containers)


def _operator(kind: str, target: Any) -> str:
    if kind == "call_module":
        return "call"
    if kind == "placeholder":
        return "input"
    name = target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)
    return f"get_attr.{name}" if kind == "get_attr" else str(name)


def _refuse_frozen(node: fx.Node, model: nn.Module) -> None:
    place = node.meta.get("place", "")
    if node.op == "call_function":
        try:
            arguments = inspect.signature(node.target).parameters  # type: ignore[arg-type]  # callable, by its op
        except (TypeError, ValueError):  # a builtin without a signature
            arguments = {}  # type: ignore[assignment]  # only asked for membership
        if "training" in arguments or _operator(node.op, node.target) in _RANDOM_IN_TRAINING:
            raise ValueError(f"{place} is a function that depends on the training mode; use a module in its place")
    if not in_place(node, model):
        return
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    for source in node.all_input_nodes[:1]:
        if any(order[reader] > order[node] for reader in source.users):
            raise ValueError(f"{place} changes a tensor in place that is read again later; use its result instead")


def _text(graph: fx.Graph) -> str:
    return "\n".join(node.format_node() or "" for node in graph.nodes)


def _child_name(place: str, children: nn.Module) -> str:
    name = base = re.sub(r"\W+", "_", place)
    number = 2
    while name in children._modules:
        name, number = f"{base}_{number}", number + 1
    return name


def _insert(graph: fx.Graph, node: fx.Node, target: str) -> None:
    behind = node
    while behind.op == "placeholder" and behind.next.op == "placeholder":
        behind = behind.next
    with graph.inserting_after(behind):
        quantized = graph.call_module(target, (node,))
    quantized.meta["place"] = f"{target}:call:0"
    node.replace_all_uses_with(quantized, delete_user_cb=lambda user: user is not quantized)


def _adopt(source: nn.Module, result: fx.GraphModule, take: Callable[[Any], Any]) -> fx.GraphModule:
    """Give `result` everything of `source` that torch left behind."""
    for store in ("_parameters", "_buffers", "_modules"):
        old: dict[str, Any] = source.__dict__[store]
        new: dict[str, Any] = result.__dict__[store]
        extra = [name for name in new if name not in old]
        merged = {name: take(value) for name, value in old.items()} | {name: new[name] for name in extra}
        new.clear()
        new.update(merged)
    for name, value in source.__dict__.items():
        if name not in result.__dict__:
            result.__dict__[name] = take(value)
    return result
