"""Which channels of a network have to be removed together, and where they are read: torch-pruning's dependency graph.

Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023. Only the graph is taken from there. Every group is
checked here, and one that cannot be removed says why.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.channels.dependencies import dependency_graph, unfollowed
from compress.nn.shift import ShiftConv2d
from compress.reconstruct import execution_order
from compress.surgery import describe, kind, tied, why_shared

MAKERS = (nn.Conv2d, nn.Linear, ShiftConv2d)  # the layers that make channels
# What is made of torch's layers has to be able to say its new widths; the sides of its layers that it can say.
_SAYABLE = {
    "Fire": {"squeeze": "io", "expand1": "io", "expand3": "io"},
    "InvertedConv2d": {"project": "o"},
    "SeparableConv2d": {"pointwise": "o"},
    "GroupedConv2d": {"grouped": "o"},
}
ANSWERS = "its channels are the network's answers"
_INPUT = "its channels are the network's input"


@dataclass(frozen=True)
class Member:
    """A layer's part in a group: which of its channels on one side belong to which unit of the group.

    `side`: "out" channels are made, "in" channels are read and mixed, "same" channels pass through one by one.
    `units[i]` is the unit of the channel `index[i]`.
    """

    name: str
    side: str
    index: Tensor
    units: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that stay or go together, in `units` (over groups of a grouped convolution, one channel of each).

    Named after the first layer that makes them. `why` is the reason that none of them can go, "" where they can.
    `bare` are the makers whose channels somebody reads without the scales of a batch norm in between. `undone` is a
    batch norm without scales through which somebody reads channels: it makes good for smaller weights; "" for none.
    """

    name: str
    units: int
    width: int
    members: tuple[Member, ...]
    why: str = ""
    bare: tuple[str, ...] = ()
    undone: str = ""

    def of(self, *sides: str) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.side in sides)


def removable(
    model: nn.Module, found: Mapping[str, nn.Module], left_out: Mapping[str, str], example: Tensor
) -> tuple[tuple[ChannelGroup, ...], dict[str, str]]:
    """The groups whose channels may go; and for each of the `found` makers why its channels stay, "" where they may go.

    `left_out` says why a maker is left out, "" where it is not. A group goes only if none of its makers is left out.

    Raises:
        ConfigError: the network's forward pass cannot be followed.
    """
    inner = {name: module for name, module in model.named_modules() if name and not list(module.children())}
    calls = execution_order(model, {**inner, **found}, example)
    unseen = {name: "its channels cannot be followed" if name in calls else "never reached" for name in found}
    free, why = [], {name: left_out[name] or unseen[name] for name in found}
    for group in find_groups(model, example, calls):
        makers = [member.name for member in group.of("out", "same") if member.name in found]
        reason = next((left_out[name] for name in makers if left_out[name]), "")
        if group.why or reason:
            tied = f"its channels go with those of a layer that is left out ({reason})"
            why.update({name: group.why or left_out[name] or tied for name in makers})
        else:
            free.append(group)
            why.update(dict.fromkeys(makers, ""))
    return tuple(free), why


def find_groups(model: nn.Module, example: Tensor, calls: Mapping[str, int]) -> tuple[ChannelGroup, ...]:
    """All groups of channels of a network; `calls` says how often each layer is called.

    Raises:
        ConfigError: the network's forward pass cannot be followed.
    """
    names, shared = dict(model.named_modules()), tied(model)
    image = nn.Parameter(example)
    graph, library, place = dependency_graph(model, image)
    groups = []
    try:
        for group in graph.get_all_groups(root_module_types=(nn.Conv2d, nn.Linear)):
            groups.append(_read(group, graph, library, image, place, names, calls, shared))
    except Exception as error:  # the library follows foreign code
        raise unfollowed(model, error) from error
    order = {name: at for at, name in enumerate(names)}
    return tuple(sorted(groups, key=lambda group: order[group.name]))


