"""Whole residual branches: where all the channels inside one go, its layers go too, and the shortcut stays alone.

Veit, Wilber and Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", NeurIPS 2016.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from compress.channels.groups import ChannelGroup
from compress.channels.on_demand import OnDemand
from compress.nn.flow import in_place
from compress.nn.shift import ShiftConv2d
from compress.nn.zero import Zero
from compress.surgery import kind, replace

_ENDS = (nn.Conv2d, ShiftConv2d)  # the layers that a branch can begin and end with


@dataclass(frozen=True)
class Branch:
    """All modules that lead to nothing but one operand of an addition; `last` is the one whose output that is."""

    modules: tuple[str, ...]
    last: str
    addition: str  # the name of its node

    def take_out(self, model: nn.Module) -> None:
        """Put `Zero` in the place of the last module, `Identity` in those of the others."""
        for name in self.modules:
            old = model.get_submodule(name)
            new = Zero() if name == self.last else nn.Identity()
            replace(model, old, new.train(old.training))


def branches_of(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Branch]:
    """The branches that some of the groups are all channels of, by the group's name.

    Raises:
        ValueError: the model cannot be traced.
    """
    walk = OnDemand(model, []) if groups else None
    found = {group.name: _branch(model, walk, group) for group in groups if walk is not None}
    return {name: branch for name, branch in found.items() if branch is not None}


def removable_branches(
    model: nn.Module, groups: Sequence[ChannelGroup], left_out: Mapping[str, str], example: Tensor
) -> set[str]:
    """The names of the groups of which no channel has to stay, tried out on `example`; at most one for each addition.

    Branches stay where a layer in them is `left_out` for a reason, or the forward pass depends on what they give: where
    it adds to it in place, say.
    """
    found: set[str] = set()
    additions: set[str] = set()
    for name, branch in branches_of(model, groups).items():
        kept = any(left_out.get(module) for module in branch.modules)
        if not kept and branch.addition not in additions and _runs_without(model, branch, example):
            found.add(name)
            additions.add(branch.addition)
    return found


def _branch(model: nn.Module, walk: OnDemand, group: ChannelGroup) -> Branch | None:
    makers, readers = group.of("out"), group.of("in")
    calls = {str(node.target): node for node in walk.nodes if node.op == "call_module"}
    if group.why or len(makers) != 1 or len(readers) != 1 or any(m.name not in calls for m in group.members):
        return None
    first, reader = (model.get_submodule(member.name) for member in (makers[0], readers[0]))
    if kind(first) not in _ENDS or kind(reader) not in _ENDS or len(readers[0].index) != reader.in_channels:
        return None
    node = calls[readers[0].name]
    addition = walk.addition(node)
    if addition is None:
        return None
    operand = next(iter(node.users)) if walk.norm_after(node) is not None else node
    inside = _only_for(operand, walk.nodes)
    names = [str(each.target) for each in inside if each.op == "call_module"]
    # What computes with weights has to be of the group, and to be called here alone.
    members = {str(operand.target), *(member.name for member in group.members)}
    weighted = {name for name in names if model.get_submodule(name).state_dict()}
    often = Counter(each.target for each in walk.nodes)
    if not weighted <= members <= set(names) or any(often[name] > 1 for name in names):
        return None
    if any(each.op == "get_attr" or (each.op != "call_module" and in_place(each, model)) for each in inside):
        return None
    return Branch(tuple(names), str(operand.target), addition[0].name)


def _only_for(node: fx.Node, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes that are computed for this one only, and itself, the last first."""
    found = {node: None}
    for each in reversed(nodes):
        if each.op != "placeholder" and each.users and all(user in found for user in each.users):
            found[each] = None
    return list(found)


@torch.no_grad()
def _runs_without(model: nn.Module, branch: Branch, example: Tensor) -> bool:
    """Whether the network without the branch answers as it does when the branch gives zero."""
    silent, without = copy.deepcopy(model), copy.deepcopy(model)
    silent.get_submodule(branch.last).register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))
    branch.take_out(without)
    try:
        return torch.allclose(silent(example), without(example), rtol=1e-4, atol=1e-5)
    except Exception:  # the forward pass is foreign code
        return False
