"""Which way to round each weight, so that a layer's output errs least, not the weight itself.

What a layer gives is compared on real activations: the squared error of its output is a quadratic form of the weights,
whose matrix is the gram matrix of the inputs. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training
Quantization", ICML 2020, state the problem, and solve it by gradient descent on relaxed choices. It is solved here one
weight after the other, each one's error made good by those that are still free (Frantar and Alistarh, "Optimal Brain
Compression", NeurIPS 2022), and then by moving single weights for as long as that lowers the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CLIPS = torch.linspace(0.3, 1.0, 36)  # shares of a scale that `fitted_scale` tries


@dataclass(frozen=True)
class Output:
    """What a layer's output error depends on: half its quadratic form, per group of the layer, in float64.

    `gram` (G, F, F) are the inputs' products, `cross` (G, F, O) those of inputs and wanted outputs; with a bias, both
    are less the means, which the bias takes over. `start` (G, F, O) are the float weights. `power` is the sum of
    squares of the wanted outputs.
    """

    gram: Tensor
    cross: Tensor
    start: Tensor
    power: float

    def pulled(self, ridge: float) -> Output:
        """With a pull towards the float weights, of `ridge` times the gram matrix's mean diagonal."""
        mean = self.gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp(min=1e-30)
        pull = (ridge + 1e-12) * mean
        gram = self.gram + pull * torch.eye(self.gram.shape[-1], dtype=self.gram.dtype)
        return Output(gram, self.cross + pull * self.start, self.start, self.power)

    def error(self, weights: Tensor) -> float:
        """The squared error of the output with these weights (G, F, O), as a share of the wanted output's power."""
        explained = (weights * (2 * self.cross - self.gram @ weights)).sum()
        return float((self.power - explained).clamp(min=0)) / max(self.power, 1e-30)


@dataclass(frozen=True)
class Integers:
    """What a weight may become, each (G, F, O): the scale, and the smallest and largest integer."""

    scale: Tensor
    low: Tensor
    high: Tensor
    nearest: Callable[[Tensor], Tensor]

    def of(self, weights: Tensor) -> Tensor:
        """The nearest integers."""
        return self.nearest(weights / self.scale).clamp(self.low, self.high)


def rounded(output: Output, grid: Integers, ridge: float, sweeps: int) -> Tensor:
    """The integers (G, F, O) that make the output's error small; no other single one would make it smaller.

    At most `sweeps` times every weight is looked at again. The pull towards the float weights, `ridge`, keeps those in
    place of which the images say little.
    """
    pulled = output.pulled(ridge)
    integers = _one_after_the_other(pulled, grid)
    weights = integers * grid.scale
    slope = pulled.cross - pulled.gram @ weights
    curve = pulled.gram.diagonal(dim1=-2, dim2=-1)
    for _ in range(sweeps):
        moved = False
        for i in range(weights.shape[1]):
            wanted = weights[:, i] + slope[:, i] / curve[:, i, None]
            new = grid.nearest(wanted / grid.scale[:, i]).clamp(grid.low[:, i], grid.high[:, i])
            step = (new - integers[:, i]) * grid.scale[:, i]
            if bool(step.any()):
                moved = True
                integers[:, i] = new
                weights[:, i] += step
                slope -= pulled.gram[:, :, i, None] * step[:, None]
        if not moved:
            break
    return integers


def _one_after_the_other(output: Output, grid: Integers) -> Tensor:
    """Round feature after feature; those that are left take over the error, as least squares would have them."""
    weights = torch.linalg.solve(output.gram, output.cross)
    factor = torch.linalg.cholesky(torch.linalg.inv(output.gram), upper=True)
    integers = torch.empty_like(weights)
    for i in range(weights.shape[1]):
        integers[:, i] = grid.nearest(weights[:, i] / grid.scale[:, i]).clamp(grid.low[:, i], grid.high[:, i])
        error = (weights[:, i] - integers[:, i] * grid.scale[:, i]) / factor[:, i, i, None]
        weights[:, i + 1 :] -= factor[:, i, i + 1 :, None] * error[:, None]
    return integers


def fitted_scale(output: Output, grid: Integers, ridge: float) -> Tensor:
    """The scale (G, 1, O) of each output channel whose nearest integers err least, at most that of `grid`."""
    gram = output.pulled(ridge).gram
    largest = grid.scale[:, :1]
    best, least = largest.clone(), torch.full_like(largest, float("inf"))
    for clip in CLIPS.tolist():
        tried = Integers((largest * clip).expand_as(grid.scale), grid.low, grid.high, grid.nearest)
        off = tried.of(output.start) * tried.scale - output.start
        error = (off * (gram @ off)).sum(1, keepdim=True)
        best = torch.where(error < least, largest * clip, best)
        least = torch.minimum(error, least)
    return best
