"""Thinning a network: which channels of each group go, and the weights of what reads the others, solved anew.

Everything happens at full width first: the weights that read a channel which goes become zero. So the network can be
measured with any choice, and what remains is cut out at the end without changing what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from compress.channels.groups import ChannelGroup
from compress.channels.on_demand import OnDemand
from compress.channels.readers import MOST_FEATURES, Energy, Loss, Reader, eliminate_units, error, losses
from compress.reconstruct import Normal

Order = Mapping[str, Tensor]  # group -> its units, the first to go first


@dataclass
class Thinning:
    """The groups of `model` that can be thinned, and the layers that read them, in the order of the forward pass.

    `pull` is the ridge towards the weights that were; `refit` false sets weights to zero and solves nothing.
    """

    model: nn.Module
    groups: Sequence[ChannelGroup]
    images: Sequence[Tensor]
    masks: Mapping[str, Tensor]
    pull: float
    refit: bool = True
    readers: dict[str, Reader] = field(init=False)
    errors: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        walk = OnDemand(self.model, [])
        names = {member.name for group in self.groups for member in group.of("in")}
        self.calls: dict[str, fx.Node] = {}
        for node in walk.nodes:
            if node.op == "call_module" and node.target in names:
                self.calls[str(node.target)] = node
        self.readers = {
            name: Reader(
                name,
                self.model.get_submodule(name),
                walk.norm_after(node),
                self.masks.get(name, self.masks.get(f"{name}.pointwise")),
            )
            for name, node in self.calls.items()
        }
        first = {
            group.name: min(list(self.calls).index(member.name) for member in group.of("in")) for group in self.groups
        }
        self.groups = sorted(self.groups, key=lambda group: first[group.name])
        self.reads = {
            name: [(group, member) for group in self.groups for member in group.of("in") if member.name == name]
            for name in self.readers
        }

    def alone(self, group: ChannelGroup) -> bool:
        """Whether a single layer reads the group, so that its channels can be chosen when it is that layer's turn."""
        return len(group.of("in")) == 1

    def _gone(self, reader: Reader, gone: Mapping[str, Tensor]) -> Tensor:
        """The features of a reader (groups, features) that belong to units which go."""
        result = torch.zeros(reader.groups, reader.features, dtype=torch.bool)
        for group, member in self.reads[reader.name]:
            for index, rows in reader.rows(member, group.units) if group.name in gone else ():
                result[index, rows[gone[group.name]].flatten()] = True
        return result

    def _solvable(self, reader: Reader) -> bool:
        return self.refit and reader.features <= MOST_FEATURES

    @property
    def too_wide(self) -> dict[str, str]:
        """The readers that are not solved anew, and why."""
        wide = {name: reader.features for name, reader in self.readers.items() if reader.features > MOST_FEATURES}
        return {name: f"{features} weights for each output are too many" for name, features in wide.items()}

    def equations(self, step: Callable[[str], None]) -> dict[str, Normal | Tensor]:
        """For each reader what it sees and gives in the network as it is; of very wide ones the inputs' energy."""
        walk = OnDemand(self.model, self.images)
        found: dict[str, Normal | Tensor] = {}
        for name, reader in self.readers.items():
            step(name)
            node = _same(walk, self.calls[name])
            x, y = walk.of(node.all_input_nodes[0]), walk.of(node)
            if reader.features <= MOST_FEATURES:
                found[name] = reader.normal(list(zip(x, y, strict=True)))
            else:
                found[name] = reader.energy(x)
        return found

    def _losses(self, name: str, group: ChannelGroup, normal: Normal | Tensor) -> Sequence[Loss | Energy]:
        reader = self.readers[name]
        member = next(member for each, member in self.reads[name] if each is group)
        if isinstance(normal, Tensor):
            return [Energy(reader, normal, member, group.units)]
        return losses(reader, normal, reader.columns(), member, group.units, self.pull)

    def order(self, group: ChannelGroup, equations: Mapping[str, Normal | Tensor]) -> Tensor:
        """All units of the group, those that are missed least first."""
        parts: list[Loss | Energy] = []
        for member in group.of("in"):
            parts += self._losses(member.name, group, equations[member.name])
        return eliminate_units(parts, group.units, 0)

    def harms(
        self,
        group: ChannelGroup,
        order: Tensor,
        counts: Sequence[int],
        equations: Mapping[str, Normal | Tensor],
        walk: OnDemand,
        wanted: Sequence[Tensor],
    ) -> dict[int, float]:
        """How far the answers are from `wanted` when of this group alone so many units are left.

        The squared difference, as a share of the squares: on images that the network was trained on it is sure of its
        answers, and their divergence hardly tells groups apart. Of a branch without channels the mean is left where
        layers behind it, solved anew, will make it good.
        """
        names = [name for name in self.readers if any(each is group for each, _ in self.reads[name])]
        walk.of(_same(walk, self.calls[names[0]]).all_input_nodes[0])
        found = {}
        for left in counts:
            with self._unchanged(names):
                for name in names:
                    gone = self._gone(self.readers[name], {group.name: order[: group.units - left]})
                    if left or (self._solvable(self.readers[name]) and name != next(reversed(self.readers))):
                        self._thin(self.readers[name], equations.get(name, torch.empty(0)), gone)
                    else:
                        self._without_solving(self.readers[name], gone)
                off = sum(float((x - y).square().sum()) for x, y in zip(walk.answers(), wanted, strict=True))
            found[left] = off / max(sum(float(y.square().sum()) for y in wanted), 1e-30)
        return found

    def _thin(self, reader: Reader, normal: Normal | Tensor, gone: Tensor) -> Tensor:
        start = reader.columns()
        if isinstance(normal, Normal) and self._solvable(reader):
            columns = reader.solved(normal, start, gone, self.pull)
        else:
            columns = start
            columns[:, : reader.features][gone] = 0
        reader.put(columns)
        return columns

    def _without_solving(self, reader: Reader, gone: Tensor) -> None:
        if bool(gone.all()):
            reader.silence()
        else:
            self._thin(reader, torch.empty(0), gone)

    @contextmanager
    def _unchanged(self, names: Sequence[str]) -> Iterator[None]:
        states = {name: self.readers[name].state() for name in names}
        try:
            yield
        finally:
            for name, state in states.items():
                self.readers[name].restore(state)

    def thin(
        self, original: nn.Module, order: Order, left: Mapping[str, int], choose: bool, step: Callable[[str], None]
    ) -> dict[str, Tensor]:
        """Zero what reads channels that go, reader after reader, each solved for what the original gave there.

        With `choose` the channels of groups with one reader are chosen anew, as the network thinned so far shows them.
        Gives back the units that go.
        """
        gone = {
            group.name: order[group.name][: group.units - left[group.name]]
            for group in self.groups
            if group.name in left and left[group.name] < group.units
        }
        if not (self.refit or choose):
            for reader in self.readers.values():
                self._without_solving(reader, self._gone(reader, gone))
            return gone
        now, then = OnDemand(self.model, self.images), OnDemand(original, self.images)
        pending = set(self.readers)
        for name, reader in self.readers.items():
            step(name)
            pending.discard(name)
            mine = [group for group, _ in self.reads[name] if group.name in gone]
            solvable = reader.features <= MOST_FEATURES and not bool(self._gone(reader, gone).all())
            if not solvable or not (mine or self.refit):
                self._without_solving(reader, self._gone(reader, gone))
                continue
            x, y = self._pairs(now, then, name, pending)
            normal = reader.normal(list(zip(x, y, strict=True)))
            for group in mine if choose else ():
                if self.alone(group) and len(mine) == 1:
                    parts = self._losses(name, group, normal)
                    gone[group.name] = eliminate_units(parts, group.units, left[group.name])
            columns = self._thin(reader, normal, self._gone(reader, gone))
            self.errors[name] = round(error(normal, columns), 4)
        return gone

    def _pairs(self, now: OnDemand, then: OnDemand, name: str, pending: set[str]) -> tuple[list[Tensor], list[Tensor]]:
        """What a layer sees now, and what it should give for the network to go on as the original did.

        Where its output is added to something else that is, to the sum: what has gone wrong in the other operand is
        made good too.
        """
        node, old = _same(now, self.calls[name]), _same(then, self.calls[name])
        inputs = now.of(node.all_input_nodes[0])
        plain = then.of(old)
        addition = now.addition(node)
        if addition is None or now.needs(addition[1], pending):
            return inputs, plain
        total, other = then.of(_same(then, addition[0])), now.of(addition[1])
        if any(a.shape != b.shape for a, b in zip(total, other, strict=True)):
            return inputs, plain
        wanted = [a - b for a, b in zip(total, other, strict=True)]
        norm = now.norm_after(node)
        if norm is not None:
            wanted = [_before(norm, y, usual) for y, usual in zip(wanted, plain, strict=True)]
        return inputs, wanted


def _before(norm: nn.Module, y: Tensor, usual: Tensor) -> Tensor:
    """What a batch norm has to be given to give `y`; where it hardly scales a channel, `usual`."""
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    shape = (1, -1, *[1] * (y.dim() - 2))
    scale = (norm.running_var + norm.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if norm.weight is not None:
        scale, shift = scale * norm.weight.detach(), norm.bias.detach()
    weak = scale.abs() < 1e-3 * scale.abs().max()
    x = (y - shift.view(shape)) / torch.where(weak, 1.0, scale).view(shape) + norm.running_mean.view(shape)
    return torch.where(weak.view(shape), usual, x)


def _same(walk: OnDemand, node: fx.Node) -> fx.Node:
    """The node of the same place in another walk over the same network."""
    same: fx.Node = next(each for each in walk.nodes if each.name == node.name)
    return same
