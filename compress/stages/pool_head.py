"""PoolHead: fully connected layers behind the last spatial map become its global average and one linear layer.

What it does. The head is all from the first to the last `Linear` that the output is computed with, behind the flattened
map. The last `Linear` becomes a `PooledLinear`: the mean of each channel over all positions, and one linear layer from
there to the outputs. What stands between becomes `Identity`; what stands before the first (a dropout, say) stays. The
linear layer is solved by ridge least squares on the pooled features of the network as compressed so far, against what
the base model's last `Linear` gave. A network whose map has one position and whose head is linear loses nothing.

When to use it, and when not. For networks in the manner of AlexNet and VGG, most of whose weights are in the head; with
`Fire` for their convolutions it is the way to SqueezeNet's 50 times fewer parameters. Put it after the stages that
replace convolutions: the least squares then make good what those lost. Where things are in the image is forgotten, and
the head no longer computes what is not linear, so train afterwards. Networks that average already (ResNets, MobileNets)
have nothing to gain. The model must be one that can be traced.

Knobs. `images`: how many calibration images the linear layer is solved on; several times as many as the map has
channels are wanted, and `data.calibration_images` has to allow for them. `ridge`: pulls its weights towards zero, as a
share of the pooled features' mean power.

Measured. `benchmarks/alexnet_fire.py`: behind `Fire`, AlexNet's three fully connected layers for a pooled one cost
87.46 to 84.56 % before training; 91.26 after it (base: 90.81).

Reference. Lin et al., "Network in Network", ICLR 2014; Iandola et al., arXiv:1602.07360.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from compress.errors import ConfigError
from compress.nn.flow import operator_name
from compress.nn.places import trace, traced_shapes
from compress.nn.pooled import PooledLinear
from compress.reconstruct import Pairs, fit_convolution, plain_images
from compress.stage import Edit, Keep
from compress.surgery import kind, layers, left_out, replace, swap
from compress.task import Task, Work

_FLATTENS = {"flatten", "reshape", "view", "squeeze", "contiguous"}
_UNCHANGING = {"flatten", "contiguous"}  # of one row of numbers for each image
_REORDERS = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "unflatten", "unsqueeze", "einsum"}
# What leaves alone what is not negative: as functions these stay in the forward, where they now meet the map.
_CLIPS = {"relu", "leaky_relu"}
_STAYING = (nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.Identity)
_BETWEEN = (
    *_STAYING,
    *(nn.BatchNorm1d, nn.LayerNorm, nn.AlphaDropout, nn.ReLU6, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Softplus),
)
_REMEDY = "leave the stage out, or write the head as modules one after the other"


@dataclass(frozen=True)
class PoolHead:
    """Settings of the stage; see the module's card."""

    images: int = 1024
    ridge: float = 1e-4

    kind: ClassVar[str] = "substitute"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ConfigError(f"`images` (={self.images}) must be at least 1.")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ConfigError(f"`ridge` (={self.ridge}) must be a finite number, 0 or more.")

    def check(self, model: nn.Module) -> None:
        """Raise `ConfigError` for a model whose head cannot be found or replaced, as far as its code tells."""
        find_head(model)

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        was_training = model.training
        model.eval()
        head = find_head(model)
        size = map_size(model, head, task.example.to(task.device))
        last = model.get_submodule(head.linears[-1])
        assert isinstance(last, nn.Linear)
        new = PooledLinear(size[0], last.out_features).to(last.weight).eval()
        reference = _reference(model, task, head.linears[-1])

        def rule(name: str, _: nn.Module) -> nn.Module:
            if name not in head.linears:
                raise Keep("it is not in the head, which is what follows the last spatial map")
            return new if name == head.linears[-1] else nn.Identity()

        model, sites = swap(model, rule, self.kinds)
        for name in head.others:
            replace(model, model.get_submodule(name), nn.Identity().eval())
        images = plain_images(task.calibration, self.images, task.device)
        work.progress.start("poolhead", len(images))
        error = self._fit(new, Pairs(model, reference, images), head.linears[-1], work)
        work.progress.end()
        notes: dict[str, Any] = {"map": list(size), "replaced": [*head.linears, *head.others]}
        notes["relative_error"] = {head.linears[-1]: round(error, 4)}
        return Edit(model.train(was_training), sites, notes)

    def _fit(self, new: PooledLinear, pairs: Pairs, name: str, work: Work) -> float:
        """Solve for the linear layer of `new`, in its place; gives back the relative squared error."""

        def pooled() -> Iterator[tuple[Tensor, Tensor]]:
            for features, logits in pairs.of(new, pairs.original.get_submodule(name), 1):
                work.progress.step()
                yield new.means(features)[..., None, None], logits[..., None, None]

        pointwise = nn.Conv2d(new.in_channels, new.out_features, 1).to(new.linear.weight)
        error = fit_convolution(pointwise, pooled(), sum(map(len, pairs.images)), self.ridge)
        assert pointwise.bias is not None
        with torch.no_grad():
            new.linear.weight.copy_(pointwise.weight.flatten(1))
            new.linear.bias.copy_(pointwise.bias)
        return error


def _reference(model: nn.Module, task: Task, name: str) -> nn.Module:
    """The network whose last `Linear` is imitated: the base model where it has that layer, else this one as it is."""
    if task.teacher is not None and task.teacher is not model:
        then = dict(task.teacher.named_modules()).get(name)
        if isinstance(then, nn.Linear) and then.out_features == model.get_submodule(name).out_features:
            return task.teacher
    return copy.deepcopy(model)


@dataclass(frozen=True)
class Head:
    """All from the first to the last `Linear` that the output is computed with.

    `linears` and `others` are module names, `map` the node of `graph` that is flattened to `flat`.
    """

    linears: tuple[str, ...]
    others: tuple[str, ...]
    graph: fx.Graph
    map: fx.Node
    flat: fx.Node


