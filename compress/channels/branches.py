"""Whole residual branches: where all the channels inside one go, its layers go too, and the shortcut stays alone.

Veit, Wilber and Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", NeurIPS 2016.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn

from compress.channels.groups import ChannelGroup
from compress.channels.on_demand import OnDemand
from compress.nn.flow import in_place
from compress.nn.places import traced_shapes
from compress.nn.shift import ShiftConv2d
from compress.nn.zero import Zero
from compress.surgery import kind
from compress.surgery import replace as put

_ENDS = (nn.Conv2d, ShiftConv2d)  # the layers that a branch can end with


@dataclass(frozen=True)
class Branch:
    """All modules that lead to nothing but one operand of an addition; `last` is the one whose output that is.

    Those that are `shared` are called elsewhere too. `inner` are the other groups of channels in the branch, which go
    with it, `zero` is what is put in the place of its `last`.
    """

    modules: tuple[str, ...]
    shared: tuple[str, ...]
    last: str
    addition: str  # the name of its node in a trace
    shortcut: str  # that of its other operand
    inner: tuple[str, ...]
    zero: Zero = field(default_factory=Zero)

    def take_out(self, model: nn.Module) -> None:
        """Put `zero` in the place of the last module, `Identity` in those of the others."""
        for name in self.modules:
            old = model.get_submodule(name)
            new = copy.deepcopy(self.zero) if name == self.last else nn.Identity()
            put(model, old, new.train(old.training))
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
        if branch is None or any(left_out.get(name) for name in branch.modules):
            continue
        if shapes[branch.addition] != shapes[branch.shortcut] or branch.addition in additions:
            continue
        runs = _that_runs(model, branch, shapes[branch.addition], example)
        if runs is not None:
            found[group.name] = runs
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
    return Branch(own, shared, str(last.target), addition[0].name, addition[1].name, inner)


def _only_for(node: fx.Node, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes that are computed for this one only, and itself, the last first."""
    found = {node: None}
    for each in reversed(nodes):
        if each.op != "placeholder" and each.users and all(user in found for user in each.users):
            found[each] = None
    return list(found)


@torch.no_grad()
def _that_runs(model: nn.Module, branch: Branch, shape: tuple[int, ...], example: Tensor) -> Branch | None:
    """The branch, which gives `shape`, with a `zero` that the network runs with; None where there is none.

    It has to answer as it does where the branch as it is gives zero.
    """
    silent = copy.deepcopy(model)
    silent.get_submodule(branch.last).register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))
    wanted = silent(example)
    without = copy.deepcopy(model)
    branch.take_out(without)
    sizes: list[torch.Size] = []  # of what is left to lead to the `zero`
    without.get_submodule(branch.last).register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    if _gives(without, example, wanted):
        return branch
    if not sizes or not len(shape) == len(sizes[0]) == 4:
        return None
    shaped = replace(branch, zero=Zero(shape[1], max(1, round(sizes[0][-1] / shape[-1]))))
    without = copy.deepcopy(model)
    shaped.take_out(without)
    return shaped if _gives(without, example, wanted) else None


def _gives(model: nn.Module, example: Tensor, wanted: Tensor) -> bool:
    try:
        return torch.allclose(model(example), wanted, rtol=1e-4, atol=1e-5)
    except Exception:  # the forward pass is foreign code
        return False
