"""Training under which channels that go together shrink together: a group lasso on what scales them.

Yuan and Lin, "Model Selection and Estimation in Regression with Grouped Variables", JRSS B 2006 (the group lasso); Liu
et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017 (on batch norm's scales); Fang
et al., "DepGraph", CVPR 2023, section 3.4 (over all layers whose channels depend on each other).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.channels.groups import ChannelGroup, Member
from compress.nn.shift import ShiftConv2d

EPSILON = 1e-8  # below its root, 1e-4, the pull fades, so that the gradient at zero is finite


class ChannelLasso(nn.Module):
    """A network that trains under a group lasso: `penalty()` is `l1` times the sum of all units' sizes.

    What it computes is what the network computes, and its tensors have the names that they have there. It stands around
    the network, and not in it as a layer, because an `nn.Sequential` would call that.
    """

    def __init__(self, network: nn.Module, groups: Sequence[ChannelGroup], l1: float) -> None:
        super().__init__()
        self.network, self.l1 = network, l1
        device = next(network.parameters()).device
        self.groups = tuple(_on(group, device) for group in groups)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return out

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]  # torch overloads it
        state: dict[str, Any] = self.network.state_dict(*args, **kwargs)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self.network.load_state_dict(state_dict, *args, **kwargs)

    def penalty(self) -> Tensor:
        """What the channels add to the training loss, while they train."""
        squares = torch.cat([unit_squares(self.network, group) for group in self.groups])
        return self.l1 * (squares + EPSILON).sqrt().sum()


def unit_squares(model: nn.Module, group: ChannelGroup) -> Tensor:
    """For each unit of a group the squares of what scales it, summed; differentiable.

    That is the scales of all its batch norms, and the weights of the layers that make it with no such norm behind them.
    The length of these is about 1, as scales are, however wide a layer is and however many inputs it reads, so that one
    `l1` suits both. Weights before a norm without scales can shrink in vain: not for groups with one (`undone`).
    """
    layers = [(member, model.get_submodule(member.name)) for member in group.members]
    norms = [(member, layer) for member, layer in layers if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)]
    scaling: list[tuple[Member, Tensor]] = [(member, norm.weight) for member, norm in norms if norm.affine]
    scaling += [(m, _weight(layer)) for m, layer in layers if m.side == "out" and m.name in group.bare]
    total = scaling[0][1].new_zeros(group.units)
    for member, values in scaling:
        squares = values.square().flatten(1).sum(1) if values.dim() > 1 else values.square()
        total = total.index_add(0, member.units.to(values.device), squares[member.index.to(values.device)])
    return total


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.pointwise.weight if isinstance(layer, ShiftConv2d) else layer.weight
    assert isinstance(weight, Tensor)
    return weight


@torch.no_grad()
def unit_sizes(model: nn.Module, group: ChannelGroup) -> Tensor:
    """What the lasso sums up: the size of each unit of a group, (units,), on the CPU."""
    return unit_squares(model, group).sqrt().cpu()


def _on(group: ChannelGroup, device: torch.device) -> ChannelGroup:
    members = (replace(m, index=m.index.to(device), units=m.units.to(device)) for m in group.members)
    return replace(group, members=tuple(members))
