"""Channels that nothing reads any more: every weight that meets them is zero, so that they can go without a trace."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.channels.groups import ChannelGroup, find_groups
from compress.channels.readers import Reader
from compress.channels.slices import bake_masks, put_masks, why_not_bare, why_not_without
from compress.nn.shift import ShiftConv2d
from compress.reconstruct import execution_order


def without_unread(
    model: nn.Module, near: Collection[str], left_out: Mapping[str, str], example: Tensor
) -> tuple[nn.Module, dict[str, list[int]], dict[str, str]]:
    """The network (in evaluation mode) without the channels that nothing reads, of groups that the layers `near` touch.

    Groups with a layer that is `left_out` for a reason stay, and so do those without which the network would not run or
    not answer the same. Also gives back the width of each group that got narrower, [left, before], and by layer what
    has to stay, with the reason: what layers `near` do not read, and what nothing reads. The given network stays as it
    was.

    Raises:
        ConfigError: the network's forward pass cannot be followed, or a schedule of `Prune` is still running.
    """
    groups = find_groups(model, example, execution_order(model, dict(model.named_modules()), example))
    gone: dict[str, Tensor] = {}
    kept: dict[str, list[str]] = {}
    for group in groups:
        names = [member.name for member in group.members]
        excluded = next((f"{name} is left out ({left_out[name]})" for name in names if left_out.get(name)), "")
        if group.why or excluded:
            for name, said in _unread_by(model, group, near).items():
                kept.setdefault(name, []).append(f"{said}: {group.why or excluded}")
            continue
        units = unread_units(model, group)
        if not len(units) or not any(name in near for name in names):
            continue
        why = "a layer keeps one at least" if len(units) == group.units else _why_computed(model, group)
        if why:
            kept.setdefault(group.name, []).append(_stay(group, units, why))
        else:
            gone[group.name] = units
    thin, gone, failed = _without(model, groups, gone, example)
    by_name = {group.name: group for group in groups}
    for name, (units, why) in failed.items():
        kept.setdefault(name, []).append(_stay(by_name[name], units, why))
    left = {name: (by_name[name].units - len(units), by_name[name]) for name, units in gone.items()}
    widths = {n: [units * group.width // group.units, group.width] for n, (units, group) in left.items()}
    return thin, widths, {name: "; ".join(said) for name, said in kept.items()}


def _without(
    model: nn.Module, groups: Sequence[ChannelGroup], wanted: Mapping[str, Tensor], example: Tensor
) -> tuple[nn.Module, dict[str, Tensor], dict[str, tuple[Tensor, str]]]:
    """The network without the units `wanted`, as far as it is the same; which went; which did not, and why."""
    if not wanted:
        return model, {}, {}
    thin, why = _cut(model, groups, wanted, example)
    if not why:
        return thin, dict(wanted), {}
    gone: dict[str, Tensor] = {}
    failed: dict[str, tuple[Tensor, str]] = {}
    thin = model
    for name, units in wanted.items():
        narrower, why = _cut(model, groups, {**gone, name: units}, example)
        if why:
            failed[name] = units, why
        else:
            thin, gone[name] = narrower, units
    return thin, gone, failed


def _cut(
    model: nn.Module, groups: Sequence[ChannelGroup], gone: Mapping[str, Tensor], example: Tensor
) -> tuple[nn.Module, str]:
    """A copy without the units `gone`, and why it is not the same network, "" where it is."""
    thin = copy.deepcopy(model)
    masks = bake_masks(thin, [each for group in groups if group.name in gone for each in _holders(model, group)])
    why = why_not_without(thin, groups, gone, example)
    if not why:
        put_masks(thin, masks, groups, gone)
    return thin, why


def _holders(model: nn.Module, group: ChannelGroup) -> list[str]:
    """The modules whose weights have the group's channels."""
    names = [member.name for member in group.members]
    return [f"{name}.pointwise" if isinstance(model.get_submodule(name), ShiftConv2d) else name for name in names]


def _why_computed(model: nn.Module, group: ChannelGroup) -> str:
    return next(filter(None, (why_not_bare(model, name) for name in _holders(model, group))), "")


def _stay(group: ChannelGroup, units: Tensor, why: str) -> str:
    return f"{len(units) * group.width // group.units} of {group.width} channels that nothing reads stay: {why}"


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
    found: dict[str, set[int]] = {}
    width = {}
    for member in group.of("in"):
        layer = model.get_submodule(member.name)
        if member.name in near and isinstance(layer, ShiftConv2d):
            idle = (~layer.carrying().any(1)).nonzero().flatten().cpu()
            found.setdefault(member.name, set()).update(member.index[torch.isin(member.index, idle)].tolist())
            width[member.name] = layer.in_channels
    return {
        name: f"{len(unread)} of {width[name]} input channels that it does not read stay"
        for name, unread in found.items()
        if unread
    }
