"""Channels that nothing reads any more: every weight that meets them is zero, so that they can go without a trace."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from compress.channels.groups import ChannelGroup, find_groups
from compress.channels.readers import Reader
from compress.channels.slices import bake_masks, put_masks, remove_unread
from compress.nn.shift import ShiftConv2d
from compress.reconstruct import execution_order


def without_unread(
    model: nn.Module, near: Collection[str], left_out: Mapping[str, str], example: Tensor
) -> tuple[nn.Module, dict[str, list[int]], dict[str, str]]:
    """The network (in evaluation mode) without the channels that nothing reads, of groups that the layers `near` touch.

    Groups with a layer that is `left_out` for a reason stay. Also gives back the width of each group that got narrower,
    [left, before], and what layers `near` do not read but has to stay, with the reason.

    Raises:
        ConfigError: the network's forward pass cannot be followed, it does not run with other widths, or it holds
            weights that are computed by more than a mask. The given network is as it was.
    """
    groups = find_groups(model, example, execution_order(model, dict(model.named_modules()), example))
    gone: dict[str, Tensor] = {}
    kept: dict[str, str] = {}
    for group in groups:
        names = [member.name for member in group.members]
        excluded = next((f"{name} is left out ({left_out[name]})" for name in names if left_out.get(name)), "")
        if group.why or excluded:
            kept |= {name: f"{said}: {group.why or excluded}" for name, said in _unread_by(model, group, near).items()}
            continue
        units = unread_units(model, group)
        if 0 < len(units) < group.units and any(name in near for name in names):
            gone[group.name] = units
    if not gone:
        return model, {}, kept
    thin = copy.deepcopy(model)
    masks = bake_masks(thin)
    remove_unread(thin, groups, gone, example)
    put_masks(thin, masks, groups, gone)
    widths = {group.name: group for group in groups}
    left = {name: (widths[name].units - len(units), widths[name]) for name, units in gone.items()}
    return thin, {n: [units * group.width // group.units, group.width] for n, (units, group) in left.items()}, kept


def unread_units(model: nn.Module, group: ChannelGroup) -> Tensor:
    """The units of a group of channels that no layer reads."""
    read = torch.zeros(group.units, dtype=torch.bool)
    for member in group.of("in"):
        reader = Reader(member.name, model.get_submodule(member.name), None)
        columns = reader.columns()
        for index, rows in reader.rows(member, group.units):
            read |= columns[index][rows].flatten(1).any(1)
    return (~read).nonzero().flatten()


def _unread_by(model: nn.Module, group: ChannelGroup, near: Collection[str]) -> dict[str, str]:
    """Of the shift layers `near` that read the group, how many of its channels each does without."""
    found = {}
    for member in group.of("in"):
        layer = model.get_submodule(member.name)
        if member.name in near and isinstance(layer, ShiftConv2d):
            unread = int((~layer.carrying().any(1)).sum())
            if unread:
                found[member.name] = f"{unread} of {layer.in_channels} input channels that it does not read stay"
    return found
