"""Group: convolutions become grouped convolutions over shuffled channels.

What it does. Each convolution becomes a `GroupedConv2d`: its input channels are dealt out to `groups` groups, each of
which makes its share of the outputs from its own inputs alone. It starts from the trained weights: each input channel
goes to the group whose outputs take most of their energy from it on real activations, and the weights that are left are
solved by least squares against the original layer's output, layer by layer. With one group the layer is exactly the
convolution.

When to use it, and when not. It buys bytes and multiply-adds: a `groups`-th of both are left. Putting the channels in
order moves memory, and small groups keep arithmetic units waiting, so time falls less than that. Expect to fine-tune
afterwards.

Knobs. `groups`: how many. `shuffle`: `data` chooses each group's inputs as above, `fixed` gives every group every
`groups`-th channel, as a channel shuffle does. `images`: how many calibration images the start is solved on. `ridge`:
pulls the weights towards zero, as a share of the activations' mean power. `gate`: none, macs, bytes or latency: layers
that do not get cheaper by it are kept.

Measured. ResNet-20 on CIFAR-10 (91.73 %): 71.86 % before training and 88.78 after five epochs in two groups, 37.43 and
82.77 in four. Beside other operators: `benchmarks/operators.py`.

Reference. Zhang et al., CVPR 2018; Huang et al., CVPR 2018.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.nn.geometry import spatial_config
from compress.nn.grouped import GroupedConv2d
from compress.reconstruct import Normal, relative_error, solve
from compress.stage import Edit, Keep
from compress.substitute import Old, Substitution, check_settings, substitute
from compress.surgery import layers, left_out
from compress.task import Task, Work

SHUFFLES = ("data", "fixed")


@dataclass(frozen=True)
class Group(Substitution):
    """Settings of the stage; see the module's card."""

    groups: int = 2
    shuffle: str = "data"

    def __post_init__(self) -> None:
        check_settings(self, groups=1)
        if self.shuffle not in SHUFFLES:
            raise ConfigError(f"`shuffle` (={self.shuffle!r}) must be one of {', '.join(SHUFFLES)}.")

    def check(self, model: nn.Module) -> None:
        """Raise `ConfigError` for patterns that match nothing."""
        left_out(model, layers(model, self.kinds), self.include, self.exclude)

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        self.check(model)
        return substitute(model, task, work, self, self._start, {"groups": self.groups})

    def _start(self, old: Old) -> tuple[nn.Module, float]:
        if old.layer.groups > 1:
            raise Keep(f"it has groups (={old.layer.groups}) already")
        for what, channels in (("inputs", old.layer.in_channels), ("outputs", old.layer.out_channels)):
            if channels % self.groups:
                raise Keep(f"its {channels} {what} do not divide into {self.groups} groups")
        new = empty_grouped(old.layer, self.groups)
        if self.groups == 1:
            copy_kernel(old.layer, new)
            return new, 0.0
        normal = old.normal()
        if self.shuffle == "data":
            new.order.copy_(deal_out(contributions(normal, new, self.ridge), new.order))
        return new, fit_grouped(new, normal, self.ridge)


def empty_grouped(layer: nn.Conv2d, groups: int) -> GroupedConv2d:
    """A grouped convolution of the convolution's geometry, on its device, not yet fitted."""
    new = GroupedConv2d(
        layer.in_channels,
        layer.out_channels,
        groups=groups,
        bias=layer.bias is not None,
        **spatial_config(layer),
    )
    return new.to(device=layer.weight.device, dtype=layer.weight.dtype)


@torch.no_grad()
def copy_kernel(layer: nn.Conv2d, new: GroupedConv2d) -> None:
    """One group: the weights are the kernel's own, and the layer is exactly the convolution."""
    new.grouped.weight.copy_(layer.weight)
    if layer.bias is not None and new.grouped.bias is not None:
        new.grouped.bias.copy_(layer.bias)


def contributions(normal: Normal, new: GroupedConv2d, ridge: float) -> Tensor:
    """How much energy each input channel gives to the outputs of each group: (in_channels, groups)."""
    channels, positions = new.in_channels, math.prod(new.kernel_size)
    features = channels * positions
    gram = normal.gram[0][:features, :features].view(channels, positions, channels, positions)
    blocks = gram.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # of each channel by itself
    weights = solve(normal, ridge)[0][:features].reshape(channels, positions, -1)
    energy = (weights * (blocks @ weights)).sum(1)
    return energy.view(channels, new.groups, -1).sum(-1)


def deal_out(gains: Tensor, order: Tensor) -> Tensor:
    """Channels in an order that gives the groups, each as large as the next, the largest sum of `gains`.

    Starts from `order` and exchanges two channels at a time for as long as that helps.
    """
    channels, groups = gains.shape
    gains = gains.double()  # an exchange within a group gains exactly 0, or nearly
    group = torch.empty(channels, dtype=torch.long)
    group[order.cpu()] = torch.arange(groups).repeat_interleave(channels // groups)
    while True:
        there = gains[:, group]  # of channel a in the group of channel b
        here = there.diagonal()
        better = there + there.mT - here - here[:, None]
        best = int(better.argmax())
        if better.flatten()[best] <= 1e-9 * gains.abs().sum():
            return group.argsort(stable=True)
        pair = torch.tensor(divmod(best, channels))
        group[pair] = group[pair.flip(0)]


@torch.no_grad()
def fit_grouped(new: GroupedConv2d, normal: Normal, ridge: float) -> float:
    """Solve for the weights of every group from its inputs; gives back the relative squared error."""
    positions = math.prod(new.kernel_size)
    inputs, outputs = new.in_channels // new.groups, new.out_channels // new.groups
    left = 1.0
    for group, channels in enumerate(new.order.cpu().view(-1, inputs)):
        rows = (channels.unsqueeze(1) * positions + torch.arange(positions)).flatten()
        if normal.bias:
            rows = torch.cat((rows, torch.tensor([normal.gram.shape[-1] - 1])))
        made = slice(group * outputs, (group + 1) * outputs)
        part = Normal(normal.gram[:, rows][:, :, rows], normal.cross[:, rows][:, :, made], normal.power, normal.bias)
        weights = solve(part, ridge)[0]
        left -= 1 - relative_error(part, 0, torch.arange(len(rows)), weights)
        if normal.bias and new.grouped.bias is not None:
            new.grouped.bias[made] = weights[-1].to(new.grouped.bias)
            weights = weights[:-1]
        new.grouped.weight[made] = weights.mT.reshape(new.grouped.weight[made].shape).to(new.grouped.weight)
    return max(left, 0.0)
