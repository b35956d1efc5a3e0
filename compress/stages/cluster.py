"""Cluster: the weights of a layer share a table of a few values.

What it does. In `Conv2d`, `Linear` and the convolutions inside layers of ours, the weights are grouped by k-means into
2^`bits` clusters. Each weight becomes an index into the layer's table of cluster centres, and a file holds the table
and `bits` for each weight. Weights that are exactly zero take an entry of their own and stay zero, so that it stacks on
pruning. Biases and batch norm stay float. Fine-tuning afterwards trains the tables; no weight leaves its cluster.

When to use it, and when not. For the size of the file. It saves no work and no time: what runs, and every export, holds
the weights in full again, unless `Quantize` follows. Fine-tune afterwards with `optimizer: sgd`. A layer whose weights
are all zero, as those of a gate that was never trained are, is kept: it could not grow any more.

Knobs. `bits`: 1 to 8, of which pruned layers need 2. `linear_bits`: those of `Linear` layers, where they shall have
others. `layers`: bits by name pattern, before both; the first pattern that matches counts. Deep Compression takes 8 for
convolutions and 5 for fully connected layers. `start`: `linear` spreads the first centres evenly between the smallest
and the largest weight, which keeps large weights, which are few; `density` puts equally many weights around each.
`iterations`: at most so many steps of k-means. `include`, `exclude`: layers by name pattern.

Measured. ResNet-20 on CIFAR-10 (91.73 %, 1.09 MB): recipe `cluster` 91.77 % in 161 kB, `deep_compression` 90.82 % in
65 kB.

Reference. Han et al., "Deep Compression", ICLR 2016, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import ConfigError, DataError
from compress.nn.clustered import ClusteredWeight, share_weight
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight
from compress.stage import Edit, Keep, Site
from compress.surgery import (
    by_pattern,
    describe,
    kind,
    layers_and_ours,
    matching,
    require_change,
    tied,
    weighted,
    why_shared,
)
from compress.task import Task, Work

STARTS = ("linear", "density")


@dataclass(frozen=True)
class Cluster:
    """Settings of the stage; see the module's card."""

    bits: int = 5
    linear_bits: int | None = None
    layers: dict[str, int] = field(default_factory=dict)
    start: str = "linear"
    iterations: int = 100
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "cluster"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)
    ours: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = {"bits": self.bits, "linear_bits": self.linear_bits}
        for name, bits in (given | {f"layers.{pattern}": bits for pattern, bits in self.layers.items()}).items():
            if bits is not None and not 1 <= bits <= 8:
                raise ConfigError(f"`{name}` (={bits}) must be between 1 and 8; for more, exclude the layers.")
        if self.start not in STARTS:
            raise ConfigError(f"`start` (={self.start!r}) must be one of {', '.join(STARTS)}.")
        if self.iterations < 1:
            raise ConfigError(f"`iterations` (={self.iterations}) must be at least 1.")

    def check(self, model: nn.Module) -> None:
        """Raise `ConfigError` for patterns that match nothing, and for a model that is clustered or quantized."""
        parts = {type(module) for module in model.modules()}
        if ClusteredWeight in parts:
            raise ConfigError("the model is clustered already; keep one of the two `Cluster` stages.")
        if parts & {FakeQuantize, FakeQuantizeWeight}:
            raise ConfigError("the model is quantized already; put `Cluster` before `Quantize`.")
        found = self._found(model)
        matching(list(found), self.include, self.exclude)
        by_pattern("layers", self.layers, list(found))

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        self.check(model)
        found = self._found(model)
        kept = matching(list(found), self.include, self.exclude)
        bits, shared = self._bits(found), tied(model)
        sites, entries, errors = [], {}, {}
        work.progress.start("share weights", len(found))
        for name, layer in found.items():
            work.progress.step(name)
            before, after, why = describe(layer), None, kept[name]
            if not why:
                try:
                    entries[name], zero, error = self._share(name, layer, bits[name], shared)
                    errors[name] = round(error, 6)
                    after = f"{entries[name]} shared weights" + (", zero among them" if zero else "")
                except Keep as reason:
                    why = str(reason)
            sites.append(Site(name, before, after, why))
        work.progress.end()
        require_change(sites)
        return Edit(model, tuple(sites), {"entries": entries, "relative_error": errors})

    def _found(self, model: nn.Module) -> Mapping[str, nn.Module]:
        return layers_and_ours(model, self.kinds)

    def _bits(self, found: Mapping[str, nn.Module]) -> dict[str, int]:
        chosen = by_pattern("layers", self.layers, list(found))
        linear = self.bits if self.linear_bits is None else self.linear_bits
        usual = {name: linear if kind(layer) is nn.Linear else self.bits for name, layer in found.items()}
        return usual | {name: self.layers[pattern] for name, pattern in chosen.items()}

    def _share(self, name: str, layer: nn.Module, bits: int, shared: Collection[int]) -> tuple[int, bool, float]:
        """Entries of the largest table, whether zero is one, and the squared error as a share of the squares."""
        inner = weighted(layer)
        if not inner:
            raise Keep("it only displaces its input: there are no weights to share")
        if why := why_shared(layer, shared):
            raise Keep(why)
        large = [module for module in inner if _weight(module).numel() >= 2 * 2**bits]
        if not large:
            most = max(_weight(module).numel() for module in inner)
            raise Keep(f"its {most} weights are too few for a table of {2**bits}")
        if hasattr(layer, "settle"):  # displacements that may still meet would add up weights
            layer.settle()  # type: ignore[operator]  # a method, by the layers' contract
        for module in large:
            weight = _weight(module).detach()
            if not bool(weight.isfinite().all()):
                raise DataError(f"the weights of `{name}` hold NaN or infinity; they cannot be clustered.")
            values = weight[weight != 0]
            if bits == 1 and 0 < len(values) < weight.numel() and bool((values != values[0]).any()):
                raise Keep(
                    "zero takes one of 2 values, which leaves a single one for all other weights; take `bits: 2`"
                )
        books, wrong, total = [], 0.0, 0.0
        for module in large:
            weight = _weight(module).detach().clone()
            values = weight[weight != 0]
            if not len(values):
                continue
            room = 2**bits - (len(values) < weight.numel())
            try:
                books.append(share_weight(module, shared_values(values, room, self.start, self.iterations)))
            except ValueError as error:
                raise Keep("its weight is parametrized by something that indices do not pass unchanged") from error
            wrong += float((_weight(module).detach().double() - weight.double()).square().sum())
            total += float(weight.double().square().sum())
        if not books:
            raise Keep("all its weights are zero, and zeros stay zero in training; train it first")
        return max(book.entries for book in books), any(book.zero for book in books), wrong / total


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def shared_values(weights: Tensor, entries: int, start: str = "linear", iterations: int = 100) -> Tensor:
    """At most `entries` values, ascending, that stand for `weights` with a small squared error: k-means on a line.

    A cluster of sorted weights is a slice of them, so that a step takes a few look-ups in running sums, however many
    weights there are. Where one is left without weights, the cluster with the largest squared error is divided at its
    mean. No more distinct weights than entries: these themselves, and no error at all.
    """
    points = weights.detach().cpu().flatten().sort().values.double()  # a GPU's running sums differ from time to time
    distinct: Tensor = torch.unique_consecutive(points)
    if len(distinct) <= entries:
        return distinct.to(weights)
    sums, squares = (F.pad(running.cumsum(0), (1, 0)) for running in (points, points.square()))
    if start == "linear":
        centres = torch.linspace(float(points[0]), float(points[-1]), entries).to(points)
    else:
        centres = points[((torch.arange(entries) + 0.5) / entries * len(points)).long()]
    before = None
    for _ in range(iterations):
        cuts = torch.searchsorted(points, (centres[1:] + centres[:-1]) / 2)
        if before is not None and torch.equal(cuts, before):
            break
        before = cuts
        centres = _moved(points, sums, squares, F.pad(F.pad(cuts, (1, 0)), (0, 1), value=len(points)), centres)
    return centres.to(weights)


def _moved(points: Tensor, sums: Tensor, squares: Tensor, cuts: Tensor, centres: Tensor) -> Tensor:
    """The means of the slices between `cuts`, ascending; for an empty one a slice with a large error is halved."""
    first, end = cuts[:-1], cuts[1:]
    counts = end - first
    means = torch.where(counts > 0, (sums[end] - sums[first]) / counts.clamp(min=1), centres)
    (empty,) = torch.nonzero(counts == 0, as_tuple=True)
    if len(empty):
        errors = squares[end] - squares[first] - counts * means.square()
        errors[
            points[first.clamp(max=len(points) - 1)] == points[(end - 1).clamp(min=0)]
        ] = -math.inf  # nothing to halve
        worst = errors.masked_fill(counts == 0, -math.inf).argsort(descending=True, stable=True)[: len(empty)]
        worst = worst[(counts[worst] > 0) & errors[worst].isfinite()]
        low, high = first[worst], end[worst]
        middle = torch.searchsorted(points, means[worst]).clamp(low + 1, high - 1)
        means[worst] = (sums[middle] - sums[low]) / (middle - low)
        means[empty[: len(worst)]] = (sums[high] - sums[middle]) / (high - middle)
    return means.sort().values
