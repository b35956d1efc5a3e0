"""Shifts in plain torch layers: a dense convolution, a depthwise and a pointwise one, or slices of the map.

All of them compute the same. Which is fastest depends on the runtime, the shape and the number of copies.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.nn.geometry import pair, take_channels


def convolution_forms(places: Tensor, kernel: Tensor, pointwise: nn.Conv2d, like: nn.Module) -> dict[str, nn.Module]:
    """The forms of a convolution by shifts with the geometry of `like`, the usually fastest first.

    `places` (C, T, ky, kx) has the weight of every window position in every copy, and column `c * T + t` of
    `pointwise` belongs to copy t of channel c; `kernel` (O, C / groups, ky, kx) is the dense kernel that they make.
    Positions around the window that no copy uses are cut off where the padding allows it; a window of one position is
    the form "pointwise" alone.
    """
    rows, columns, padding = _part(places.ne(0).any(0).any(0), like)
    places, kernel = places[..., rows, columns], kernel[..., rows, columns]
    geometry: dict[str, Any] = {"stride": like.stride, "padding": padding, "dilation": like.dilation}
    geometry["padding_mode"] = like.padding_mode
    channels, taps = places.shape[:2]
    dense = _convolution(kernel, pointwise.bias, pointwise.groups, **geometry)
    if kernel.shape[-2:] == (1, 1):
        return {"pointwise": dense}
    copies = places.flatten(0, 1)
    move = _convolution(copies.unsqueeze(1), None, channels, **geometry)
    mix = _convolution(pointwise.weight, pointwise.bias, pointwise.groups)
    forms: dict[str, nn.Module] = {"dense": dense, "depthwise": nn.Sequential(move, mix)}
    one_hot = bool(((copies == 0) | (copies == 1)).all()) and bool((copies.sum((1, 2)) == 1).all())
    if one_hot and taps == 1 and pointwise.groups < channels:
        forms = dict(reversed(forms.items()))
    if one_hot:
        forms["slices"] = _sliced(copies, taps, pointwise, around(like, padding, copies.shape[-2:]), like)
    return forms


def _convolution(weight: Tensor, bias: Tensor | None, groups: int, **geometry: Any) -> nn.Conv2d:
    size: Any = tuple(weight.shape[-2:])
    layer = nn.Conv2d(weight.shape[1] * groups, len(weight), size, groups=groups, bias=bias is not None, **geometry)
    layer = layer.to(weight.device, weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None and layer.bias is not None:
            layer.bias.copy_(bias)
    return layer


def around(like: nn.Module, padding: Any, kernel_size: tuple[int, ...] | torch.Size) -> list[int]:
    """What `padding` adds to a map, as left, right, top, bottom."""
    sides: list[int] = []
    dilation: Any = like.dilation
    for axis in (1, 0):
        reach = dilation[axis] * (kernel_size[axis] - 1)
        if padding == "same":  # the odd one out goes to the end, as in torch
            sides += [reach // 2, reach - reach // 2]
        else:
            sides += 2 * [0 if isinstance(padding, str) else pair(padding)[axis]]
    return sides


def _part(used: Tensor, like: nn.Module) -> tuple[slice, slice, Any]:
    """Rows and columns of the window (ky, kx) that hold all `used` positions, and the padding that they leave."""
    left, right, top, bottom = around(like, like.padding, used.shape)
    dilation: Any = like.dilation
    rows = _narrowed(used.any(1).tolist(), top, bottom, dilation[0])
    columns = _narrowed(used.any(0).tolist(), left, right, dilation[1])
    if rows is None or columns is None:
        return slice(None), slice(None), like.padding
    return rows[0], columns[0], (rows[1], columns[1])


def _narrowed(used: list[bool], before: int, after: int, dilation: int) -> tuple[slice, int] | None:
    """The smallest part of an axis with all `used` positions that pads both ends alike, as convolutions do, and that.

    None where there is no such part, as in an even kernel that pads one end more than the other.
    """
    size = len(used)
    low, high = used.index(True), size - used[::-1].index(True)
    parts = ((first, last) for first in range(low + 1) for last in range(high, size + 1))
    for first, last in sorted(parts, key=lambda part: part[1] - part[0]):
        padding = before - dilation * first
        if padding >= 0 and padding == after - dilation * (size - last):
            return slice(first, last), padding
    return None


def _sliced(copies: Tensor, taps: int, pointwise: nn.Conv2d, padding: list[int], like: nn.Module) -> nn.Sequential:
    """Slices, and the pointwise convolution with its columns in their order: by displacement, group by group."""
    groups, width = pointwise.groups, pointwise.in_channels // pointwise.groups
    inside = copies.flatten(1).argmax(1).view(groups, width).argsort(dim=1, stable=True)
    columns = (inside + width * torch.arange(groups, device=copies.device).unsqueeze(1)).flatten()
    by_output = inside.repeat_interleave(pointwise.out_channels // groups, 0)
    weight = pointwise.weight.gather(1, by_output.view_as(pointwise.weight))
    mix = _convolution(weight, pointwise.bias, groups)
    return nn.Sequential(Slices(copies[columns], columns // taps, groups, padding, like), mix)


class Slices(nn.Module):
    """Copies of channels moved by whole pixels: slices of the padded map, side by side.

    `copies` (C * T, ky, kx) is 1 at one position of each copy, `order` names the channel that each is a copy of.
    Neighbours of one group of channels that move alike are one slice.
    """

    order: Tensor

    def __init__(self, copies: Tensor, order: Tensor, groups: int, padding: list[int], like: nn.Module) -> None:
        super().__init__()
        ky, kx = copies.shape[-2:]
        dilation: Any = like.dilation
        self.stride: Any = like.stride
        self.padding, self.mode = padding, "constant" if like.padding_mode == "zeros" else str(like.padding_mode)
        self.reach = (dilation[0] * (ky - 1), dilation[1] * (kx - 1))
        self.register_buffer("order", order)
        place = copies.flatten(1).argmax(1).view(groups, -1)
        runs = ((p, len(list(run))) for group in place.tolist() for p, run in groupby(group))
        self.parts = [(channels, dilation[0] * (p // kx), dilation[1] * (p % kx)) for p, channels in runs]

    def forward(self, x: Tensor) -> Tensor:
        x = take_channels(x, self.order)
        if any(self.padding):
            x = F.pad(x, self.padding, mode=self.mode)
        ends = [size - reach for size, reach in zip(x.shape[-2:], self.reach, strict=True)]
        slices, start = [], 0
        for channels, y, z in self.parts:
            part = x[:, start : start + channels]
            slices.append(part[..., y : y + ends[0] : self.stride[0], z : z + ends[1] : self.stride[1]])
            start += channels
        return torch.cat(slices, 1)

    def extra_repr(self) -> str:
        return f"{self.parts}, order={self.order.tolist()}, stride={self.stride}, padding={self.padding}, {self.mode}"


class Moving(nn.Module):
    """A depthwise convolution over the channels that move; the others are left where they are, untouched.

    `kernel` (C, 1, k, k) is one-hot; a channel stays that has its 1 in the centre.
    """

    moving: Tensor

    def __init__(self, kernel: Tensor, stays: Tensor) -> None:
        super().__init__()
        moving = (~stays).nonzero().flatten()
        self.register_buffer("moving", moving)
        self.move = _convolution(kernel[moving], None, len(moving), padding=kernel.shape[-1] // 2)
        self.runs = list(_runs(stays.tolist()))

    def forward(self, x: Tensor) -> Tensor:
        moved = self.move(take_channels(x, self.moving))
        rest = iter(torch.split(moved, [n for stays, n in self.runs if not stays], 1))
        whole = torch.split(x, [n for _, n in self.runs], 1)
        return torch.cat([part if stays else next(rest) for part, (stays, _) in zip(whole, self.runs, strict=True)], 1)

    def extra_repr(self) -> str:
        return f"{self.runs}"


def _runs(stays: list[bool]) -> Iterator[tuple[bool, int]]:
    for kind, run in groupby(stays):
        yield kind, len(list(run))


def displacement_forms(kernel: Tensor, stride: int) -> dict[str, nn.Module]:
    """The forms of a shift by the depthwise `kernel` (C, 1, k, k), the usually fastest first."""
    centre = kernel.shape[-1] // 2
    stays = (kernel[:, 0, centre, centre] == 1) & (kernel.flatten(1).count_nonzero(1) == 1)
    if stride == 1 and bool(stays.all()):
        return {"nothing": nn.Identity()}
    move = _convolution(kernel, None, len(kernel), stride=stride, padding=centre)
    forms: dict[str, nn.Module] = {"depthwise": move}
    if stride == 1 and bool(stays.any()):
        forms["moving"] = Moving(kernel, stays)
    return forms
