"""Depthwise separable convolution: a few kernels for each input channel alone, then a pointwise convolution.

Sifre, "Rigid-Motion Scattering for Image Classification", PhD thesis, 2014; Chollet, "Xception", CVPR 2017;
Howard et al., "MobileNets", arXiv:1704.04861.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.nn.geometry import pair, spatial_config, unusual

WIDEST_COMPOSED = 256  # input channels of a group: beyond, the dense kernel's work outgrows the depthwise layer's time


class SeparableConv2d(nn.Module):
    """`multiplier` kernels for each input channel (`depthwise`), then a 1x1 convolution over all of them (`pointwise`).

    Maps (N, in_channels, H, W) as the k x k convolution of the same stride, padding, dilation and groups does, and
    nothing stands between the two: it is that convolution where the kernels of each input channel, as a matrix
    (out_channels / groups, positions), have rank `multiplier` at most. The depthwise one has all that is spatial and
    no bias, the pointwise one the groups and the bias. Column `c * multiplier + t` of `pointwise.weight`, counted
    within its group, belongs to kernel t of input channel c.

    Several kernels for each channel are trained as the one dense kernel that they make, where that is not very wide:
    depthwise convolutions with a multiplier are slow on the CPU.

    Raises:
        ValueError: more kernels for a channel than the kernel has positions, or none; channels that do not divide
            into groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        multiplier: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self.kernel_size = pair(kernel_size)
        positions = math.prod(self.kernel_size)
        if not 1 <= multiplier <= positions:
            raise ValueError(f"`multiplier` (={multiplier}) must be between 1 and the kernel's {positions} positions.")
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if groups < 1 or channels % groups:
                raise ValueError(f"`{name}` (={channels}) must be divisible by `groups` (={groups}).")
        self.in_channels, self.out_channels, self.multiplier = in_channels, out_channels, multiplier
        self.stride, self.dilation = pair(stride), pair(dilation)
        self.padding = padding if isinstance(padding, str) else pair(padding)
        self.groups, self.padding_mode = groups, padding_mode
        between = in_channels * multiplier
        spatial: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        spatial["padding_mode"] = padding_mode
        self.depthwise = nn.Conv2d(in_channels, between, self.kernel_size, groups=in_channels, bias=False, **spatial)
        self.pointwise = nn.Conv2d(between, out_channels, 1, groups=groups, bias=bias)

    def kernel(self) -> Tensor:
        """The dense kernel this layer equals: (out_channels, in_channels / groups, ky, kx)."""
        g, inputs = self.groups, self.in_channels // self.groups
        mix = self.pointwise.weight.view(g, self.out_channels // g, inputs, self.multiplier)
        kernels = self.depthwise.weight.view(g, inputs, self.multiplier, -1)
        dense = torch.einsum("goit,gitp->goip", mix, kernels)
        return dense.reshape(self.out_channels, inputs, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        composes = self.training and self.multiplier > 1 and self.in_channels // self.groups <= WIDEST_COMPOSED
        if composes and isinstance(x, Tensor):  # a tracer's stand-in is none, and has to see both layers
            padding: Any = self.padding
            if self.padding_mode != "zeros":
                x = F.pad(x, self.depthwise._reversed_padding_repeated_twice, mode=self.padding_mode)
                padding = 0
            return F.conv2d(x, self.kernel(), self.pointwise.bias, self.stride, padding, self.dilation, self.groups)
        out: Tensor = self.pointwise(self.depthwise(x))
        return out

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "multiplier": self.multiplier,
            "groups": self.groups,
            "bias": self.pointwise.bias is not None,
            **spatial_config(self),
        }

    def extra_repr(self) -> str:
        kernel = "x".join(str(k) for k in self.kernel_size)
        text = f"{self.in_channels}, {self.out_channels}, {kernel}, multiplier={self.multiplier}"
        return text + unusual(self)
