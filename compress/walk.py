"""A network executed one operation after the other, over all images, and no further than it is asked for.

A method that changes layer after layer wants to see each of them in the network as changed so far. Running the network
anew for every layer computes the first ones again and again; here each operation is computed once.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress.nn.places import executed

MOST_BYTES = 2**32  # of tensors that wait to be read; with more, the network is better run anew


class Walk:
    """Where the images have come to in `model`, whose layers may be replaced as long as they were not passed yet.

    Raises:
        ValueError: the model cannot be traced, or what it holds at a time for so many images is too large.
    """

    def __init__(self, model: nn.Module, images: Sequence[Tensor]) -> None:
        self.model, self.images = model, images
        self.nodes = list(executed(model).nodes)
        place = {node: at for at, node in enumerate(self.nodes)}
        self.done: dict[int, list[fx.Node]] = {}  # after which operation what is not needed any more
        for node in self.nodes:
            self.done.setdefault(max((place[user] for user in node.users), default=place[node]), []).append(node)
        self.known: list[dict[fx.Node, Any]] = [{} for _ in images]
        self.position = 0
        self.layout = torch.channels_last  # in which convolutions take less time
        try:
            held = self._held()
        except RuntimeError:  # a forward that takes views of its maps wants them in the plain layout
            self.layout = torch.contiguous_format
            held = self._held()
        total = held * sum(map(len, images))
        if total > MOST_BYTES:
            raise ValueError(f"{total:,} bytes of tensors at a time are too many")

    def inputs(self, layer: nn.Module) -> list[Tensor] | None:
        """What `layer` gets for each batch of images; None where it was passed already, or is not called."""
        at = self._find(layer)
        if at is None:
            return None
        self._advance(at)
        source = self.nodes[at].args[0] if self.nodes[at].args else None
        return [known[source] for known in self.known] if isinstance(source, fx.Node) else None

    def outputs(self, layer: nn.Module) -> list[Tensor] | None:
        """What `layer` gives for each batch of images; None where that was read already, or it is not called."""
        at = self._find(layer)
        if at is None:
            return None
        self._advance(at + 1)
        return [known[self.nodes[at]] for known in self.known]

    def _find(self, layer: nn.Module) -> int | None:
        """Where the layer is called, if it is not too late: at the place reached, or the one before."""
        for at in range(max(self.position - 1, 0), len(self.nodes)):
            node = self.nodes[at]
            if node.op == "call_module" and self.model.get_submodule(str(node.target)) is layer:
                return at
        return None

    def _advance(self, end: int) -> None:
        with torch.no_grad():
            while self.position < end:
                for known, batch in zip(self.known, self.images, strict=True):
                    self._execute(self.position, known, batch)
                self.position += 1

    def _execute(self, at: int, known: dict[fx.Node, Any], batch: Tensor) -> None:
        if at:
            for node in self.done.get(at - 1, ()):  # not sooner, so that the last output can be asked for again
                known.pop(node, None)
        node = self.nodes[at]
        args, kwargs = (fx.map_arg(given, known.__getitem__) for given in (node.args, node.kwargs))
        if node.op == "placeholder":
            known[node] = batch.contiguous(memory_format=self.layout)
        elif node.op == "get_attr":
            known[node] = reduce(getattr, str(node.target).split("."), self.model)
        elif node.op == "call_module":
            known[node] = self.model.get_submodule(str(node.target))(*args, **kwargs)
        elif node.op == "call_method":
            known[node] = operator.methodcaller(str(node.target), *args[1:], **kwargs)(args[0])
        elif node.op == "call_function":
            assert callable(node.target)
            known[node] = node.target(*args, **kwargs)

    def _held(self) -> int:
        """How many bytes one image holds at a time at most."""
        known: dict[fx.Node, Any] = {}
        most = 0
        with torch.no_grad():
            for at in range(len(self.nodes)):
                self._execute(at, known, self.images[0][:1])
                held = {id(value): value for value in known.values() if isinstance(value, Tensor)}
                most = max(most, sum(value.numel() * value.element_size() for value in held.values()))
        return most