def find_head(model: nn.Module) -> Head:
    """The head of a model, as its forward tells.

    Raises:
        ConfigError: there is none, or something in it cannot be replaced.
    """
    try:
        graph = trace(model)
    except ValueError as error:
        raise _refused(f"what follows the last spatial map cannot be seen: {error}") from error
    return _Search(graph, model).run()


class _Search:
    """Walks a traced model from its output back to the last spatial map."""

    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.graph, self.model = graph, model
        self.parts = {name: why for name, why in left_out(model, layers(model, PoolHead.kinds), (), ()).items() if why}

    def run(self) -> Head:
        chain = [self._last()]
        while self._passes(before := chain[-1].all_input_nodes[0]):
            chain.append(before)
        first = max(place for place, node in enumerate(chain) if self._is_linear(node))
        inner, outer = chain[: first + 1], chain[first + 1 :]
        flattens = [place for place, node in enumerate(outer) if self._flattens(node)]
        if not flattens and operator_name(before) != "mean":
            raise _refused(f"{_shown(before)} stands in front of {inner[-1].target}, where a flattened map should be")
        flat = map_ = outer[flattens[0]] if flattens else before
        while self._flattens(map_):
            map_ = map_.all_input_nodes[0]
        if map_.op != "call_module" and operator_name(map_) in _REORDERS:
            raise _refused(f"{_shown(map_)} reorders the map in front of it")
        if not self._has_weights(map_):
            raise _refused(f"no layer with weights comes before {inner[-1].target}, so there is no map to average")
        for node in inner[1:]:
            if len(node.users) > 1:
                raise _refused(f"{_shown(node)} is read in several places")
        linears = [str(node.target) for node in inner[::-1] if self._is_linear(node)]
        return Head(tuple(linears), tuple(self._others(inner)), self.graph, map_, flat)

    def _last(self) -> fx.Node:
        """The call of the last `Linear`."""
        node = next(node for node in self.graph.nodes if node.op == "output").args[0]
        while isinstance(node, fx.Node) and not self._is_linear(node):
            node = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None
        if not isinstance(node, fx.Node):
            raise _refused("there is no `Linear` through which everything in the output goes")
        return node

    def _others(self, inner: list[fx.Node]) -> list[str]:
        """The modules among these calls, but for the `Linear` ones, that can go; the rest may stay."""
        calls = Counter(node.target for node in self.graph.nodes if node.op == "call_module")
        within = Counter(node.target for node in inner if node.op == "call_module")
        going = []
        for node in inner[::-1]:
            module, name = self._called(node), str(node.target)
            if module is None and operator_name(node) not in _CLIPS | _UNCHANGING:
                raise _refused(f"{_shown(node)} stands between its layers")
            alone = module is not None and calls[node.target] == within[node.target]
            if not alone and _in_place(node, module):
                raise _refused(f"{_shown(node)} stays and works in place, where it would now change the map itself")
            if module is None or kind(module) is nn.Flatten:
                continue
            if name in self.parts:
                raise _refused(f"{name} stays, since {self.parts[name]}")
            if (kind(module) is nn.Linear and calls[node.target] > 1) or not (alone or kind(module) in _STAYING):
                raise _refused(f"{name} is used in several places")
            if alone and kind(module) is not nn.Linear and name not in going:
                going.append(name)
        return going

    def _passes(self, node: fx.Node) -> bool:
        module = self._called(node)
        if module is None:
            return self._flattens(node) or operator_name(node) in _CLIPS
        return kind(module) in (nn.Linear, nn.Flatten, *_BETWEEN)

    def _flattens(self, node: fx.Node) -> bool:
        module = self._called(node)
        return operator_name(node) in _FLATTENS if module is None else kind(module) is nn.Flatten

    def _is_linear(self, node: fx.Node) -> bool:
        module = self._called(node)
        return module is not None and kind(module) is nn.Linear

    def _called(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _has_weights(self, node: fx.Node) -> bool:
        """Whether any layer that this is computed with holds weights."""
        waiting, seen = [node], {node}
        while waiting:
            module = self._called(node := waiting.pop())
            if node.op == "get_attr" or (module is not None and any(True for _ in module.parameters())):
                return True
            waiting += [source for source in node.all_input_nodes if source not in seen]
            seen |= set(node.all_input_nodes)
        return False


def _in_place(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return bool(getattr(module, "inplace", False))
    return bool(node.kwargs.get("inplace")) or any(argument is True for argument in node.args)


def _shown(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "the model's input"
    path, operator, _ = str(node.meta["place"]).split(":")
    return path if node.op == "call_module" else f"`{operator}`" + (f" in {path}" if path else "")


def _refused(why: str) -> ConfigError:
    return ConfigError(f"the model's fully connected head cannot be replaced: {why}; {_REMEDY}.")


def map_size(model: nn.Module, head: Head, example: Tensor) -> tuple[int, int, int]:
    """Channels, height and width of the map that the head reads.

    Raises:
        ConfigError: it is no map, or there is nothing to gain.
    """
    shapes = traced_shapes(model, head.graph, example)
    size, flat = shapes[head.map.name], shapes[head.flat.name]
    if len(size) == 2:
        size = (*size, 1, 1)
    if len(size) != 4 or flat != (size[0], math.prod(size[1:])):
        raise _refused(
            f"{_shown(head.map)} gives {size}, {_shown(head.flat)} makes {flat} of it, which is not (N, C * H * W)"
        )
    if len(head.linears) == 1 and size[2:] == (1, 1):
        raise _refused(
            f"it is one linear layer ({head.linears[0]}) behind a map of one position: nothing is left to do"
        )
    return size[1], size[2], size[3]
