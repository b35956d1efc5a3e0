"""The layers that read channels: what they would lose with each of them, and their weights solved without.

A reader mixes its input channels by weights. When some of them go, the weights of the others are solved by least
squares, so that the layer comes as near as it can to what it gave before; what a channel is worth is what the error
rises by after that. He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, choose
by LASSO; here it is backward elimination, exact at every step, as Hassibi and Stork's "Optimal Brain Surgeon" (1993).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.channels.groups import Member
from compress.nn.shift import ShiftConv2d
from compress.nn.taps import taps
from compress.reconstruct import Equations, Normal
from compress.refit import on_supports
from compress.substitute import as_map

MOST_FEATURES = 5000  # above this the equations take gigabytes


class Reader:
    """A layer that mixes its input channels, as its weights' columns: (groups, features, outputs / groups).

    Features are the window positions (of a shift layer: the copies) channel by channel, and last, with `bias`, a
    constant; it goes to the layer's own bias or, where there is none, to the statistics of the batch norm behind it.
    """

    def __init__(self, name: str, layer: nn.Module, norm: nn.Module | None, mask: Tensor | None = None) -> None:
        self.name, self.layer, self.norm, self.mask = name, layer, norm, mask
        self.holder: nn.Conv2d | nn.Linear = layer.pointwise if isinstance(layer, ShiftConv2d) else layer  # type: ignore[assignment]  # torch types modules and tuples loosely
        self.groups = self.holder.groups if isinstance(self.holder, nn.Conv2d) else 1
        self.bias = self.holder.bias is not None or norm is not None
        self.channels = int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)  # type: ignore[arg-type]  # torch types modules and tuples loosely
        self.each = self.holder.weight[0].numel() * self.groups // self.channels

    @property
    def features(self) -> int:
        return self.channels // self.groups * self.each

    def columns(self) -> Tensor:
        """The weights (and bias) as they are."""
        weight = self.holder.weight.detach().cpu().double()
        columns = weight.reshape(self.groups, len(weight) // self.groups, -1).mT
        if not self.bias:
            return columns
        bias = self.holder.bias if self.holder.bias is not None else weight.new_zeros(len(weight))
        return torch.cat((columns, bias.detach().cpu().double().view(self.groups, 1, -1)), 1)

    @torch.no_grad()
    def put(self, columns: Tensor) -> None:
        """Take these weights; a constant that the layer has no bias for moves the norm's mean."""
        if self.bias:
            constant = columns[:, -1].flatten()
            if self.holder.bias is not None:
                self.holder.bias.copy_(constant)
            else:
                assert self.norm is not None
                self.norm.running_mean -= constant.to(self.norm.running_mean)  # type: ignore[operator,arg-type]  # a tensor
            columns = columns[:, :-1]
        self.holder.weight.copy_(columns.mT.reshape(self.holder.weight.shape))

    def normal(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Normal:
        """The normal equations for these (input, wanted output) batches."""
        equations = Equations(self._geometry(), sum(len(x) for x, _ in pairs), self.bias)
        for x, y in pairs:
            equations.add(*((as_map(x), as_map(y)) if isinstance(self.layer, nn.Linear) else (x, y)))
        normal = equations.normal(self.name)
        return self._of_copies(normal) if isinstance(self.layer, ShiftConv2d) else normal

    def energy(self, inputs: Sequence[Tensor]) -> Tensor:
        """The mean square of every input channel."""
        axes = [
            a for a in range(inputs[0].dim()) if a != (inputs[0].dim() - 1 if isinstance(self.layer, nn.Linear) else 1)
        ]
        return sum((x.double().square().mean(axes) * len(x) for x in inputs), torch.zeros(())) / sum(map(len, inputs))

    @torch.no_grad()
    def silence(self) -> None:
        """Make it and the batch norm behind it give zero, where none of the channels that it reads is left."""
        for tensor in self._changing():
            tensor.zero_()

    def state(self) -> tuple[Tensor, ...]:
        """What `put` and `silence` change, to `restore` it."""
        return tuple(tensor.detach().clone() for tensor in self._changing())

    @torch.no_grad()
    def restore(self, state: tuple[Tensor, ...]) -> None:
        for tensor, value in zip(self._changing(), state, strict=True):
            tensor.copy_(value)

    def _changing(self) -> list[Tensor]:
        tensors = [self.holder.weight, self.holder.bias]
        if self.norm is not None:
            tensors += [getattr(self.norm, name) for name in ("weight", "bias", "running_mean")]
        return [tensor for tensor in tensors if tensor is not None]

    def _geometry(self) -> nn.Conv2d:
        if isinstance(self.layer, nn.Conv2d):
            return self.layer
        with torch.device("meta"):
            if isinstance(self.layer, nn.Linear):
                return nn.Conv2d(self.layer.in_features, self.layer.out_features, 1)
            assert isinstance(self.layer, ShiftConv2d)
            s = self.layer
            more = {"groups": s.groups, "padding_mode": s.padding_mode}
            return nn.Conv2d(s.in_channels, s.out_channels, s.kernel_size, s.stride, s.padding, s.dilation, **more)  # type: ignore[arg-type]  # torch types modules and tuples loosely

    def _of_copies(self, normal: Normal) -> Normal:
        """From window positions to a shift layer's copies, each a sum of positions."""
        layer = self.layer
        assert isinstance(layer, ShiftConv2d)
        places = taps(layer._inside(), layer.kernel_size, layer.quantize).detach().cpu().double().flatten(2)
        places = places.view(self.groups, -1, *places.shape[1:])
        constant = [places.new_ones(1, 1)] if self.bias else []
        maps = torch.stack([torch.block_diag(*group, *constant) for group in places])  # type: ignore[no-untyped-call]  # in torch
        return Normal(maps @ normal.gram @ maps.mT, maps @ normal.cross, normal.power, normal.bias)

    def rows(self, member: Member, units: int) -> list[tuple[int, Tensor]]:
        """For each of the layer's groups, the features (units, so many) of every unit of a group of channels."""
        per_group = self.channels // self.groups
        found = []
        for group in range(self.groups):
            here = (member.index // per_group) == group
            if bool(here.any()):
                order = member.units[here].argsort(stable=True)
                local = (member.index[here] % per_group)[order].view(units, -1)
                rows = local.unsqueeze(-1) * self.each + torch.arange(self.each)
                found.append((group, rows.flatten(1)))
        return found

    def solved(self, normal: Normal, start: Tensor, gone: Tensor, ridge: float) -> Tensor:
        """The least-squares weights that are zero at the features `gone` (groups, features), pulled to `start`."""
        if self.mask is not None:
            mask = self.mask.cpu().reshape(self.groups, len(self.mask) // self.groups, -1).mT
            support = mask & ~gone.unsqueeze(-1)
            if self.bias:
                support = torch.cat((support, torch.ones_like(support[:, :1])), 1)
            return on_supports(normal, start, support, ridge)
        result = torch.zeros_like(start)
        for group in range(self.groups):
            gram, cross = pulled(normal, group, start[group], ridge)
            kept = torch.cat((~gone[group], torch.ones(int(self.bias), dtype=torch.bool))).nonzero().flatten()
            result[group, kept] = torch.linalg.solve(gram[kept][:, kept], cross[kept])
        return result


def pulled(normal: Normal, group: int, start: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Gram matrix and cross products with the pull to `start`, a share of the mean diagonal; never quite nothing."""
    gram = normal.gram[group]
    pull = ((ridge + 1e-12) * gram.diagonal().mean()).clamp(min=1e-30)
    return gram + pull * torch.eye(len(gram), dtype=gram.dtype), normal.cross[group] + pull * start


def error(normal: Normal, columns: Tensor) -> float:
    """Sum of squared errors, as a share of the wanted outputs' sum of squares."""
    explained = (columns * (2 * normal.cross - normal.gram @ columns)).sum()
    return float((normal.power.sum() - explained).clamp(min=0) / normal.power.sum().clamp(min=1e-30))


@dataclass
class Loss:
    """What a reader's group of outputs loses as features leave: weights solved for those left, and the inverse gram."""

    inverse: Tensor
    weights: Tensor
    rows: Tensor  # (units, features of each)
    scale: float

    def rise(self, alive: Tensor) -> Tensor:
        """By how much the squared error rises when one of the units `alive` goes, for each of them."""
        rows = self.rows[alive]
        inside = self.inverse[rows.unsqueeze(2), rows.unsqueeze(1)]
        weights = self.weights[rows]
        rise: Tensor = (weights * torch.linalg.solve(inside, weights)).sum((1, 2)) / self.scale
        return rise

    def leave(self, units: Tensor) -> None:
        rows = self.rows[units].flatten()
        columns = torch.linalg.solve(self.inverse[rows][:, rows], self.inverse[rows])
        self.weights = self.weights - columns.mT @ self.weights[rows]
        self.inverse = self.inverse - self.inverse[:, rows] @ columns


def losses(reader: Reader, normal: Normal, start: Tensor, member: Member, units: int, ridge: float) -> list[Loss]:
    """One `Loss` for each group of the reader's outputs that reads the units."""
    scale = max(float(normal.power.sum()), 1e-30)
    found = []
    for group, rows in reader.rows(member, units):
        gram, cross = pulled(normal, group, start[group], ridge)
        inverse = torch.linalg.inv(gram)
        found.append(Loss(inverse, inverse @ cross, rows, scale))
    return found


class Energy:
    """What a very wide reader loses, taken for itself: the inputs' energy times that of the weights they meet."""

    def __init__(self, reader: Reader, energy: Tensor, member: Member, units: int) -> None:
        weight = reader.holder.weight.detach().double()
        whole = weight.reshape(reader.groups, len(weight) // reader.groups, -1, reader.each).square().sum((1, 3))
        each = energy.cpu() * whole.flatten().cpu()
        each = each / each.sum().clamp(min=1e-30)
        self.each = torch.zeros(units, dtype=each.dtype).index_add_(0, member.units, each[member.index])

    def rise(self, alive: Tensor) -> Tensor:
        return self.each[alive]

    def leave(self, units: Tensor) -> None:
        """The others are worth what they were."""


def eliminate_units(parts: Sequence[Loss | Energy], units: int, leave: int) -> Tensor:
    """Units in the order in which they go, those that the readers miss least first, until `leave` are left."""
    alive = torch.arange(units)
    order: list[int] = []
    while len(alive) > leave:
        rise = torch.stack([part.rise(alive) for part in parts]).sum(0)
        at_once = min(max(1, len(alive) // 64), len(alive) - leave)
        going = alive[rise.nan_to_num(math.inf).argsort(stable=True)[:at_once]]
        for part in parts:
            part.leave(going)
        order += going.tolist()
        alive = alive[~torch.isin(alive, going)]
    return torch.tensor(order, dtype=torch.long)
