"""Grouped convolution over shuffled channels.

Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", NIPS 2012: groups;
Zhang et al., "ShuffleNet", CVPR 2018: groups that exchange channels; Huang et al., "CondenseNet", CVPR 2018: groups
whose inputs are chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.nn.geometry import spatial_config, take_channels, unusual


class GroupedConv2d(nn.Module):
    """The input's channels in another `order`, then a convolution in `groups` groups (`grouped`).

    Maps (N, in_channels, H, W) as the convolution of the same kernel, stride, padding and dilation does, with a
    `groups`-th of its weights. The first `in_channels / groups` entries of `order` are the channels that the first
    group reads, and so on; a new layer gives every group every `groups`-th channel, as a channel shuffle does. With
    one group there is no order, and it is the convolution.

    Raises:
        ValueError: channels that do not divide into groups.
    """

    order: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        groups: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or channels % groups:
                raise ValueError(f"`{name}` (={channels}) must be divisible by `groups` (={groups}).")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        spatial: dict[str, Any] = {"padding": padding, "dilation": dilation, "padding_mode": padding_mode}
        self.grouped = nn.Conv2d(in_channels, out_channels, kernel_size, stride, groups=groups, bias=bias, **spatial)
        self.kernel_size, self.stride = self.grouped.kernel_size, self.grouped.stride
        self.padding, self.dilation, self.padding_mode = self.grouped.padding, self.grouped.dilation, padding_mode
        if groups > 1:
            self.register_buffer("order", torch.arange(in_channels).view(-1, groups).T.flatten())

    def forward(self, x: Tensor) -> Tensor:
        if self.groups > 1:
            x = take_channels(x, self.order)
        out: Tensor = self.grouped(x)
        return out

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "groups": self.groups,
            "bias": getattr(self.grouped, "bias", None) is not None,
            **spatial_config(self),
        }

    def extra_repr(self) -> str:
        kernel = "x".join(str(k) for k in self.kernel_size)
        return f"{self.in_channels}, {self.out_channels}, {kernel}" + unusual(self)