def _read(
    group: Any,
    graph: Any,
    library: Any,
    image: nn.Parameter,
    place: Mapping[int, str],
    names: Mapping[str, nn.Module],
    calls: Mapping[str, int],
    shared: Collection[int],
) -> ChannelGroup:
    root = place[id(group[0].dep.target.module)]
    width = len(group[0].idxs)
    members: list[Member] = []
    reasons: list[str] = []
    sizes: set[int] = set()
    bare: list[str] = []
    undone = ""
    kinds = library.ops.OPTYPE
    through = (kinds.CONCAT, kinds.SPLIT, kinds.ELEMENTWISE, kinds.RESHAPE, kinds.SLICE, kinds.EXPAND, kinds.UNBIND)
    for item in group:
        node, module = item.dep.target, item.dep.target.module
        if node.type == kinds.OUTPUT:
            reasons.append(ANSWERS)
        elif node.type == kinds.PARAMETER:
            reasons.append(_INPUT if module is image else "its channels meet a parameter that belongs to no layer")
        elif node.type in through:
            continue
        else:
            name = place[id(module)]
            out = graph.is_out_channel_pruning_fn(item.dep.handler)
            member, why, per_group = _member(name, module, out, item.idxs, item.root_idxs, width)
            reasons.append(why or _why_bound(name, module, member.side, names, calls, shared))
            members.append(member)
            sizes |= {per_group} if per_group else set()
            if member.side == "out":
                unscaled, norm = _ways_out(node, kinds)
                bare += [name] if unscaled else []
                undone = undone or place.get(id(norm), "")
    if not any(member.side == "out" for member in members):
        reasons.append(_INPUT)
    if not any(member.side == "in" for member in members):
        reasons.append(ANSWERS)
    # Of a grouped convolution as many channels have to go in every group: the same ones.
    units = min(sizes, default=width)
    if any(size % units for size in (*sizes, width)):
        reasons.append("its channels are grouped in two ways that do not fit into each other")
    elif units == 1 and width > 1:
        reasons.append("a grouped convolution with a single channel in each group reads it")
    members = [replace(member, units=member.units % units) for member in members]
    why = next((why for why in reasons if why), "")
    return ChannelGroup(root, units, width, tuple(members), why, tuple(bare), undone)


def _ways_out(maker: Any, kinds: Any) -> tuple[bool, nn.Module | None]:
    """Whether somebody reads what a layer makes without a batch norm's scales; and a norm without scales on a way."""
    bare, undone = False, None
    ways, seen = [(node, None) for node in maker.outputs], set()
    while ways:
        node, norm = ways.pop()
        if (node, norm) in seen or (node.type == kinds.BN and node.module.affine):
            continue
        seen.add((node, norm))
        if node.type in (kinds.CONV, kinds.LINEAR):
            bare, undone = bare or norm is None, undone or norm
        else:
            ways += [(after, node.module if node.type == kinds.BN else norm) for after in node.outputs]
    return bare, undone


def _member(
    name: str, module: nn.Module, out: bool, idxs: list[int], root_idxs: list[int], width: int
) -> tuple[Member, str, int]:
    """A layer's part, why it cannot be changed, and how many channels each of its groups has (0: it has no groups)."""
    index, units = torch.tensor(idxs), torch.tensor(root_idxs)
    why, per_group = "", 0
    size: int
    if isinstance(module, nn.Conv2d) and kind(module) is nn.Conv2d:
        through = 1 < module.groups == module.in_channels == module.out_channels
        side = "same" if through else "out" if out else "in"
        size = module.out_channels if out else module.in_channels
        if module.groups > 1 and not through:
            per_group = size // module.groups
            if idxs != list(range(width)) or size != width:
                why = f"{describe(module)} groups some of its channels with others"
    elif isinstance(module, nn.Linear) and kind(module) is nn.Linear:
        side, size = ("out", module.out_features) if out else ("in", module.in_features)
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        side, size = "same", module.num_features
    elif isinstance(module, nn.PReLU):
        side, size = "same", int(module.num_parameters) if module.num_parameters > 1 else width
    else:
        return Member(name, "same", index, units), f"{describe(module)} ({name}) is of no kind that can be thinned", 0
    if side == "out" and sorted(idxs) != list(range(size)):
        why = f"a padded or cut shortcut ties {width} channels to {size} of {name}"
    elif len(idxs) % width or not all(0 <= i < size for i in idxs) or any(units.bincount(minlength=width).diff() != 0):
        why = f"how its channels are laid out for {name} is not understood"
    return Member(name, side, index, units), why, per_group


def _why_bound(
    name: str,
    module: nn.Module,
    side: str,
    names: Mapping[str, nn.Module],
    calls: Mapping[str, int],
    shared: Collection[int],
) -> str:
    if why_shared(names[name], shared):
        return f"{name} has a parameter that is another layer's too"
    if calls.get(name, 1) > 1:
        return f"{name} is called {calls[name]} times in a forward pass"
    steps = name.split(".")
    for depth in range(len(steps) - 1, 0, -1):
        above = names[".".join(steps[:depth])]
        if kind(above).__module__.startswith("compress.nn."):
            sides = _SAYABLE.get(kind(above).__name__, {}).get(".".join(steps[depth:]), "")
            ordered = getattr(above, "reorder", False) and side == "out" and steps[-1] != "squeeze"
            if ordered or (side[0] not in sides):
                return f"{describe(above)} has no setting for other widths there"
    return ""
