"""Copies that a shift layer can do without, and displacements that can be zero: what its output loses by each.

Backward elimination, exact at every step: a copy's worth is what the squared error rises by when it goes and the
weights of the others are solved anew (Hassibi and Stork, "Optimal Brain Surgeon", 1993). The equations stand in a swept
matrix, in which features leave and come back alike (Goodnight, "A Tutorial on the SWEEP Operator", 1979).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.channels.readers import Reader, error, pulled
from compress.nn.displace import Shift2d
from compress.nn.masked import MaskedWeight, mask_of, put_mask
from compress.nn.shift import ShiftConv2d
from compress.nn.taps import taps
from compress.reconstruct import Equations, Normal
from compress.refit import MOST_FEATURES
from compress.surgery import why_shared

AT_ONCE = 32  # images whose copies are in memory together

Seen = Iterable[tuple[Tensor, Tensor]]  # (input of a layer, wanted output), batch by batch


@torch.no_grad()
def equations(layer: ShiftConv2d, places: Tensor, seen: Seen, images: int, name: str = "") -> Normal:
    """The normal equations of a pointwise convolution over copies at `places` (C, K, 2), channel by channel."""
    width = layer.in_channels * places.shape[1]
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.in_channels, False)
    move = nn.Conv2d(layer.in_channels, width, *geometry, layer.padding_mode).to(places.device, places.dtype)  # type: ignore[arg-type]  # any text, checked when the layer was made
    move.weight.copy_(taps(places, layer.kernel_size).flatten(0, 1).unsqueeze(1))
    with torch.device("meta"):
        mix = nn.Conv2d(width, layer.out_channels, 1, groups=layer.groups)
    gathered = Equations(mix, images, layer.pointwise.bias is not None)
    for x, y in seen:
        for some, wanted in zip(torch.split(x, AT_ONCE), torch.split(y, AT_ONCE), strict=True):
            gathered.add(move(some), wanted)
    return gathered.normal(name)


class Sweep:
    """Least squares over the features that are `inside`; for the others, what they would bring.

    Inside, `matrix` is minus the inverse gram matrix and `weights` are the solution. Outside it is what the features
    inside do not explain of the gram matrix and of the cross products; of the latter nothing is left at the start,
    where the given weights are the solution.
    """

    def __init__(self, gram: Tensor, weights: Tensor, inside: Tensor) -> None:
        self.weights, self.matrix = weights.clone(), torch.empty_like(gram)
        a, b = inside.nonzero().flatten(), (~inside).nonzero().flatten()
        inverse = torch.linalg.inv(gram[a][:, a])
        across = inverse @ gram[a][:, b]
        self.matrix[a.unsqueeze(1), a] = -inverse
        self.matrix[a.unsqueeze(1), b] = across
        self.matrix[b.unsqueeze(1), a] = across.mT
        self.matrix[b.unsqueeze(1), b] = gram[b][:, b] - gram[b][:, a] @ across

    def pivot(self, feature: int) -> None:
        """A feature that is inside leaves, one that is outside comes in; all weights are the new solution."""
        pivot = float(self.matrix[feature, feature])
        column, own = self.matrix[:, feature].clone(), self.weights[feature].clone()
        self.matrix.addr_(column, column, alpha=-1 / pivot)
        self.weights.addr_(column, own, alpha=-1 / pivot)
        self.matrix[:, feature] = self.matrix[feature] = column / abs(pivot)
        self.matrix[feature, feature] = -1 / pivot
        self.weights[feature] = own / abs(pivot)

    def rises(self, features: int) -> Tensor:
        """By how much the squared error rises without each of the first `features`; of those outside, nonsense."""
        return self.weights[:features].square().sum(1) / -self.matrix.diagonal()[:features]

    def rises_by_moving(self, copies: Tensor, targets: Tensor) -> Tensor:
        """The same for `copies` (channels, so many) that are replaced by the feature `targets` (channels,), outside.

        Infinite where the others explain that feature, so that it brings nothing.
        """
        own, across = self.matrix.diagonal()[copies], self.matrix[copies, targets.unsqueeze(1)]
        weights = self.weights[copies]
        # What the target has that is not explained, and what it brings, once the copy is gone.
        left = self.matrix[targets, targets].unsqueeze(1) - across.square() / own
        bring = self.weights[targets].unsqueeze(1) - (across / own).unsqueeze(2) * weights
        rise = weights.square().sum(2) / -own - bring.square().sum(2) / left
        return torch.where(left > 0, rise, math.inf)


class Copies:
    """The copies of a settled layer, of which some go and some move to zero displacement; its weights as they follow.

    `alive` (channels, taps + 1) says which features the layer has; the last one of a channel is the channel as it is,
    not displaced, which takes part when a copy moves there. `error` is the squared error of the output, as a share of
    its sum of squares, as far as it is known: the pull of `ridge` to the old weights is in it. Every group of outputs
    keeps one copy at least.
    """

    def __init__(self, layer: ShiftConv2d, alive: Tensor, normal: Normal, ridge: float) -> None:
        reader = Reader("", layer, None)
        self.layer, self.bias, self.power = layer, reader.bias, max(float(normal.power.sum()), 1e-30)
        self.places, self.alive = places_with_zero(layer), F.pad(alive, (0, 1))
        self.before, self.moved, self.error = int(alive.sum()), 0, 0.0
        self.groups, self.channels = layer.groups, layer.in_channels // layer.groups
        columns = reader.columns()
        weights = columns[:, : reader.features].reshape(self.groups, self.channels, layer.taps, -1)
        weights = torch.cat((F.pad(weights, (0, 0, 0, 1)).flatten(1, 2), columns[:, reader.features :]), 1)
        inside = torch.cat((self._by_group(self.alive), torch.ones(self.groups, int(self.bias), dtype=torch.bool)), 1)
        self.sweeps = [
            Sweep(pulled(normal, group, weights[group], ridge)[0], weights[group], inside[group])
            for group in range(self.groups)
        ]
        self._next = [self._cheapest(group) for group in range(self.groups)]

    @property
    def left(self) -> int:
        """How many copies the layer has."""
        return int(self.alive.sum())

    @property
    def gone(self) -> int:
        """How many copies went."""
        return self.before - self.left

    def rise(self) -> float:
        """What the error rises by when the next copy goes; infinite where none may."""
        return min(self._next)[0]

    def drop(self) -> None:
        """The copy goes that costs least."""
        rise, feature, group = min(self._next)
        self.sweeps[group].pivot(feature)
        self._by_group(self.alive)[group, feature] = False
        self.error += rise
        self._next[group] = self._cheapest(group)

    def move_to_zero(self, limit: float) -> None:
        """Copies stop being displaced, the cheapest first, until the error has risen by `limit`.

        Where a channel is read as it is already, moving there would be dropping, and `drop` decides.
        """
        found, spent = [self._nearest(group) for group in range(self.groups)], 0.0
        while True:
            rise, feature, target, group = min(found)
            if not spent + rise <= limit:  # NaN stops it too
                return
            alive = self._by_group(self.alive)[group]
            for each in (feature, target):
                self.sweeps[group].pivot(each)
                alive[each] = ~alive[each]
            spent, self.error, self.moved = spent + rise, self.error + rise, self.moved + 1
            found[group] = self._nearest(group)

    def _by_group(self, each: Tensor) -> Tensor:
        return each.view(self.groups, -1)

    def _cheapest(self, group: int) -> tuple[float, int, int]:
        alive = self._by_group(self.alive)[group]
        if int(alive.sum()) < 2:
            return math.inf, 0, group
        rise, feature = self.sweeps[group].rises(len(alive)).masked_fill(~alive, math.inf).min(0)
        return float(rise) / self.power, int(feature), group

    def _nearest(self, group: int) -> tuple[float, int, int, int]:
        mine = slice(group * self.channels, (group + 1) * self.channels)
        alive, unmoved = self.alive[mine], ~self.places[mine].cpu().any(-1)
        features = torch.arange(alive.numel()).view_as(alive)
        first = features.gather(1, unmoved.int().argmax(1, keepdim=True)).flatten()
        free = alive & ~(alive & unmoved).any(1, keepdim=True)
        rises = self.sweeps[group].rises_by_moving(features, first).masked_fill(~free, math.inf)
        rise, feature = rises.flatten().min(0)
        return float(rise) / self.power, int(feature), int(first[feature // alive.shape[1]]), group

    @torch.no_grad()
    def rebuilt(self) -> tuple[ShiftConv2d, Tensor]:
        """A layer of the copies that are left, and which of its copies (channels, taps) those are.

        It has as many taps as the channel with the most copies; what other channels have beyond theirs weighs nothing.
        """
        layer, each = self.layer, max(1, int(self.alive.sum(1).max()))
        order = (~self.alive).int().argsort(dim=1, stable=True)[:, :each]
        stays = self.alive.gather(1, order)
        new = ShiftConv2d(**{**layer.config(), "taps": each, "learn": False})
        new = new.to(layer.pointwise.weight.device, layer.pointwise.weight.dtype)
        places = self.places.gather(1, order.to(self.places.device).unsqueeze(-1).expand(-1, -1, 2))
        new.displacement.copy_(_with_free_places(new, places, stays))
        columns = torch.stack([sweep.weights for sweep in self.sweeps])
        features = self.alive.shape[1] * self.channels
        weights = columns[:, :features].view(self.groups, self.channels, self.alive.shape[1], -1)
        order = order.view(self.groups, self.channels, each, 1).expand(-1, -1, -1, weights.shape[-1])
        kept = weights.gather(2, order) * stays.view(self.groups, self.channels, each, 1)
        Reader("", new, None).put(torch.cat((kept.flatten(1, 2), columns[:, features:]), 1))
        return new, stays


def why_kept(layer: nn.Module, shared: Collection[int]) -> str:
    """Why the displacements of a layer are left alone; "" where they are not. `shared` are tied parameters, by `id`."""
    assert isinstance(layer, ShiftConv2d | Shift2d)
    if not layer.quantize and (layer.learn or not layer.integer):
        return "it moves by parts of pixels; `ConvertShift`, or `quantize: true` in `Shift`, makes that whole pixels"
    if why := why_shared(layer, shared):
        return why
    if isinstance(layer, Shift2d):
        return ""
    if parametrize.is_parametrized(layer.pointwise, "weight"):
        masked = mask_of(layer.pointwise)
        if masked is None or len(layer.pointwise.parametrizations.weight) > 1:  # type: ignore[union-attr,arg-type]  # untyped
            return "its weight is parametrized by something that copies cannot be taken out of"
        by_output = masked.mask.view(layer.groups, layer.out_channels // layer.groups, -1)
        if masked.steps or not torch.equal(by_output.any(1), by_output.all(1)):
            return "single weights of it are pruned; put `PruneShifts` before `Prune`"
    if not bool(layer.pointwise.weight.any()):
        return "all its weights are zero; train it first"
    features = (layer.taps + 1) * layer.in_channels // layer.groups
    return f"{features} copies and channels for each output are too many" if features > MOST_FEATURES else ""


def alive_copies(layer: ShiftConv2d) -> Tensor:
    """The copies (channels, taps) of a layer that no mask holds at zero."""
    masked = mask_of(layer.pointwise)
    if masked is None:
        return torch.ones(layer.in_channels, layer.taps, dtype=torch.bool)
    return masked.mask[:: layer.out_channels // layer.groups].reshape(layer.in_channels, layer.taps).cpu()


def places_with_zero(layer: ShiftConv2d) -> Tensor:
    """The displacements of a layer's copies, and after them, for every channel, none: (channels, taps + 1, 2)."""
    return F.pad(layer._inside().detach(), (0, 0, 0, 1))


