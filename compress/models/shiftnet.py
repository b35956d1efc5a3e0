"""ShiftNets for ImageNet: conv-shift-conv blocks behind one 7x7 convolution.

Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", CVPR 2018, section 4.2 and table 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.nn.displace import Shift2d

# Of the four groups: channels of A, shift's window, expansion of the first block and of the others.
GROUPS = ((64, 5, 4, 4), (128, 5, 4, 3), (256, 3, 3, 2), (512, 3, 2, 1))
BLOCKS = (5, 6, 7, 3)


class CSC(nn.Module):
    """The paper's CSC module: BN-ReLU-1x1, shift, BN-ReLU-1x1, and a shortcut.

    (N, in, H, W) -> (N, out, H / stride, W / stride). With stride 2 the shortcut is a 3x3 average pool, whose channels
    stand behind those of the convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, window: int) -> None:
        super().__init__()
        made = out_channels - in_channels if stride > 1 else out_channels
        middle = made * expansion
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, middle, 1, bias=False)
        self.shift = Shift2d(middle, window)
        self.bn2 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, made, 1, stride, bias=False)
        self.pool = nn.AvgPool2d(3, stride, 1) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.shift(self.conv1(F.relu(self.bn1(x))))
        y = self.conv2(F.relu(self.bn2(y)))
        return y + x if self.pool is None else torch.cat((y, self.pool(x)), 1)


class ShiftNet(nn.Module):
    """(N, channels, H, W) -> (N, classes). `share`: how many times fewer channels than ShiftNet-A."""

    def __init__(self, blocks: Sequence[int], share: int, classes: int, channels: int) -> None:
        super().__init__()
        width = 32 // share
        self.conv = nn.Conv2d(channels, width, 7, 2, 3, bias=False)
        layers = []
        for (wide, window, first, rest), count in zip(GROUPS, blocks, strict=True):
            layers.append(CSC(width, wide // share, 2, first, window))
            width = wide // share
            layers += [CSC(width, width, 1, rest, window) for _ in range(count - 1)]
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.conv(x))))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


def shiftnet_a(classes: int = 1000, channels: int = 3) -> ShiftNet:
    """ShiftNet-A for 224x224 images: 4,188,680 parameters (published: 4.1 M), 1.42 G MACs (1.4 G)."""
    return ShiftNet(BLOCKS, 1, classes, channels)


def shiftnet_b(classes: int = 1000, channels: int = 3) -> ShiftNet:
    """ShiftNet-B, half the channels of A everywhere: 1,183,480 parameters (published: 1.1 M), 371 M MACs (371 M)."""
    return ShiftNet(BLOCKS, 2, classes, channels)


def shiftnet_c(classes: int = 1000, channels: int = 3) -> ShiftNet:
    """A network of ShiftNet-C's size: B with fewer blocks, 0.777 M parameters (published: 0.78 M).

    Which blocks the paper leaves out is not known to us, nor is its number of multiply-adds: the counts of blocks here,
    2, 4, 4 and 2, are our choice.
    """
    return ShiftNet((2, 4, 4, 2), 2, classes, channels)
