"""Factors of a layer, solved by least squares on what the layer sees: everything that Tucker-2 is made of is linear.

A dense kernel V (channels x positions, outputs) becomes U (channels, r), a core (r, positions, s) and W (outputs, s).
For a given U, core and W are a reduced-rank regression; for given core and W, U is a least-squares problem again. Both
are solved in turn on the gram matrix of the layer's inputs, without another look at an image. The channel-wise SVD is
the case without U; a k x 1 convolution followed by a 1 x k one the case without W, with (channel, row) for a channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.lowrank.decompose import ROUNDS, cp, partial_tucker
from compress.reconstruct import Normal

ENOUGH = 1e-3  # a round that lowers the squared error by a smaller share is the last
STEPS = 8  # of conjugate gradients for U in each round
MOST_FEATURES = 6000  # channels x positions: above, the equations take gigabytes and the weights alone have to do
Ranks = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """A group of a layer as Tucker-2 takes it apart; `free` says which of the two ranks may be below their most."""

    channels: int
    positions: int
    outputs: int
    groups: int
    free: tuple[bool, bool]

    @classmethod
    def of(cls, layer: nn.Conv2d, method: str) -> Shape:
        channels, outputs, groups = layer.in_channels, layer.out_channels, layer.groups
        height, width = layer.kernel_size
        if method == "spatial" and height * width > 1:
            return cls(channels // groups * height, width, outputs // groups, groups, (True, False))
        free = (height * width > 1 and method == "tucker", True)
        return cls(channels // groups, height * width, outputs // groups, groups, free)

    @property
    def most(self) -> Ranks:
        return self.channels, self.outputs

    @property
    def choices(self) -> tuple[Tensor, Tensor]:
        """The ranks that there are to choose from on each side: a single one where it is not free."""
        first, last = (
            torch.arange(1, most + 1) if free else torch.tensor([most])
            for most, free in zip(self.most, self.free, strict=True)
        )
        return first, last

    def place(self, ranks: Ranks) -> tuple[int, int]:
        """Where ranks stand in a table of all `choices`."""
        first, last = (rank - 1 if free else 0 for rank, free in zip(ranks, self.free, strict=True))
        return first, last

    @property
    def features(self) -> int:
        """Weights for each output."""
        return self.channels * self.positions

    @property
    def weights(self) -> int:
        return self.groups * self.channels * self.positions * self.outputs

    def parts(self, ranks: Ranks) -> tuple[int, int]:
        """Weights in front of the core, and those of the core and behind it."""
        first, last = ranks
        before = self.channels * first if first < self.channels else 0
        behind = self.outputs * last if last < self.outputs else 0
        return self.groups * before, self.groups * (self.positions * first * last + behind)

    def fits(self, ranks: Ranks) -> bool:
        """Whether neither rank, where there is a part for it, is more than the other can make use of."""
        (first, last), p = ranks, self.positions
        return first in (self.channels, min(first, p * last)) and last in (self.outputs, min(last, p * first))

    def kernel(self, layer: nn.Conv2d) -> Tensor:
        """The weights of each group (G, channels, positions, outputs), in float64 on the CPU."""
        weight = layer.weight.detach().cpu().double().view(self.groups, self.outputs, self.channels, self.positions)
        return weight.permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Problem:
    """The least-squares problem for V: V'GV - 2V'C is to be small.

    The bias is eliminated from it, and the ridge is part of `gram`.
    """

    gram: Tensor
    cross: Tensor
    shape: Shape

    @classmethod
    def of(cls, normal: Normal, group: int, shape: Shape, ridge: float) -> Problem:
        gram, cross = normal.gram[group], normal.cross[group]
        if normal.bias:
            sums, rows, totals = gram[:-1, -1:], gram[-1, -1], cross[-1:]
            gram, cross = gram[:-1, :-1] - sums @ sums.mT / rows, cross[:-1] - sums @ totals / rows
        # Never quite 0, so that a channel which is always black has a solution; and above what float32 gathered wrong.
        identity = torch.eye(len(gram), dtype=gram.dtype)
        added = (ridge + 1e-9) * gram.diagonal().mean().clamp(min=1e-30)
        while int(torch.linalg.cholesky_ex(gram + added / 2 * identity).info):
            added = 10 * added
        return cls(gram + added * identity, cross, shape)

    def gain(self, factors: Factors) -> float:
        """By how much the squared error is below that of an output which is always zero.

        The core has to be the best one between the other two, as `regress` makes it: V'GV is then V'C.
        """
        return float((factors.kernel().flatten(0, 1) * self.cross).sum())

    @property
    def tensor(self) -> Tensor:
        """The gram matrix (channels, positions, channels, positions)."""
        return self.gram.view(2 * (self.shape.channels, self.shape.positions))

    def dense(self) -> Tensor:
        """The best kernel (channels, positions, outputs) of any rank."""
        best: Tensor = torch.linalg.solve(self.gram, self.cross)
        return best.view(self.shape.channels, self.shape.positions, self.shape.outputs)


@dataclass(frozen=True)
class Factors:
    """V[c, p, t] = sum of first[c, r] core[r, p, s] last[t, s]."""

    first: Tensor
    core: Tensor
    last: Tensor

    def kernel(self) -> Tensor:
        return torch.einsum("cr,rps,ts->cpt", self.first, self.core, self.last)


def root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a symmetric positive matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(covariance)
    scale = values.clamp(min=1e-9 * float(values.max().clamp(min=1e-30))).sqrt()
    return vectors * scale @ vectors.mT, vectors / scale @ vectors.mT


def truncated(kernel: Tensor, ranks: Ranks, rounds: int = ROUNDS) -> Factors:
    """The factors nearest to a kernel (channels, positions, outputs), every weight counting alike.

    `rounds` of orthogonal iteration at most, where both ranks are below the kernel's own.
    """
    channels, _, outputs = kernel.shape
    first, last = (torch.eye(size, dtype=kernel.dtype) for size in (channels, outputs))
    if ranks == (channels, outputs):
        return Factors(first, kernel, last)
    if ranks[0] == channels:
        left, values, right = torch.linalg.svd(kernel.flatten(0, 1), full_matrices=False)
        return Factors(first, (left * values)[:, : ranks[1]].view(*kernel.shape[:2], -1), right[: ranks[1]].mT)
    if ranks[1] == outputs:
        left, values, right = torch.linalg.svd(kernel.flatten(1), full_matrices=False)
        core = (values.unsqueeze(1) * right)[: ranks[0]].view(-1, *kernel.shape[1:])
        return Factors(left[:, : ranks[0]], core, last)
    return Factors(*partial_tucker(kernel, ranks, rounds))


def factorize(problem: Problem, ranks: Ranks, rounds: int) -> Factors:
    """The best found factors of these ranks.

    Starts from the orthogonal iteration on the best dense kernel, weighted by the channels' covariance.
    """
    shape = problem.shape
    if ranks[0] == shape.channels:
        return regress(problem, None, ranks[1])
    covariance = problem.tensor.diagonal(dim1=1, dim2=3).sum(-1) / shape.positions
    weighted, back = root(covariance)
    dense = problem.dense()
    start = truncated(torch.tensordot(weighted, dense, 1), ranks, rounds=1).first  # the fit on data goes on from it
    factors = regress(problem, torch.linalg.qr(back @ start).Q, ranks[1])
    gain = problem.gain(factors)
    whole = float((dense.flatten(0, 1) * problem.cross).sum())  # what no rank can exceed
    for _ in range(rounds):
        moved = regress(problem, torch.linalg.qr(_first(problem, factors, covariance)).Q, ranks[1])
        more = problem.gain(moved) - gain
        if more > 0:
            factors, gain = moved, gain + more
        if more < ENOUGH * (whole - gain):
            break
    return factors


def regress(problem: Problem, first: Tensor | None, rank: int) -> Factors:
    """Core and last factor that are best behind this first one (None: the identity): a regression of reduced rank."""
    shape, gram, cross = problem.shape, problem.gram, problem.cross
    known = shape.channels if first is None else first.shape[1]
    if first is None:
        first = torch.eye(known, dtype=gram.dtype)
    else:
        half = torch.tensordot(first.mT, problem.tensor, 1)  # (r, P, C, P)
        gram = torch.einsum("rpdq,ds->rpsq", half, first).reshape(2 * (known * shape.positions,))
        cross = torch.tensordot(first.mT, cross.view(shape.channels, shape.positions, -1), 1).flatten(0, 1)
    lower = torch.linalg.cholesky((gram + gram.mT) / 2)
    seen = torch.linalg.solve_triangular(lower, cross, upper=False)
    last = torch.eye(shape.outputs, dtype=seen.dtype)
    if rank < shape.outputs:
        last = torch.linalg.eigh(seen.mT @ seen).eigenvectors.flip(1)[:, :rank]
    core = torch.linalg.solve_triangular(lower.mT, seen @ last, upper=True)
    return Factors(first, core.view(known, shape.positions, rank), last)


def _first(problem: Problem, factors: Factors, covariance: Tensor) -> Tensor:
    """A better first factor for this core and last one: some steps of preconditioned conjugate gradients."""
    core, shape = factors.core.flatten(1), problem.shape  # (r, positions * s)

    def gathered(weights: Tensor) -> Tensor:
        return weights.view(shape.channels, -1) @ core.mT

    def applied(gram: Tensor, first: Tensor) -> Tensor:
        return gathered((gram @ (first @ core).view(shape.features, -1).to(gram)).to(core))

    alike = core @ core.mT
    alike = alike + 1e-9 * alike.diagonal().mean() * torch.eye(len(alike), dtype=alike.dtype)
    left, right = torch.linalg.inv(covariance), torch.linalg.inv(alike)
    found = factors.first
    residual = gathered(problem.cross @ factors.last) - applied(problem.gram, found)
    halved = problem.gram.float()  # says well enough where to go, in half the time
    step = left @ residual @ right
    size = float((residual * step).sum())
    for _ in range(STEPS):
        answer = applied(halved, step)
        bend = float((step * answer).sum())
        if not (size > 0 and bend > 0):
            break
        found, residual = found + size / bend * step, residual - size / bend * answer
        towards = left @ residual @ right
        before, size = size, float((residual * towards).sum())
        step = towards + size / before * step
    return found


def factorize_cp(
    problem: Problem | None, kernel: Tensor, kernel_size: tuple[int, int], rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors (channels, r), (rows, r), (columns, r) and (outputs, r): CP of the best kernel, the last one solved.

    Without `problem` the decomposition of the kernel (channels, positions, outputs) as it is.
    """
    dense = kernel if problem is None else problem.dense()
    inputs, tall, wide, outputs = cp(dense.view(len(dense), *kernel_size, -1), rank)
    if problem is not None:
        columns = torch.einsum("cr,yr,xr->cyxr", inputs, tall, wide).reshape(-1, rank)
        gram = columns.mT @ problem.gram @ columns
        gram = gram + 1e-9 * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(rank, dtype=gram.dtype)
        outputs = torch.linalg.solve(gram, columns.mT @ problem.cross).mT
    return inputs, tall, wide, outputs
