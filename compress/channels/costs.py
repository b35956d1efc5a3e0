"""What a network costs when some of its channels are gone, from its layers' widths alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.channels.branches import Branches
from compress.channels.groups import ChannelGroup
from compress.measure import counted
from compress.nn.displace import Shift2d
from compress.nn.shift import ShiftConv2d
from compress.surgery import layers

MEASURES = ("macs", "params", "bytes")
_KINDS = (nn.Conv2d, nn.Linear, ShiftConv2d, Shift2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU)


@dataclass(frozen=True)
class _Layer:
    """`weights` numbers in all go with (inputs x outputs), `of_inputs` and `of_outputs` with each side alone.

    A layer whose channels pass through one by one has outputs only. `buffers` are bytes that go with the outputs.
    """

    weights: int
    of_inputs: int
    of_outputs: int
    positions: int
    buffers: int = 0


class Costs:
    """MACs, parameters or bytes (of parameters and buffers, as they are in memory) by how many units are left.

    Of `branches`, where the group has no unit left, nothing inside has.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        example: Tensor,
        measure: str,
        branches: Branches | None = None,
    ) -> None:
        self.measure, self.branches = measure, branches or {}
        places: dict[int, int] = {}

        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(module, Shift2d):
                each = module.macs(tuple(inputs[0].shape)) // module.displacement.numel()
                places[id(module)] = places.get(id(module), 0) + each
                return
            made = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
            places[id(module)] = places.get(id(module), 0) + output[0].numel() // made

        found = layers(model, _KINDS)
        hooks = [module.register_forward_hook(see) for module in found.values()]
        try:
            with torch.no_grad():
                model(example)
        finally:
            for hook in hooks:
                hook.remove()
        self.layers = {name: _described(module, places.get(id(module), 0)) for name, module in found.items()}
        self.groups = {group.name: group for group in groups}
        # Layer -> for both sides, how many of its channels each unit of a group has, as a share of all of them.
        self.shares: dict[str, dict[str, list[tuple[str, float]]]] = {name: {"in": [], "out": []} for name in found}
        for group in groups:
            for member in group.members if not group.why else ():
                side = "in" if member.side == "in" else "out"
                size = _width(found[member.name], side) if member.name in found else 0
                if size:
                    share = len(member.index) / group.units / size
                    self.shares[member.name][side].append((group.name, share))
        self.rest = 0
        self.rest = counted(model, example)[measure] - self.total({})

    def total(self, left: Mapping[str, int]) -> int:
        """The cost when of these groups so many units are left, of the others all."""
        out = {layer for name, branch in self.branches.items() if left.get(name) == 0 for layer in branch.own}
        left, total = self.emptied(left), float(self.rest)
        for name, layer in self.layers.items():
            if name in out:
                continue
            inputs, outputs = (self._left(name, side, left) for side in ("in", "out"))
            if self.measure == "macs":
                total += layer.positions * layer.weights * inputs * outputs
                continue
            numbers = layer.weights * inputs * outputs + layer.of_inputs * inputs + layer.of_outputs * outputs
            total += numbers if self.measure == "params" else 4 * numbers + layer.buffers * outputs
        return round(total)

    def emptied(self, left: Mapping[str, int]) -> dict[str, int]:
        """`left`, with no unit in the groups inside a branch that goes."""
        gone = [inner for name, branch in self.branches.items() if left.get(name) == 0 for inner in branch.inner]
        return {**left, **dict.fromkeys(gone, 0)}

    def _left(self, name: str, side: str, left: Mapping[str, int]) -> float:
        return 1 - sum(
            share * (self.groups[group].units - left[group])
            for group, share in self.shares[name][side]
            if group in left
        )


def _described(module: nn.Module, positions: int) -> _Layer:
    if isinstance(module, ShiftConv2d):
        bias = 0 if module.pointwise.bias is None else module.out_channels
        return _Layer(module.pointwise.weight.numel(), module.displacement.numel(), bias, positions)
    if isinstance(module, Shift2d):
        return _Layer(module.displacement.numel(), 0, 0, positions)
    if isinstance(module, nn.Conv2d | nn.Linear):
        return _Layer(module.weight.numel(), 0, 0 if module.bias is None else module.bias.numel(), positions)
    if isinstance(module, nn.PReLU):
        return _Layer(0, 0, module.num_parameters if module.num_parameters > 1 else 0, 0)
    affine = sum(parameter.numel() for parameter in module.parameters())
    return _Layer(0, 0, affine, 0, sum(4 * b.numel() for b in module.buffers() if b.dim()))


def _width(module: nn.Module, side: str) -> int:
    names = {"in": ("in_channels", "in_features"), "out": ("out_channels", "out_features", "num_features", "channels")}[
        side
    ]
    if isinstance(module, nn.PReLU):
        return module.num_parameters if module.num_parameters > 1 else 0
    return int(next(getattr(module, name) for name in names if hasattr(module, name)))
