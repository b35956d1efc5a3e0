"""Taking channels out of layers: tensors are cut, and the layer says its new widths."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.channels.branches import Branches
from compress.channels.groups import ChannelGroup
from compress.errors import ConfigError, DataError
from compress.lower.plain import bake
from compress.nn.displace import Shift2d
from compress.nn.masked import MaskedWeight, mask_of, put_mask
from compress.nn.shift import ShiftConv2d
from compress.surgery import kind

Removed = Mapping[str, Tensor]  # group -> the units that go
CLOSE = 1e-3  # of the largest answer: so far rounding may take the cut network from the one it was cut from


@torch.no_grad()
def remove(
    model: nn.Module, groups: Sequence[ChannelGroup], removed: Removed, branches: Branches | None = None
) -> None:
    """Take the units `removed` out of every layer that has them. Weights must not be parametrized.

    Where all units of a group go, it has to be one of `branches`, or inside one, whose layers go too.
    """
    empty = {group.name for group in groups if len(removed.get(group.name, ())) == group.units}
    going = {name: branch for name, branch in (branches or {}).items() if name in empty}
    assert empty == {*going, *(inner for branch in going.values() for inner in branch.inner)}
    for (name, side), leaving in _leaving([group for group in groups if group.name not in empty], removed).items():
        if len(leaving):
            _cut(model.get_submodule(name), side, leaving)
            _say_widths(model, name)
    for branch in going.values():
        branch.take_out(model)


def remove_unread(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    removed: Removed,
    example: Tensor,
    branches: Branches | None = None,
) -> None:
    """Take channels out that nothing reads, as what reads them is zero already, and see that this changes nothing.

    Raises:
        ConfigError: the network does not run with other widths, or answers otherwise.
    """
    whole = copy.deepcopy(model)
    why = why_not_without(model, groups, removed, example, branches)
    if why:
        alone = [name for name in removed if _fails_alone(whole, groups, removed, name, example, branches or {})]
        where = f"put {', '.join(alone)}" if alone else "put the layers before that place"
        raise ConfigError(f"{why}; {where} into `exclude`.")


def _fails_alone(
    model: nn.Module, groups: Sequence[ChannelGroup], removed: Removed, name: str, example: Tensor, branches: Branches
) -> bool:
    """Whether the network is not the same without the units of this group alone."""
    group = next(group for group in groups if group.name == name)
    going = {name: removed[name]}
    if len(removed[name]) == group.units:  # a branch goes with all that is inside it
        if name not in branches:
            return False
        going |= {inner: removed[inner] for inner in branches[name].inner}
    return bool(why_not_without(copy.deepcopy(model), groups, going, example, branches))


@torch.no_grad()
def why_not_without(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    removed: Removed,
    example: Tensor,
    branches: Branches | None = None,
) -> str:
    """Take channels out that nothing reads; gives back why the network is not the same without, "" where it is.

    Raises:
        DataError: the network's answers are NaN or infinite.
    """
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        before = finite_answers(model, example)
        remove(model, groups, removed, branches)
        try:
            apart = float((model(example) - before).abs().max())
        except Exception as error:  # the forward pass is foreign code
            return (
                f"without the channels that were removed the network does not run ({error}): its forward pass counts "
                "on a fixed width"
            )
    if apart <= CLOSE * float(before.abs().max()):
        return ""
    return (
        f"cutting the channels out changed the answers by {apart:.3g}: some of them are read in a way that the "
        "dependency graph does not see"
    )


def finite_answers(model: nn.Module, images: Tensor) -> Tensor:
    """What the network answers; raises `DataError` for NaN or infinity, by which nothing can be judged."""
    answers: Tensor = model(images)
    if not bool(answers.isfinite().all()):
        raise DataError("the network answers with NaN or infinity; its weights or the images are broken.")
    return answers


def _leaving(groups: Iterable[ChannelGroup], removed: Removed) -> dict[tuple[str, str], Tensor]:
    """(layer, side) -> the channels that go, as the layer numbers them."""
    parts: dict[tuple[str, str], list[Tensor]] = {}
    for group in groups:
        for member in group.members if group.name in removed else ():
            going = member.index[torch.isin(member.units, removed[group.name])]
            parts.setdefault((member.name, member.side), []).append(going)
    return {place: torch.cat(each).unique() for place, each in parts.items()}  # type: ignore[no-untyped-call]  # in torch


def _cut(layer: nn.Module, side: str, leaving: Tensor) -> None:
    if isinstance(layer, ShiftConv2d):
        return _cut_shift(layer, side, leaving)
    if isinstance(layer, Shift2d):
        stay = _staying(layer.channels, leaving)
        layer.channels = len(stay)
        return _set(layer, "displacement", layer.displacement[stay])
    if isinstance(layer, nn.Conv2d):
        return _cut_convolution(layer, side, leaving)
    if isinstance(layer, nn.Linear):
        stay = _staying(layer.in_features if side == "in" else layer.out_features, leaving)
        _set(layer, "weight", layer.weight[:, stay] if side == "in" else layer.weight[stay])
        if side == "out" and layer.bias is not None:
            _set(layer, "bias", layer.bias[stay])
        layer.out_features, layer.in_features = layer.weight.shape
        return None
    if isinstance(layer, nn.PReLU):
        if layer.num_parameters > 1:
            _set(layer, "weight", layer.weight[_staying(layer.num_parameters, leaving)])
            layer.num_parameters = len(layer.weight)
        return None
    assert isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d)
    stay = _staying(layer.num_features, leaving)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(layer, name) is not None:
            _set(layer, name, getattr(layer, name)[stay])
    layer.num_features = len(stay)
    return None


def _cut_convolution(layer: nn.Conv2d, side: str, leaving: Tensor) -> None:
    if side == "in":
        stay = _staying(layer.in_channels, leaving)
        # The same channels go in each of its groups, so that the first one tells.
        inside = stay[stay < layer.in_channels // layer.groups]
        _set(layer, "weight", layer.weight[:, inside])
        layer.in_channels = len(stay)
        return
    stay = _staying(layer.out_channels, leaving)
    _set(layer, "weight", layer.weight[stay])
    if layer.bias is not None:
        _set(layer, "bias", layer.bias[stay])
    layer.out_channels = len(stay)
    if side == "same":
        layer.in_channels = layer.groups = len(stay)


def _cut_shift(layer: ShiftConv2d, side: str, leaving: Tensor) -> None:
    if side in ("in", "same"):
        stay = _staying(layer.in_channels, leaving)
        _set(layer, "displacement", layer.displacement[stay])
        layer.in_channels = len(stay)
    if side == "in":
        _cut_convolution(layer.pointwise, "in", _columns(layer, leaving))
        return
    _cut_convolution(layer.pointwise, "out", leaving)
    layer.out_channels = layer.pointwise.out_channels
    if side == "same":
        layer.groups = layer.pointwise.groups = layer.in_channels
        layer.pointwise.in_channels = layer.in_channels * layer.taps


def _columns(layer: ShiftConv2d, channels: Tensor) -> Tensor:
    """The copies of these input channels, as the pointwise convolution numbers them."""
    return (channels.unsqueeze(1) * layer.taps + torch.arange(layer.taps)).flatten()


def _staying(size: int, leaving: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[leaving] = False
    return stays.nonzero().flatten()


def _set(layer: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(layer, name)
    if isinstance(old, nn.Parameter):
        setattr(layer, name, nn.Parameter(value.clone(), old.requires_grad))
    else:
        layer._buffers[name] = value.clone()


def _say_widths(model: nn.Module, name: str) -> None:
    """Let the operator that a changed layer is a part of know it, so that its `config()` is right."""
    steps = name.split(".")
    for depth in range(len(steps) - 1, 0, -1):
        above: Any = model.get_submodule(".".join(steps[:depth]))
        name = kind(above).__name__
        if not kind(above).__module__.startswith("compress.nn."):
            continue
        made = {child: getattr(module, "out_channels", 0) for child, module in above.named_children()}
        if name == "Fire":
            above.widths = (made["squeeze"], made.get("expand1", 0), made["expand3"])
            above.out_channels = made.get("expand1", 0) + made["expand3"]
            above.in_channels = above.squeeze.in_channels
        else:
            last = {"InvertedConv2d": "project", "SeparableConv2d": "pointwise", "GroupedConv2d": "grouped"}[name]
            above.out_channels = made[last]
        return


def require_ended(model: nn.Module) -> None:
    """Raise `ConfigError` where a schedule of `Prune` is still running: taking channels out would end it."""
    for name, module in model.named_modules():
        masked = mask_of(module)
        if masked is not None and masked.steps and int(masked.updated) < masked.steps:
            raise ConfigError(
                f"the schedule of `Prune` in {name} has made {int(masked.step)} of its {masked.steps} steps, and would "
                "end where channels are taken out; put a `FineTune` before that, at least as long as the schedule's "
                "`epochs`."
            )


def why_not_bare(model: nn.Module, name: str) -> str:
    """Why a module's weights cannot be made plain ones by `bake_masks`; "" where they can."""
    module = model.get_submodule(name)
    chains: Any = module.parametrizations if parametrize.is_parametrized(module) else {}
    if not chains or (mask_of(module) is not None and set(chains) == {"weight"} and len(chains.weight) == 1):
        return ""
    return f"{name} has weights that are computed from others"


