"""How much channels matter by what makes them: simple scores, one for each unit of a group, larger is better.

Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (l1, l2); Liu et al., "Learning Efficient Convolutional
Networks through Network Slimming", ICCV 2017 (bn); He et al., "Filter Pruning via Geometric Median", CVPR 2019 (fpgm);
Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019 (taylor).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.channels.groups import ChannelGroup
from compress.errors import ConfigError
from compress.nn.shift import ShiftConv2d
from compress.task import Batch

SCORES = ("l1", "l2", "bn", "fpgm", "taylor")


def unit_scores(model: nn.Module, group: ChannelGroup, by: str) -> Tensor:
    """A score for each unit, summed over the layers that make it; for `taylor` the weights must hold gradients."""
    total = torch.zeros(group.units, dtype=torch.float64)
    found = False
    for member in group.of("same") if by == "bn" else group.of("out", "same"):
        layer = model.get_submodule(member.name)
        norm = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        if norm != (by == "bn") or isinstance(layer, nn.PReLU):
            continue
        holder = layer.pointwise if isinstance(layer, ShiftConv2d) else layer
        if getattr(holder, "weight", None) is not None:
            found = True
            total.index_add_(0, member.units, _of_channels(holder.weight, by)[member.index])  # type: ignore[arg-type]  # a tensor
    if not found:
        raise ConfigError(
            f"`by` (={by!r}) finds nothing to go by in the channels of {group.name}: no batch norm scales them; choose "
            "`reconstruction`, or put the layer into `exclude`."
        )
    return total


def _of_channels(weight: Tensor, by: str) -> Tensor:
    rows = weight.detach().flatten(1) if weight.dim() > 1 else weight.detach().unsqueeze(1)
    if by == "taylor":
        assert weight.grad is not None
        shares: Tensor = (rows * weight.grad.flatten(1)).sum(1).square().cpu().double()
        return shares
    if by == "fpgm":
        return torch.cdist(rows.cpu().double(), rows.cpu().double()).sum(1)
    norms: Tensor = rows.norm(p=2 if by == "l2" else 1, dim=1)
    return norms.cpu().double()


def take_gradients(model: nn.Module, batches: Sequence[Batch]) -> None:
    """Leave in every parameter the gradient of the cross entropy over these batches."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(True).zero_grad()
    with torch.enable_grad():
        for x, y in batches:
            F.cross_entropy(model(x), y, reduction="sum").backward()  # type: ignore[no-untyped-call]  # in torch
    for parameter, before in wanted.items():
        parameter.requires_grad_(before)
