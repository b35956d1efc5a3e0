"""Separable: convolutions become a depthwise convolution and a pointwise one.

What it does. Each convolution with a kernel wider than 1x1 becomes a `SeparableConv2d`: `multiplier` kernels for each
input channel alone, then a 1x1 convolution over what they give. It starts from the trained weights: the kernels of each
input channel come from a singular value decomposition weighted by the real activations; then pointwise weights and
depthwise kernels are solved by least squares against the original layer's output in turn, layer by layer. With as many
kernels as the window has positions, or as a group has outputs, the layer is exactly the convolution.

When to use it, and when not. It buys bytes and multiply-adds: of a 3x3 convolution about `multiplier` ninths are left.
Depthwise convolutions move much memory for little arithmetic, so time falls less than that, and small layers can get
slower. Layers with few outputs gain nothing. Expect to fine-tune afterwards, with `multiplier: 1` for long.

Knobs. `multiplier`: kernels for each input channel. `rounds`: how often, at most, both parts are solved in turn; 0
leaves the decomposition with its pointwise weights solved once. `images`: how many calibration images the start is
solved on. `ridge`: pulls the weights towards zero, as a share of the activations' mean power. `gate`: none, macs,
bytes or latency: layers that do not get cheaper by it are kept.

Measured. ResNet-20 on CIFAR-10 (91.73 %), every 3x3 convolution but the first, 1,024 images, seed 0, no training: 61.7
and 89.4 % for `multiplier` 1 and 3 (CPU); after five epochs 85.95 and 91.08, beside other operators in
`benchmarks/operators.py`. Recipe `depthwise`, multiplier 2: 84.5 % before training, 90.44 after ten epochs (H100), in
0.30 of the MACs, but 1.21 of the time in onnxruntime (one image, 2 cores).

Reference. Sifre, PhD thesis, 2014; Chollet, CVPR 2017; Howard et al., arXiv:1704.04861.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.nn.geometry import spatial_config
from compress.nn.separable import SeparableConv2d
from compress.reconstruct import Normal, relative_error
from compress.stage import Edit, Keep
from compress.substitute import Old, Substitution, check_settings, substitute
from compress.surgery import layers, left_out
from compress.task import Task, Work

ENOUGH = 1e-3  # a round that lowers the squared error by a smaller share is the last
UNKNOWNS = 3000  # at most so many kernel weights are solved for at once: the time grows with their cube


@dataclass(frozen=True)
class Separable(Substitution):
    """Settings of the stage; see the module's card."""

    multiplier: int = 1
    rounds: int = 10

    def __post_init__(self) -> None:
        check_settings(self, multiplier=1, rounds=0)

    def check(self, model: nn.Module) -> None:
        """Raise `ConfigError` for patterns that match nothing, and for kernels of fewer positions than `multiplier`."""
        found = layers(model, self.kinds)
        reasons = left_out(model, found, self.include, self.exclude)
        small = [
            f"{name or 'the model itself'} has {math.prod(layer.kernel_size)}"
            for name, layer in found.items()
            if isinstance(layer, nn.Conv2d) and math.prod(layer.kernel_size) < self.multiplier
            if not reasons[name] and not why_kept(layer)
        ]
        if small:
            raise ConfigError(
                f"`multiplier` (={self.multiplier}) must not exceed the kernel's positions: {', '.join(small)}; "
                "lower `multiplier`, or put these layers into `exclude`."
            )

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        self.check(model)
        edit = substitute(model, task, work, self, self._start, {"multiplier": self.multiplier})
        made = {s.name: edit.model.get_submodule(s.name) for s in edit.sites if s.after is not None}
        used = {name: layer.multiplier for name, layer in made.items() if isinstance(layer, SeparableConv2d)}
        fewer = {name: kernels for name, kernels in used.items() if kernels < self.multiplier}
        sites = tuple(
            replace(s, why=f"{fewer[s.name]} kernels for each input channel are exact") if s.name in fewer else s
            for s in edit.sites
        )
        return Edit(edit.model, sites, {**edit.notes, "fewer": fewer})

    def _start(self, old: Old) -> tuple[nn.Module, float]:
        why = why_kept(old.layer)
        if why:
            raise Keep(why)
        exact = exact_multiplier(old.layer)
        new = empty_separable(old.layer, min(self.multiplier, exact))
        if self.multiplier >= exact:
            copy_kernel(old.layer, new)
            return new, 0.0
        return new, fit_separable(new, old.normal(), self.ridge, self.rounds)