def bake_masks(model: nn.Module, only: Collection[str] | None = None) -> dict[str, Tensor]:
    """Make plain weights of masked ones, everywhere or in `only` these modules; gives back the masks by module.

    Raises:
        ConfigError: a weight is computed by anything else, or a schedule is still running.
    """
    require_ended(model)
    masks: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module) or (only is not None and name not in only):
            continue
        why = why_not_bare(model, name)
        if why:
            raise ConfigError(f"{why}; channels have to be taken out before the stage that made them so.")
        masked, weight = mask_of(module), module.weight
        assert masked is not None and isinstance(weight, Tensor)
        masks[name] = weight != 0 if masked.steps else masked.mask.clone()
    for name in masks:
        bake(model.get_submodule(name))
    return masks


def put_masks(model: nn.Module, masks: Mapping[str, Tensor], groups: Iterable[ChannelGroup], removed: Removed) -> None:
    """Put back what `bake_masks` took off, without what was removed since."""
    leaving = _leaving(groups, removed)
    for (name, side), going in list(leaving.items()):
        layer = model.get_submodule(name)
        if isinstance(layer, ShiftConv2d):
            leaving[f"{name}.pointwise", side] = _columns(layer, going) if side == "in" else going
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        if not hasattr(modules.get(name), "weight"):
            continue  # its branch was taken out
        holder = _holder(modules[name], mask)
        for side in ("in", "out", "same"):
            if (name, side) in leaving:
                _cut(holder, side, leaving[name, side])
        put_mask(modules[name], MaskedWeight(), torch.ne(holder.weight, 0))


def _holder(layer: nn.Module, mask: Tensor) -> nn.Linear | nn.Conv2d:
    """A plain layer of the mask's shape, whose weight is the mask."""
    new: nn.Linear | nn.Conv2d
    if isinstance(layer, nn.Linear):
        new = nn.Linear(mask.shape[1], mask.shape[0], bias=False)
    else:
        assert isinstance(layer, nn.Conv2d)
        groups = len(mask) if 1 < layer.groups == layer.out_channels else layer.groups
        new = nn.Conv2d(mask.shape[1] * groups, len(mask), layer.kernel_size, groups=groups, bias=False)  # type: ignore[arg-type]  # torch types it as a tuple of any length
    new.weight = nn.Parameter(mask.float())
    return new
