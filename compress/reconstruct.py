"""Starting a new operator from trained weights: layer by layer, by least squares on real activations.

A method chooses a structure (which taps, which rank, which channels); what is left is linear, and is solved so that
the new layer, fed with what the network as compressed so far gives it, comes as near as it can to the output that the
original layer had in the original network. Errors of earlier layers are thereby made good by later ones.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import DataError
from compress.gram import gram as gram_of
from compress.surgery import describe
from compress.task import Batches
from compress.walk import Walk
from compress.windows import windows, windows_at

ROWS = 1 << 19  # at most so many (image, position) pairs a layer: more change nothing but the time


class _Stop(Exception):
    """Ends a forward pass once the layer has been seen."""


def execution_order(model: nn.Module, layers: dict[str, nn.Module], example: Tensor) -> dict[str, int]:
    """The layers that a forward pass reaches, in that order, with how often each is called."""
    calls: dict[str, int] = {}
    names = {id(layer): name for name, layer in layers.items()}

    def count(module: nn.Module, *_: object) -> None:
        name = names[id(module)]
        calls[name] = calls.get(name, 0) + 1

    hooks = [layer.register_forward_hook(count) for layer in layers.values()]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def seen_by(model: nn.Module, layer: nn.Module, calls: int, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Inputs and outputs of `layer` in a forward pass of `model`, one pair for each of its `calls`."""
    pairs: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pairs.append((inputs[0].detach(), output.detach()))
        if len(pairs) == calls:
            raise _Stop

    hook = layer.register_forward_hook(keep)
    try:
        with torch.no_grad():
            model(images)
    except _Stop:
        pass
    finally:
        hook.remove()
    return pairs


def plain_images(batches: Batches, images: int, device: torch.device) -> list[Tensor]:
    """The first `images` images of `batches`, still in batches, on `device`."""
    taken, left = [], images
    for x, _ in batches:
        taken.append(x[:left].to(device))
        left -= len(taken[-1])
        if left <= 0:
            break
    return taken


