"""Inverted bottleneck: a 1x1 convolution expands the channels, a depthwise one filters them, a 1x1 one projects them.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from compress.nn.geometry import spatial_config, unusual


class InvertedConv2d(nn.Module):
    """`expand` (1x1, to `expansion` times the inputs), ReLU, `depthwise` (k x k), ReLU, `project` (1x1, linear).

    Maps (N, in_channels, H, W) as the k x k convolution of the same stride, padding and dilation does; the depthwise
    convolution has all that is spatial. All three have a bias; there is no batch norm inside, and no shortcut: a
    network that wants one has it. With `clip6` the ReLUs cut at 6 too, as the paper's do.

    Raises:
        ValueError: an expansion to no channel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        expansion: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        clip6: bool = False,
    ) -> None:
        super().__init__()
        if expansion < 1:
            raise ValueError(f"`expansion` (={expansion}) must be at least 1.")
        self.in_channels, self.out_channels, self.expansion = in_channels, out_channels, expansion
        hidden = in_channels * expansion
        spatial: dict[str, Any] = {"padding": padding, "dilation": dilation, "padding_mode": padding_mode}
        self.expand = nn.Conv2d(in_channels, hidden, 1)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel_size, stride, groups=hidden, **spatial)
        self.project = nn.Conv2d(hidden, out_channels, 1)
        self.activation = nn.ReLU6() if clip6 else nn.ReLU()
        self.kernel_size, self.stride = self.depthwise.kernel_size, self.depthwise.stride
        self.padding, self.dilation = self.depthwise.padding, self.depthwise.dilation
        self.padding_mode, self.clip6 = padding_mode, clip6

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.depthwise(self.activation(self.expand(x))))
        out: Tensor = self.project(x)
        return out

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "expansion": self.expansion,
            **spatial_config(self),
            "clip6": self.clip6,
        }

    def extra_repr(self) -> str:
        kernel = "x".join(str(k) for k in self.kernel_size)
        text = f"{self.in_channels}, {self.out_channels}, {kernel}, expansion={self.expansion}"
        return text + unusual(self) + (", clip6" if self.clip6 else "")
