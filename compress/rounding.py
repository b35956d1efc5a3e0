"""Which way to round each weight, so that a layer's output errs least, not the weight itself.

What a layer gives is compared on real activations: the squared error of its output is a quadratic form of the weights,
whose matrix is the gram matrix of the inputs. Nagel et al., "Up or Down? Adaptive Rounding for Post-Training
Quantization", ICML 2020, state the problem, and solve it by gradient descent on relaxed choices. It is solved here one
weight after the other, each one's error made good by those that are still free (Frantar and Alistarh, "Optimal Brain
Compression", NeurIPS 2022), and then by moving single weights for as long as that lowers the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.nn.geometry import spatial_config
from compress.nn.masked import mask_of
from compress.nn.quantized import FakeQuantizeWeight
from compress.nn.shift import ShiftConv2d
from compress.nn.taps import taps
from compress.reconstruct import Equations

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


@dataclass(frozen=True)
class Chosen:
    """A layer rounded: integers and weight (O, ...), the bias to go with them, and the output's relative errors."""

    integers: Tensor
    weight: Tensor
    bias: Tensor | None
    error_of_nearest: float
    error: float


def weight_holder(layer: nn.Module) -> nn.Conv2d | nn.Linear | None:
    """The module whose weights make this layer's output."""
    inner = layer.pointwise if isinstance(layer, ShiftConv2d) else layer
    return inner if isinstance(inner, nn.Conv2d | nn.Linear) else None


class LayerRounding:
    """A quantized layer as the problem of rounding it: what it sees, and what it should give for that."""

    def __init__(self, layer: nn.Module, images: int) -> None:
        holder = weight_holder(layer)
        assert holder is not None
        self.layer, self.holder = layer, holder
        self.groups = 1 if isinstance(layer, nn.Linear) else int(layer.groups)  # type: ignore[arg-type]
        self.equations = Equations(_convolution(layer), images, holder.bias is not None)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in a batch: the layer's input, and the output wanted for it."""
        if isinstance(self.layer, nn.Linear):  # a pointwise convolution over whatever lies between
            x, y = (z.reshape(len(z), -1, z.shape[-1]).mT.unsqueeze(-1) for z in (x, y))
        self.equations.add(x, y)

    def chosen(self, grid: FakeQuantizeWeight, ridge: float, scales: bool, sweeps: int) -> Chosen:
        """The integers of `grid` that serve the output best; the layer is left as it is, the grid's scales are set.

        With `scales` those of output channels are chosen anew, by the output's error too.
        """
        output, constant, count, wanted = self._without_bias()
        latent = self._latent()
        integers = self._integers(grid, latent)
        before = output.error(integers.of(output.start) * integers.scale)
        if scales and grid.channels == len(latent):
            grid.set_scale(fitted_scale(output, integers, ridge).flatten().to(grid.scale))
            integers = self._integers(grid, latent)
        chosen = rounded(output, integers, ridge, sweeps)
        weights = chosen * integers.scale
        by_output = chosen.mT.reshape(latent.shape).to(grid.integer_dtype).to(latent.device)
        bias = None
        if self.holder.bias is not None:
            bias = ((wanted - constant.mT @ weights) / count).flatten().to(latent)
        return Chosen(by_output, grid.values(by_output, latent.dtype), bias, before, output.error(weights))

    def _without_bias(self) -> tuple[Output, Tensor, Tensor, Tensor]:
        """The problem with the bias solved for, and what it is solved from."""
        normal = self.equations.normal()
        rows = self._features().unsqueeze(2)
        gram = normal.gram.take_along_dim(rows, 1)
        constant, count, wanted = gram[:, :, -1:], normal.gram[:, -1:, -1:], normal.cross[:, -1:]
        gram = gram.take_along_dim(rows.mT, 2)
        cross, power = normal.cross.take_along_dim(rows, 1), float(normal.power.sum())
        if self.holder.bias is not None:
            gram = gram - constant @ constant.mT / count
            cross = cross - constant @ wanted / count
            power -= float((wanted.square() / count).sum())
        return Output(gram, cross, self._by_feature(self._latent()), power), constant, count, wanted

    def _latent(self) -> Tensor:
        """The float weight, beneath a grid where there is one; zero where it is masked."""
        if parametrize.is_parametrized(self.holder, "weight"):
            weight = self.holder.parametrizations.weight.original  # type: ignore[union-attr]  # a module, by torch
            assert isinstance(weight, Tensor)
            masked = mask_of(self.holder)
            return weight if masked is None else torch.where(masked.mask, weight, 0.0)
        return self.holder.weight

    def _integers(self, grid: FakeQuantizeWeight, latent: Tensor) -> Integers:
        each = (grid.scale.detach(), *grid.bounds)
        scale, low, high = (self._by_feature(grid.spread(one, latent)) for one in each)
        masked = mask_of(self.holder)
        if masked is not None:  # its zeros have no other choice
            free = self._by_feature(masked.mask)
            low, high = low * free, high * free
        return Integers(scale, low, high, grid.nearest)

    def _by_feature(self, weight: Tensor) -> Tensor:
        """(O, F, ...) -> (groups, F, O / groups), in float64 on the CPU, where the equations are."""
        return weight.detach().cpu().double().reshape(self.groups, len(weight) // self.groups, -1).mT

    def _features(self) -> Tensor:
        """Which of the window positions of each group's channels the weights belong to: (groups, F)."""
        layer = self.layer
        if not isinstance(layer, ShiftConv2d):
            return torch.arange(self.holder.weight[0].numel()).expand(self.groups, -1)
        places = taps(layer.displacement.detach(), layer.kernel_size, True).flatten(2).argmax(-1).cpu()
        places = places.view(self.groups, -1, layer.taps)
        channels = torch.arange(places.shape[1]).unsqueeze(1)
        return (channels * math.prod(layer.kernel_size) + places).flatten(1)


def _convolution(layer: nn.Module) -> nn.Conv2d:
    """A convolution of this layer's geometry."""
    if isinstance(layer, nn.Conv2d):
        return layer
    with torch.device("meta"):
        if isinstance(layer, nn.Linear):
            return nn.Conv2d(layer.in_features, layer.out_features, 1)
        assert isinstance(layer, ShiftConv2d)
        return nn.Conv2d(layer.in_channels, layer.out_channels, **spatial_config(layer), groups=layer.groups)