class Pairs:
    """What a layer sees in the network as compressed so far, and what the original one gave, image batch by batch.

    Layers that are asked for in the order of the forward pass cost one pass together; others, or those of a network
    that cannot be traced, one each.
    """

    def __init__(self, model: nn.Module, original: nn.Module, images: Sequence[Tensor]) -> None:
        self.model, self.original, self.images = model, original, images
        self._walks: tuple[Walk, Walk] | None = None
        self._tried = False

    def of(self, layer: nn.Module, original: nn.Module, calls: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(input of `layer` in the model, output of `original` in the original model)."""
        walked = self._walked(layer, original) if calls == 1 else None
        if walked is not None:
            yield from walked
            return
        for batch in self.images:
            now = seen_by(self.model, layer, calls, batch)
            then = seen_by(self.original, original, calls, batch)
            for (x, _), (_, y) in zip(now, then, strict=True):
                yield x, y

    def _walked(self, layer: nn.Module, original: nn.Module) -> list[tuple[Tensor, Tensor]] | None:
        if not self._tried:
            self._tried = True
            with contextlib.suppress(ValueError):
                self._walks = Walk(self.model, self.images), Walk(self.original, self.images)
        if self._walks is None:
            return None
        inputs, outputs = self._walks[0].inputs(layer), self._walks[1].outputs(original)
        return None if inputs is None or outputs is None else list(zip(inputs, outputs, strict=True))


@dataclass(frozen=True)
class Normal:
    """Normal equations of a convolution, per group: `gram` (G, F, F) and `cross` (G, F, O / G), in float64.

    All on the CPU: they are small, and solving in float64 is what the CPU is for.

    Features are the input's window positions, F = channels per group x positions, channel by channel; with `bias`
    there is one more, which is always 1. `power` (G,) is the sum of squares of the targets.
    """

    gram: Tensor
    cross: Tensor
    power: Tensor
    bias: bool


class Equations:
    """Gathers the normal equations that fit a convolution of `layer`'s geometry to (input, wanted output) pairs.

    Of every pair a fixed random choice of output positions is used, so that about `rows` rows come together over
    `images` images. With `bias` a constant joins the features.
    """

    def __init__(self, layer: nn.Conv2d, images: int, bias: bool, rows: int = ROWS) -> None:
        self.layer, self.bias = layer, bias
        self.wanted = max(1, math.ceil(rows / images))
        self.generator = torch.Generator().manual_seed(0)
        self.parts: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in one batch: the layer's input (N, C, H, W) and the output wanted for it."""
        layer, targets = self.layer, y.flatten(2)
        positions = targets.shape[-1]
        if self.wanted < positions:
            chosen = torch.randperm(positions, generator=self.generator)[: self.wanted].to(x.device)
            rows, targets = windows_at(layer, x, chosen, y.shape[-1]), targets[..., chosen]
        else:
            rows = windows(layer, x)
        a, b = _by_group(rows, layer.groups), _by_group(targets, layer.groups)
        if self.bias:
            a = torch.cat((a, a.new_ones(a.shape[0], 1, a.shape[2])), 1)
        parts = [part.cpu().double() for part in (gram_of(a), a @ b.mT, b.square().sum((1, 2)))]
        self.parts = [mine + more for mine, more in zip(self.parts, parts, strict=True)] if self.parts else parts

    def normal(self, name: str = "") -> Normal:
        """What has come together, for the layer of this name.

        Raises:
            DataError: there is NaN or infinity in it.
        """
        if not self.parts:
            raise ValueError("no pairs to fit to")
        require_finite(name or describe(self.layer), *self.parts)
        gram, cross, power = self.parts
        return Normal(gram, cross, power, self.bias)


def require_finite(name: str, *gathered: Tensor) -> None:
    """Raise `DataError` where there is NaN or infinity in what calibration images gave at the layer of this name."""
    if not all(bool(each.isfinite().all()) for each in gathered):
        raise DataError(f"calibration met NaN or infinity at `{name}`; the model's weights or the images are broken.")


def normal_equations(
    layer: nn.Conv2d, pairs: Iterable[tuple[Tensor, Tensor]], images: int, bias: bool, rows: int = ROWS, name: str = ""
) -> Normal:
    """The normal equations that fit a convolution of this geometry to (input, wanted output) pairs; see `Equations`."""
    equations = Equations(layer, images, bias, rows)
    for x, y in pairs:
        equations.add(x, y)
    return equations.normal(name)


def own_equations(
    model: nn.Module, found: Mapping[str, nn.Conv2d], calls: Mapping[str, int], images: Sequence[Tensor]
) -> dict[str, Normal]:
    """For each layer, called so often, the normal equations whose solution is its own weights; in one pass."""
    total = sum(len(batch) for batch in images)
    each = {name: Equations(layer, calls[name] * total, layer.bias is not None) for name, layer in found.items()}

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: each[name].add(inputs[0].detach(), output.detach())

    hooks = [layer.register_forward_hook(add(name)) for name, layer in found.items()]
    try:
        with torch.no_grad():
            for batch in images:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: equations.normal(name) for name, equations in each.items()}


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(N, C, L) -> (groups, C / groups, N * L)."""
    return x.view(len(x), groups, -1, x.shape[-1]).permute(1, 2, 0, 3).flatten(2)


def solve_kept(normal: Normal, group: int, keep: Tensor, ridge: float) -> Tensor:
    """The least-squares weights (len(keep), O / G) of the features `keep` alone; the ridge is that of all features."""
    gram = normal.gram[group]
    weights: Tensor = torch.linalg.solve((gram + _ridge(gram, ridge))[keep][:, keep], normal.cross[group][keep])
    return weights


def _ridge(gram: Tensor, ridge: float) -> Tensor:
    """What is added to a gram matrix (..., F, F): a share of its mean diagonal, and never quite nothing."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return ((ridge + 1e-12) * mean).clamp(min=1e-30) * torch.eye(gram.shape[-1], dtype=gram.dtype)