def _with_free_places(layer: ShiftConv2d, places: Tensor, stays: Tensor) -> Tensor:
    """`places` with those of copies that are gone set to free ones, for which the window need not be wider."""
    grid, stays = layer._grid().to(places), stays.to(places.device)
    used = ((places.unsqueeze(2) == grid).all(-1) & stays.unsqueeze(-1)).any(1)
    far = grid.square().sum(1) + used.any(0).logical_not() * 2 * grid.square().sum(1).max()
    free = far.expand(len(used), -1).masked_fill(used, math.inf).argsort(dim=1, stable=True)
    which = ((~stays).cumsum(1) - 1).clamp(min=0)
    return torch.where(stays.unsqueeze(-1), places, grid[free.gather(1, which)])


def refit(layer: ShiftConv2d, stays: Tensor, seen: Seen, images: int, ridge: float) -> float:
    """Solve the weights of the copies that stay (channels, taps), pulled to what they are; the others become a mask.

    Gives back the squared error of the output as a share of the wanted one's sum of squares.
    """
    reader = Reader("", layer, None)
    normal = equations(layer, layer.displacement.detach(), seen, images)
    columns = reader.solved(normal, reader.columns(), ~stays.view(layer.groups, -1), ridge)
    reader.put(columns)
    if not bool(stays.all()):
        by_output = stays.view(layer.groups, 1, -1).expand(-1, layer.out_channels // layer.groups, -1)
        weight = layer.pointwise.weight
        put_mask(layer.pointwise, MaskedWeight(), by_output.reshape(weight.shape).to(weight.device))
    return error(normal, columns)


@torch.no_grad()
def changes_by_staying(layer: Shift2d, seen: Seen) -> Tensor:
    """For each channel the squared change of its map if it were not displaced, as a share of the map's squares."""
    change = power = torch.zeros(layer.channels, dtype=torch.float64)
    for x, y in seen:
        apart = x[..., :: layer.stride, :: layer.stride] - y
        change, power = (
            total + part.double().square().sum((0, 2, 3)).cpu() for total, part in ((change, apart), (power, y))
        )
    return change / power.clamp(min=1e-30)


def drop_while(copies: Iterable[Copies], goes_on: Callable[[Copies], bool]) -> None:
    """Over all layers, drop the copy that costs its layer least, as long as that is wanted."""
    each = list(copies)
    while each:
        cheapest = min(each, key=Copies.rise)
        if not goes_on(cheapest):
            return
        cheapest.drop()
