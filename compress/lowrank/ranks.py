"""How low a layer's ranks may be: by the weights that are left, by energy, by what stands out of the noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.lowrank.decompose import vbmf_rank
from compress.lowrank.factors import Problem, Ranks, Shape, root


@dataclass(frozen=True)
class Basis:
    """A kernel in its own coordinates: kernel = `first` core `last`', the directions that matter most in front.

    A side whose rank is not free keeps the coordinates that it has: None. `kept` is the energy that ranks keep, by the
    shape's choices of them.
    """

    first: Tensor | None
    core: Tensor
    last: Tensor | None
    kept: Tensor

    @classmethod
    def of(cls, kernel: Tensor, shape: Shape, covariance: Tensor | None = None) -> Basis:
        """Of a kernel (channels, positions, outputs), its channels weighted by what they carry, if given."""
        if not shape.free[0]:
            return cls._of_outputs(kernel, covariance)
        back = None
        if covariance is not None:
            weighted, back = root(covariance)
            kernel = torch.tensordot(weighted, kernel, 1)
        first, core, last = _directions(_unfolded(kernel, 0)), kernel, None
        if shape.free[1]:
            last = _directions(_unfolded(kernel, 2))
            core = torch.einsum("cr,cpt,ts->rps", first, kernel, last)
        else:
            core = torch.einsum("cr,cpt->rpt", first, kernel)
        each = core.square().sum(1)
        kept = each.cumsum(0).cumsum(1) if shape.free[1] else each.sum(1, keepdim=True).cumsum(0)
        return cls(first if back is None else back @ first, core, last, kept)

    @classmethod
    def _of_outputs(cls, kernel: Tensor, covariance: Tensor | None) -> Basis:
        """By the outputs alone, which are fewer than the channels of a wide layer."""
        seen = kernel if covariance is None else torch.tensordot(covariance, kernel, 1)
        energies, vectors = torch.linalg.eigh(torch.einsum("cpt,cpu->tu", kernel, seen))
        last = vectors.flip(1)
        return cls(None, kernel @ last, last, energies.flip(0).cumsum(0).unsqueeze(0))


def _unfolded(kernel: Tensor, axis: int) -> Tensor:
    return kernel.movedim(axis, 0).flatten(1)


def _directions(unfolded: Tensor) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(unfolded @ unfolded.mT).eigenvectors
    return vectors.flip(1)


def kept(problems: Sequence[Problem]) -> Tensor:
    """The energy that ranks keep of the best kernels for the data, over all groups, by the choices of ranks."""
    tables = []
    for problem in problems:
        covariance = problem.tensor.diagonal(dim1=1, dim2=3).sum(-1) / problem.shape.positions
        tables.append(Basis.of(problem.dense(), problem.shape, covariance).kept)
    total: Tensor = torch.stack(tables).sum(0)
    return total


def allowed(shape: Shape, multiple: int) -> Tensor:
    """Which choices of ranks a layer of fewer weights can have: multiples, or all its channels."""
    first, last = shape.choices
    first = first.unsqueeze(1)
    whole = first == shape.channels, last == shape.outputs
    fits = (whole[0] | (first <= shape.positions * last)) & (whole[1] | (last <= shape.positions * first))
    even = ((first % multiple == 0) | whole[0]) & ((last % multiple == 0) | whole[1])
    return even & fits & (costs(shape) < shape.weights)


def costs(shape: Shape, used: tuple[int, int] = (1, 1)) -> Tensor:
    """The weights left by all choices of ranks; those in front of the core, and the others, `used` so often.

    Used for an image, that is its multiply-adds.
    """
    first, last = shape.choices
    before = shape.channels * first * (first < shape.channels)
    behind = shape.positions * first.unsqueeze(1) * last + shape.outputs * last * (last < shape.outputs)
    return shape.groups * (used[0] * before.unsqueeze(1) + used[1] * behind)


def best(shape: Shape, score: Tensor, cost: Tensor, may: Tensor, most: float) -> Ranks | None:
    """The ranks of the highest score that cost at most so much; None where there are none."""
    may = may & (cost <= most)
    if not bool(may.any()):
        return None
    place = int(score.masked_fill(~may, -torch.inf).argmax())
    first, last = shape.choices
    return int(first[place // len(last)]), int(last[place % len(last)])


def by_energy(kernels: Tensor, shape: Shape, share: float) -> Ranks:
    """The lowest ranks that keep this share of the squared singular values, in each direction and every group."""

    def needed(unfolded: Tensor) -> int:
        values = torch.linalg.svdvals(unfolded).square()
        return int((values.cumsum(0) < share * values.sum() * (1 - 1e-12)).sum()) + 1

    return _of_both(kernels, shape, needed)


def by_vbmf(kernels: Tensor, shape: Shape, weaken: float, min_rank: int) -> Ranks | None:
    """Ranks by variational Bayes, taken back towards the layer's own by `weaken`; None where nothing stands out.

    As MUSCO does: int(m - weaken (m - rank)) of m channels, and at least `min_rank`; fewer channels than that stay. A
    direction in which nothing stands out is left whole, but cut to 1 by the pure rule (`weaken` 1).
    """
    found = _of_both(kernels, shape, vbmf_rank)
    if not any(rank for rank, free in zip(found, shape.free, strict=True) if free):
        return None

    def weakened(rank: int, most: int, free: bool) -> int:
        if not free or most <= min_rank or (rank == 0 and weaken < 1):
            return most
        return min(most, max(int(most - weaken * (most - max(rank, 1))), min_rank, 1))

    first, last = (weakened(*each) for each in zip(found, shape.most, shape.free, strict=True))
    return first, last


def _of_both(kernels: Tensor, shape: Shape, rank: Callable[[Tensor], int]) -> Ranks:
    both = [
        max(rank(_unfolded(kernel, axis)) for kernel in kernels) if free else most
        for axis, most, free in zip((0, 2), shape.most, shape.free, strict=True)
    ]
    return both[0], both[1]


def rounded(ranks: Ranks, shape: Shape, multiple: int) -> Ranks:
    """Raised to multiples, no more than there are channels, and neither more than the other can make use of."""
    first, last = (min(most, -(-rank // multiple) * multiple) for rank, most in zip(ranks, shape.most, strict=True))
    if first < shape.channels:
        first = min(first, shape.positions * last)
    if last < shape.outputs:
        last = min(last, shape.positions * first)
    return first, last