def why_kept(layer: nn.Conv2d) -> str:
    """Why a convolution is no case for this stage; "" if it is one."""
    if math.prod(layer.kernel_size) == 1:
        return "a 1x1 kernel is pointwise already"
    if layer.groups == layer.in_channels:
        return "it is depthwise already: each output reads one input channel"
    return ""


def exact_multiplier(layer: nn.Conv2d) -> int:
    """How many kernels for each input channel always suffice: the largest rank that its weights can have."""
    return min(layer.out_channels // layer.groups, math.prod(layer.kernel_size))


def empty_separable(layer: nn.Conv2d, multiplier: int) -> SeparableConv2d:
    """A separable layer of the convolution's geometry, on its device, not yet fitted."""
    new = SeparableConv2d(
        layer.in_channels,
        layer.out_channels,
        multiplier=multiplier,
        groups=layer.groups,
        bias=layer.bias is not None,
        **spatial_config(layer),
    )
    return new.to(device=layer.weight.device, dtype=layer.weight.dtype)


@torch.no_grad()
def copy_kernel(layer: nn.Conv2d, new: SeparableConv2d) -> None:
    """With `exact_multiplier` kernels: one part has the weights, the other picks; exactly the convolution."""
    groups, outputs = layer.groups, layer.out_channels // layer.groups
    positions = math.prod(layer.kernel_size)
    if new.multiplier == positions:
        picks = torch.eye(positions).repeat(layer.in_channels, 1)
        new.depthwise.weight.copy_(picks.view_as(new.depthwise.weight))
        new.pointwise.weight.copy_(layer.weight.reshape_as(new.pointwise.weight))
    else:
        by_input = layer.weight.view(groups, outputs, -1, positions).transpose(1, 2)
        new.depthwise.weight.copy_(by_input.reshape_as(new.depthwise.weight))
        picks = torch.eye(outputs).repeat(groups, layer.in_channels // groups)
        new.pointwise.weight.copy_(picks.view_as(new.pointwise.weight))
    if layer.bias is not None and new.pointwise.bias is not None:
        new.pointwise.bias.copy_(layer.bias)


@torch.no_grad()
def fit_separable(new: SeparableConv2d, normal: Normal, ridge: float, rounds: int) -> float:
    """Solve for both parts of the layer; gives back the relative squared error over all groups."""
    positions = math.prod(new.kernel_size)
    channels, outputs = new.in_channels // new.groups, new.out_channels // new.groups
    between = channels * new.multiplier
    everything = torch.arange(normal.gram.shape[-1])
    left = 0.0
    for group in range(new.groups):
        kernels, mix = factorize(Problem.of(normal, group, positions, ridge), new.multiplier, rounds)
        weights = _composed(kernels, mix)
        made, mixed = (slice(group * n, (group + 1) * n) for n in (between, outputs))
        new.depthwise.weight[made] = kernels.reshape_as(new.depthwise.weight[made]).to(new.depthwise.weight)
        new.pointwise.weight[mixed] = mix.flatten(0, 1).mT[..., None, None].to(new.pointwise.weight)
        if normal.bias and new.pointwise.bias is not None:
            sums, rows = normal.gram[group][-1, :-1], normal.gram[group][-1, -1]
            bias = (normal.cross[group][-1] - sums @ weights) / rows
            new.pointwise.bias[mixed] = bias.to(new.pointwise.bias)
            weights = torch.cat((weights, bias.unsqueeze(0)))
        left += relative_error(normal, group, everything, weights) * float(normal.power[group])
    return left / max(float(normal.power.sum()), 1e-30)


@dataclass(frozen=True)
class Problem:
    """The least-squares problem for a dense kernel V (channels x positions, outputs): V'GV - 2V'C is to be small.

    The bias is eliminated from it, and the ridge is part of `gram`.
    """

    gram: Tensor
    cross: Tensor
    power: float
    positions: int

    @classmethod
    def of(cls, normal: Normal, group: int, positions: int, ridge: float) -> Problem:
        gram, cross, power = normal.gram[group], normal.cross[group], float(normal.power[group])
        if normal.bias:
            sums, rows, totals = gram[:-1, -1:], gram[-1, -1], cross[-1:]
            gram, cross = gram[:-1, :-1] - sums @ sums.mT / rows, cross[:-1] - sums @ totals / rows
            power -= float(totals.square().sum() / rows)
        # Never quite 0, so that a channel which is always black has a solution.
        added = (ridge + 1e-12) * gram.diagonal().mean().clamp(min=1e-30)
        return cls(gram + added * torch.eye(len(gram), dtype=gram.dtype), cross, power, positions)

    def error(self, weights: Tensor) -> float:
        return self.power + float((weights * (self.gram @ weights - 2 * self.cross)).sum())


def factorize(problem: Problem, multiplier: int, rounds: int) -> tuple[Tensor, Tensor]:
    """The best found `kernels` (channels, multiplier, positions) and `mix` (channels, multiplier, outputs)."""
    kernels = leading_kernels(problem, multiplier)
    mix = solve_mix(problem, kernels)
    error = problem.error(_composed(kernels, mix))
    for _ in range(rounds):
        kernels = solve_kernels(problem, kernels, mix)
        mix = solve_mix(problem, kernels)
        before, error = error, problem.error(_composed(kernels, mix))
        if before - error < ENOUGH * before:
            break
    return kernels, mix


def leading_kernels(problem: Problem, multiplier: int) -> Tensor:
    """The span of each channel's best approximation by `multiplier` kernels, with its activations as the measure.

    Of these counts what the other channels cannot make up for: the Schur complement of the channel in the gram matrix,
    which is the inverse of its block in the inverse. It mostly starts lower than the channel's own block does.
    """
    positions = problem.positions
    inverse = torch.linalg.inv(problem.gram)
    dense = (inverse @ problem.cross).unflatten(0, (-1, positions))
    blocks = inverse.view(len(dense), positions, len(dense), positions).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    root = vectors / values.clamp(min=1e-12 * float(values.max())).sqrt().unsqueeze(-2)
    _, _, right = torch.linalg.svd(root.mT @ dense, full_matrices=False)
    return _orthonormal((dense @ right[:, :multiplier].mT).mT)


def solve_mix(problem: Problem, kernels: Tensor) -> Tensor:
    """The pointwise weights that are best for these depthwise kernels."""
    channels, multiplier, positions = kernels.shape
    half = kernels @ problem.gram.view(channels, positions, -1)
    gram = half.view(channels * multiplier, channels, positions).transpose(0, 1) @ kernels.mT
    cross = kernels @ problem.cross.view(channels, positions, -1)
    mix: Tensor = torch.linalg.solve(gram.transpose(0, 1).flatten(1), cross.flatten(0, 1))
    return mix.view_as(cross)


def solve_kernels(problem: Problem, kernels: Tensor, mix: Tensor) -> Tensor:
    """The depthwise kernels that are best for these pointwise weights, as many channels at once as `UNKNOWNS` allows.

    One set of channels after the other, the rest held, lowers the error too. Rows come back orthonormal: the span is
    what counts, since the pointwise weights are solved for next.
    """
    channels, multiplier, positions = kernels.shape
    gram = problem.gram.view(channels, positions, channels, positions)
    kernels = kernels.clone()
    residual = problem.cross - problem.gram @ _composed(kernels, mix)
    at_once = max(1, UNKNOWNS // (multiplier * positions))
    for first in range(0, channels, at_once):
        part = slice(first, min(first + at_once, channels))
        size = part.stop - first
        alike = mix[part].flatten(0, 1) @ mix[part].flatten(0, 1).mT
        alike = alike.view(size, multiplier, size, multiplier)
        system = torch.einsum("cpdq,ctdu->ctpduq", gram[part, :, part], alike)
        system = system.reshape(size * multiplier * positions, -1)
        # Where a kernel has no weight, it stays as it was.
        system.diagonal().add_(1e-9 * system.diagonal().mean().clamp(min=1e-30))
        wanted = mix[part] @ residual.view(channels, positions, -1)[part].mT
        step = torch.linalg.solve(system, wanted.flatten()).view_as(wanted)
        kernels[part] += step
        residual -= gram[:, :, part].reshape(len(residual), -1) @ _composed(step, mix[part])
    return _orthonormal(kernels)


def _composed(kernels: Tensor, mix: Tensor) -> Tensor:
    """The dense kernel (channels x positions, outputs)."""
    return (kernels.mT @ mix).flatten(0, 1)


def _orthonormal(kernels: Tensor) -> Tensor:
    columns: Tensor = torch.linalg.qr(kernels.mT).Q
    return columns.mT
