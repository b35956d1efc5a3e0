"""Fire module: a 1x1 convolution squeezes the channels, 1x1 and k x k convolutions side by side expand them again.

Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size", arXiv:1602.07360.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.nn.geometry import spatial_config, take_channels, unusual


class Fire(nn.Module):
    """1x1 convolution to `squeeze` channels, ReLU, then `expand1` outputs by a 1x1, `expand3` by a k x k convolution.

    Maps (N, in_channels, H, W) as the k x k convolution of the same stride, padding and dilation does. The outputs of
    the 1x1 branch come first; with `reorder` output i is the one at place `order[i]` of these. The stride is in the
    expand convolutions. All three have a bias, and no ReLU follows: a network that wants one has it.

    With `expand1` the padding has to keep the size (half of what the kernel reaches, or "same"): the 1x1 convolution
    looks at the middle of every window.

    Raises:
        ValueError: no squeeze channel, no k x k output, branches that do not add up to `out_channels`; a padding that
            sets the two branches apart.
    """

    order: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        squeeze: int,
        expand1: int,
        expand3: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 1,
        dilation: int | tuple[int, int] = 1,
        padding_mode: str = "zeros",
        reorder: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (("squeeze", squeeze, 1), ("expand1", expand1, 0), ("expand3", expand3, 1)):
            if value < least:
                raise ValueError(f"`{name}` (={value}) must be at least {least}.")
        if expand1 + expand3 != out_channels:
            raise ValueError(
                f"`expand1` (={expand1}) and `expand3` (={expand3}) must add up to `out_channels` (={out_channels})."
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.widths, self.reorder = (squeeze, expand1, expand3), reorder
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.relu = nn.ReLU()
        spatial: dict[str, Any] = {"padding": padding, "dilation": dilation, "padding_mode": padding_mode}
        self.expand3 = nn.Conv2d(squeeze, expand3, kernel_size, stride, **spatial)
        self.expand1 = nn.Conv2d(squeeze, expand1, 1, stride) if expand1 else None
        self.kernel_size, self.stride = self.expand3.kernel_size, self.expand3.stride
        self.padding, self.dilation, self.padding_mode = self.expand3.padding, self.expand3.dilation, padding_mode
        if expand1 and middle(self.expand3) is None:
            raise ValueError(
                f"`padding` (={padding}) must keep the size for `kernel_size` (={kernel_size}) and `dilation` "
                f"(={dilation}), or the 1x1 branch gives another one; set `expand1` to 0."
            )
        if reorder:
            self.register_buffer("order", torch.arange(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.squeeze(x))
        y: Tensor = self.expand3(x)
        if self.expand1 is not None:
            y = torch.cat((self.expand1(x), y), 1)
        return take_channels(y, self.order) if self.reorder else y

    def output_places(self) -> tuple[tuple[nn.Conv2d, Tensor], ...]:
        """The convolutions that give the output, and which of its channels each one's outputs are."""
        _, expand1, expand3 = self.widths
        places = self.order.argsort() if self.reorder else torch.arange(self.out_channels)
        ones, threes = torch.split(places, [expand1, expand3])
        return ((self.expand3, threes),) if self.expand1 is None else ((self.expand1, ones), (self.expand3, threes))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        squeeze, expand1, expand3 = self.widths
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "squeeze": squeeze,
            "expand1": expand1,
            "expand3": expand3,
            **spatial_config(self),
            "reorder": self.reorder,
        }

    def extra_repr(self) -> str:
        kernel = "x".join(str(k) for k in self.kernel_size)
        squeeze, expand1, expand3 = self.widths
        text = f"{self.in_channels}, {self.out_channels}, {kernel}, squeeze={squeeze}, expand={expand1}+{expand3}"
        return text + unusual(self)


def middle(layer: nn.Conv2d) -> tuple[int, int] | None:
    """The kernel position (y, x) at which a 1x1 convolution of the same stride looks; None where the sizes differ."""
    position = []
    for axis in (0, 1):
        step = layer.dilation[axis]
        reach = step * (layer.kernel_size[axis] - 1)
        same = layer.padding == "same"
        before = reach // 2 if same else 0 if isinstance(layer.padding, str) else int(layer.padding[axis])
        if not (same or reach == 2 * before) or before % step:
            return None
        position.append(before // step)
    return position[0], position[1]