def eliminate(normal: Normal, group: int, positions: int, taps: int, ridge: float) -> tuple[Tensor, Tensor]:
    """Choose `taps` of the `positions` of each input channel by backward elimination, and solve for their weights.

    Starting from all positions, the one whose removal raises the least-squares error least is taken away, until every
    channel has `taps` left; the inverse of the gram matrix is updated as positions leave.

    Returns:
        the kept positions (channels, taps) in rising order, and the weights (channels * taps [+ 1], O / G).
    """
    gram, cross = normal.gram[group], normal.cross[group]
    size = len(gram)
    features = size - 1 if normal.bias else size
    channels = features // positions
    inverse = torch.linalg.inv(gram + _ridge(gram, ridge))
    weights = inverse @ cross
    alive = torch.ones(channels, positions, dtype=torch.bool)
    at_once = max(1, features // 1024)  # of different channels; one at a time in all but very wide layers
    while bool((alive.sum(1) > taps).any()):
        rise = weights[:features].square().sum(1) / inverse.diagonal()[:features]
        rise = rise.view(channels, positions).masked_fill(~alive | (alive.sum(1, keepdim=True) <= taps), math.inf)
        best, position = rise.min(1)
        candidates = best.argsort()[:at_once]
        candidates = candidates[best[candidates] < math.inf]
        leaving = candidates * positions + position[candidates]
        alive[candidates, position[candidates]] = False
        columns = torch.linalg.solve(inverse[leaving][:, leaving], inverse[leaving])  # (m, size)
        weights = weights - columns.mT @ weights[leaving]
        inverse = inverse - inverse[:, leaving] @ columns
    kept = alive.nonzero()[:, 1].view(channels, taps)
    rows = (torch.arange(channels).unsqueeze(1) * positions + kept).flatten()
    if normal.bias:
        rows = torch.cat((rows, torch.tensor([features])))
    return kept, weights[rows]


def solve(normal: Normal, ridge: float) -> Tensor:
    """The least-squares weights (G, F, O / G), with `ridge` times the mean diagonal added to the diagonal."""
    weights: Tensor = torch.linalg.solve(normal.gram + _ridge(normal.gram, ridge), normal.cross)
    return weights


@torch.no_grad()
def fit_convolution(layer: nn.Conv2d, pairs: Iterable[tuple[Tensor, Tensor]], images: int, ridge: float) -> float:
    """Set the weights and bias of `layer` by least squares to (input, wanted output) pairs over `images` images.

    Gives back the squared error as a share of the wanted outputs' sum of squares.
    """
    return set_solution(layer, normal_equations(layer, pairs, images, bias=layer.bias is not None), ridge)


@torch.no_grad()
def set_solution(layer: nn.Conv2d, normal: Normal, ridge: float) -> float:
    """Set the weights and bias of `layer` to the least-squares ones; gives back the error as `fit_convolution` does."""
    weights = solve(normal, ridge)
    everything = torch.arange(weights.shape[1])
    left = sum(
        relative_error(normal, group, everything, weights[group]) * float(normal.power[group])
        for group in range(layer.groups)
    )
    if layer.bias is not None:
        layer.bias.copy_(weights[:, -1].flatten())
        weights = weights[:, :-1]
    layer.weight.copy_(weights.mT.reshape(layer.weight.shape))
    return left / max(float(normal.power.sum()), 1e-30)


def relative_error(normal: Normal, group: int, keep: Tensor, weights: Tensor) -> float:
    """Sum of squared errors of the fit, as a share of the targets' sum of squares."""
    gram, cross = normal.gram[group][keep][:, keep], normal.cross[group][keep]
    explained = 2 * (weights * cross).sum() - (weights * (gram @ weights)).sum()
    return float((1 - explained / normal.power[group].clamp(min=1e-30)).clamp(min=0))
