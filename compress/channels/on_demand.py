"""A network's tensors over many images, each computed once, when somebody asks for it, and forgotten when nobody can.

Unlike a plain walk it does not run what is not needed yet: the other operand of an addition is known before the layer
whose output is added to it has run, so that this layer can still be changed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress.nn.flow import ADDITIONS, operator_name
from compress.nn.places import trace
from compress.surgery import kind

MOST_BYTES = 2**32  # of tensors that wait to be read
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class OnDemand:
    """The tensors of `model` for batches of `images`. Ask in the order of the forward pass.

    Raises:
        ValueError: the model cannot be traced.
    """

    def __init__(self, model: nn.Module, images: Sequence[Tensor]) -> None:
        self.model, self.images = model, images
        self.nodes = list(trace(model).nodes)
        self.place = {node: at for at, node in enumerate(self.nodes)}
        self.known: list[dict[fx.Node, Any]] = [{} for _ in images]
        self.done: set[fx.Node] = set()

    def of(self, node: fx.Node) -> list[Tensor]:
        """The tensor of `node` for every batch."""
        for needed in self._needed(node, set(self.known[0])):
            for known, batch in zip(self.known, self.images, strict=True):
                known[needed] = self._computed(needed, known, batch)
            self.done.add(needed)
            for source in needed.all_input_nodes:
                if source is not node and all(user in self.done for user in source.users):
                    for known in self.known:
                        known.pop(source, None)
        return [known[node] for known in self.known]

    def answers(self) -> list[Tensor]:
        """What the network answers as it is now; nothing that is known so far changes."""
        output = self.nodes[-1].all_input_nodes[0]
        answers = []
        for known, batch in zip(self.known, self.images, strict=True):
            ahead = dict(known)
            needed = self._needed(output, set(ahead))
            left = {source: sum(user in needed for user in source.users) for source in ahead}
            for node in needed:
                ahead[node] = self._computed(node, ahead, batch)
                left[node] = sum(user in needed for user in node.users)
                for source in node.all_input_nodes:
                    left[source] -= 1
                    if not left[source]:
                        ahead.pop(source)
            answers.append(ahead[output])
        return answers

    def _needed(self, node: fx.Node, known: set[fx.Node]) -> list[fx.Node]:
        """What has to run for `node`, in order."""
        needed: set[fx.Node] = set()
        asked = [node]
        while asked:
            one = asked.pop()
            if one not in known and one not in needed:
                assert one not in self.done, f"{one} was read already"
                needed.add(one)
                asked += one.all_input_nodes
        return sorted(needed, key=self.place.__getitem__)

    def _computed(self, node: fx.Node, known: dict[fx.Node, Any], batch: Tensor) -> Any:
        args: Any = fx.map_arg(node.args, known.__getitem__)
        kwargs: Any = fx.map_arg(node.kwargs, known.__getitem__)
        with torch.no_grad():
            if node.op == "placeholder":
                return batch
            if node.op == "get_attr":
                return reduce(getattr, str(node.target).split("."), self.model)
            if node.op == "call_module":
                return self.model.get_submodule(str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                return operator.methodcaller(str(node.target), *args[1:], **kwargs)(args[0])
            assert callable(node.target)
            return node.target(*args, **kwargs)

    def needs(self, node: fx.Node, layers: set[str]) -> bool:
        """Whether one of these layers has to run before `node` is known."""
        return any(n.op == "call_module" and n.target in layers for n in self._needed(node, set(self.known[0])))

    def norm_after(self, node: fx.Node) -> nn.Module | None:
        """The batch norm, with statistics of its own, that alone reads `node`, and reads nothing else."""
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        if reader is None or reader.op != "call_module":
            return None
        if sum(each.op == "call_module" and each.target == reader.target for each in self.nodes) > 1:
            return None
        module = self.model.get_submodule(str(reader.target))
        return module if kind(module) in _NORMS and module.running_mean is not None else None

    def addition(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The addition that alone reads `node`, or the batch norm behind it, and its other operand."""
        if self.norm_after(node) is not None:
            node = next(iter(node.users))
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        if reader is None or operator_name(reader) not in ADDITIONS or reader.kwargs:
            return None
        others = [argument for argument in reader.args if argument is not node]
        if len(reader.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
            return None
        return reader, others[0]


def bytes_an_image(model: nn.Module, image: Tensor) -> int:
    """The most that the tensors of one image, (1, C, H, W), hold at a time."""
    walk = OnDemand(model, [image])
    most = 0
    for node in walk.nodes[:-1]:
        walk.of(node)
        held = {id(value): value for value in walk.known[0].values() if isinstance(value, Tensor)}
        most = max(most, sum(value.numel() * value.element_size() for value in held.values()))
    return most
