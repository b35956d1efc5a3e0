"""How much channels matter by what makes them: simple scores, one for each unit of a group, larger is better.

Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (l1, l2); Liu et al., "Learning Efficient Convolutional
Networks through Network Slimming", ICCV 2017 (bn); He et al., "Filter Pruning via Geometric Median", CVPR 2019 (fpgm);
Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019 (taylor).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.channels.groups import ChannelGroup
from compress.errors import ConfigError
from compress.nn.shift import ShiftConv2d
from compress.task import Batch

SCORES = ("l1", "l2", "bn", "fpgm", "taylor")


def unit_scores(model: nn.Module, group: ChannelGroup, by: str, taylor: Mapping[Tensor, Tensor]) -> Tensor:
    """A score for each unit, summed over the layers that make it; `taylor` has those of the weights' channels."""
    total = torch.zeros(group.units, dtype=torch.float64)
    found = False
    for member in group.of("same") if by == "bn" else group.of("out", "same"):
        layer = model.get_submodule(member.name)
        norm = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
        if norm != (by == "bn") or isinstance(layer, nn.PReLU):
            continue
        holder = layer.pointwise if isinstance(layer, ShiftConv2d) else layer
        weight = getattr(holder, "weight", None)
        if weight is not None:
            found = True
            scores = taylor[weight] if by == "taylor" else _of_channels(weight, by)
            total.index_add_(0, member.units, scores[member.index])
    if not found:
        raise ConfigError(
            f"`by` (={by!r}) finds nothing to go by in the channels of {group.name}: no batch norm scales them; choose "
            "`reconstruction`, or put the layer into `exclude`."
        )
    return total


def _of_channels(weight: Tensor, by: str) -> Tensor:
    rows = weight.detach().flatten(1) if weight.dim() > 1 else weight.detach().unsqueeze(1)
    if by == "fpgm":
        return torch.cdist(rows.cpu().double(), rows.cpu().double()).sum(1)
    norms: Tensor = rows.norm(p=2 if by == "l2" else 1, dim=1)
    return norms.cpu().double()


def taylor_scores(model: nn.Module, batches: Iterable[Batch]) -> dict[Tensor, Tensor]:
    """For each weight of a layer, by output: (weight times gradient, summed over the output's weights)^2.

    Of the cross entropy; added up over the batches.
    """
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    trained = [weight.requires_grad for weight in weights]
    scores: dict[Tensor, Tensor] = {weight: torch.zeros(len(weight), dtype=torch.float64) for weight in weights}
    for weight in weights:
        weight.requires_grad_(True)
    for x, y in batches:
        with torch.enable_grad():
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y), weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                scores[weight] += (weight.detach() * gradient).flatten(1).sum(1).square().cpu().double()
    for weight, before in zip(weights, trained, strict=True):
        weight.requires_grad_(before)
    return scores
