"""Whole residual branches: where all the channels inside one go, its layers go too, and the shortcut stays alone.

Veit, Wilber and Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", NeurIPS 2016.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from compress.channels.groups import ChannelGroup
from compress.channels.on_demand import OnDemand
from compress.nn.flow import in_place
from compress.nn.places import trace, traced_shapes
from compress.nn.shift import ShiftConv2d
from compress.nn.zero import Zero
from compress.surgery import kind, replace

_ENDS = (nn.Conv2d, ShiftConv2d)  # the layers that a branch can end with


@dataclass(frozen=True)
class Branch:
    """What leads to nothing but one operand of an addition, which its module `last` gives.

    `own` are the modules that are called there only, `shared` those without weights that are called elsewhere too.
    `inner` are the other groups of channels in the branch, which go with it. Named as the nodes of a trace are,
    `addition` is where it ends, and `shortcut` the other operand.
    """

    own: tuple[str, ...]
    shared: tuple[str, ...]
    last: str
    inner: tuple[str, ...]
    addition: str
    shortcut: str
    like_input: bool = False  # how `Zero` is made

    def take_out(self, model: nn.Module) -> None:
        """Put `Zero` in the place of the last module, `Identity` in those of the others."""
        for name in self.own:
            old = model.get_submodule(name)
            new = Zero(self.like_input) if name == self.last else nn.Identity()
            replace(model, old, new.train(old.training))
        for name in self.shared:
            module = model.get_submodule(name)
            if getattr(module, "inplace", False):
                module.inplace = False  # type: ignore[assignment]  # a flag: it is the shortcut now that it reads


Branches = Mapping[str, Branch]  # by the group that the branch's last layer reads


def removable_branches(
    model: nn.Module, groups: Sequence[ChannelGroup], left_out: Mapping[str, str], example: Tensor
) -> dict[str, Branch]:
    """The branches without which the network runs, tried out on `example`; of those that are added up all but one.

    A branch with a layer that is `left_out` for a reason stays, and so does one that the forward pass reads elsewhere.

    Raises:
        ValueError: the model cannot be traced.
    """
    walk = OnDemand(model, [])
    shapes = traced_shapes(model, walk.nodes[0].graph, example)
    found: dict[str, Branch] = {}
    additions: set[str] = set()
    for group in groups:
        branch = _branch(model, walk, group, groups)
        if branch is None or any(left_out.get(name) for name in branch.own):
            continue
        if shapes.get(branch.addition) != shapes.get(branch.shortcut) or branch.addition in additions:
            continue
        for each in (branch, dataclasses.replace(branch, like_input=True)):
            if group.name not in found and _runs_without(model, each, example):
                found[group.name] = each
                additions.add(branch.addition)
    return found


def _branch(model: nn.Module, walk: OnDemand, group: ChannelGroup, groups: Sequence[ChannelGroup]) -> Branch | None:
    calls = {str(node.target): node for node in walk.nodes if node.op == "call_module"}
    readers = group.of("in")
    if group.why or len(readers) != 1 or readers[0].name not in calls:
        return None
    reader, node = model.get_submodule(readers[0].name), calls[readers[0].name]
    addition = walk.addition(node)
    if kind(reader) not in _ENDS or len(readers[0].index) != reader.in_channels or addition is None:
        return None
    last = next(iter(node.users)) if walk.norm_after(node) is not None else node
    inside = _only_for(last, walk.nodes)
    names = {str(each.target): None for each in inside if each.op == "call_module"}
    whole = [each for each in groups if not each.why and {member.name for member in each.members} <= set(names)]
    # What computes with weights has to be of these groups, and may not be called elsewhere too.
    members = {str(last.target), *(member.name for each in whole for member in each.members)}
    often = Counter(each.target for each in walk.nodes)
    shared = tuple(name for name in names if often[name] > sum(each.target == name for each in inside))
    weighted = {name for name in names if model.get_submodule(name).state_dict()}
    if group not in whole or not weighted <= members or weighted.intersection(shared):
        return None
    if any(each.op == "get_attr" or (each.op != "call_module" and in_place(each, model)) for each in inside):
        return None
    inner = tuple(each.name for each in whole if each is not group)
    own = tuple(name for name in names if name not in shared)
    return Branch(own, shared, str(last.target), inner, addition[0].name, addition[1].name)


def _only_for(node: fx.Node, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes that are computed for this one only, and itself, the last first."""
    found = {node: None}
    for each in reversed(nodes):
        if each.op != "placeholder" and each.users and all(user in found for user in each.users):
            found[each] = None
    return list(found)


@torch.no_grad()
def _runs_without(model: nn.Module, branch: Branch, example: Tensor) -> bool:
    """Whether the network without the branch can be traced, and answers as it does where the branch gives zero."""
    silent, without = copy.deepcopy(model), copy.deepcopy(model)
    silent.get_submodule(branch.last).register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))
    branch.take_out(without)
    try:
        trace(without)
        return torch.allclose(silent(example), without(example), rtol=1e-4, atol=1e-5)
    except Exception:  # the forward pass is foreign code
        return False
