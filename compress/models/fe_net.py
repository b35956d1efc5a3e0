"""FE-Nets for ImageNet: inverted bottlenecks around sparse shifts, on ever larger parts of the channels.

Chen et al., "All You Need is a Few Shifts: Designing Efficient Convolutional Neural Networks for Image Classification",
CVPR 2019, section 4. Layers are those of the authors' code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.nn.displace import Shift2d

HIDDEN = ("output", "input")
# Of the five FE-blocks: parts that the channels are split into, output channels at width 1, whether it halves the map.
BLOCKS = ((3, 64, True), (4, 128, True), (4, 128, False), (4, 256, True), (3, 256, False))


class Bottleneck(nn.Module):
    """1x1-BN-ReLU, sparse shift (or, to halve the map, a 2x2 average pool), 1x1-BN; the sum with its input if asked."""

    def __init__(self, in_channels: int, out_channels: int, middle: int, l1: float, pool: bool, residual: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.move: nn.Module = nn.AvgPool2d(2)
        if not pool:
            self.move = Shift2d(middle, 3, learn=True, l1=l1, normalize=False, lr_scale=1.0)
        self.conv2 = nn.Conv2d(middle, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.move(F.relu(self.bn1(self.conv1(x))))))
        return y + x if self.residual else y


class FEBlock(nn.Module):
    """The last part of the channels passes through all bottlenecks, each of which takes in the part before it.

    With 4 parts these are C/2, C/4, C/8 and C/8. The last bottleneck, over all channels, gives `out_channels` and
    halves the map with `pool`.
    """

    def __init__(self, in_channels: int, out_channels: int, parts: int, hidden: str, l1: float, pool: bool) -> None:
        super().__init__()
        smallest = in_channels // 2 ** (parts - 1)
        wide = [smallest * 2**number for number in range(parts - 1)]
        self.inner = nn.ModuleList(Bottleneck(w, w, 6 * w, l1, pool=False, residual=True) for w in wide)
        self.sizes = [in_channels - wide[-1], *(w // 2 for w in wide[:0:-1]), smallest]
        middle = 6 * (out_channels if hidden == "output" else in_channels)
        self.last = Bottleneck(in_channels, out_channels, middle, l1, pool, residual=False)

    def forward(self, x: Tensor) -> Tensor:
        *before, y = torch.split(x, self.sizes, 1)
        for bottleneck, part in zip(self.inner, reversed(before), strict=True):
            y = torch.cat((part, bottleneck(y)), 1)
        return self.last(y)  # type: ignore[no-any-return]  # nn.Module calls are untyped


class FENet(nn.Module):
    """(N, channels, H, W) -> (N, classes)."""

    def __init__(self, classes: int, channels: int, width: float, hidden: str, head: int, l1: float) -> None:
        super().__init__()
        stem = int(16 * width)
        if stem < 4 or head < 1:
            raise ConfigError(f"`width` (={width}) must be at least 1/4, and `head` (={head}) at least 1.")
        if hidden not in HIDDEN:
            raise ConfigError(f"`hidden` (={hidden!r}) must be one of {', '.join(HIDDEN)}.")
        if not (math.isfinite(l1) and l1 >= 0):
            raise ConfigError(f"`l1` (={l1}) must be a finite number, 0 or more.")
        self.conv1 = nn.Conv2d(channels, stem, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        halving = 5 * stem * (2 if hidden == "output" else 1)
        layers: list[nn.Module] = [
            Bottleneck(stem, stem, 4 * stem, l1, pool=False, residual=False),
            Bottleneck(stem, 2 * stem, halving, l1, pool=True, residual=False),
        ]
        inner = 2 * stem
        for parts, wide, pool in BLOCKS:
            outer = wide // 16 * stem
            layers.append(FEBlock(inner, outer, parts, hidden, l1, pool))
            inner = outer
        self.blocks = nn.Sequential(*layers)
        self.conv2 = nn.Conv2d(inner, head, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(head)
        self.dropout = nn.Dropout(0.2)
        self.linear = nn.Linear(head, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return self.linear(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


def fe_net(
    classes: int = 1000,
    channels: int = 3,
    width: float = 1.0,
    hidden: str = "output",
    head: int = 1380,
    l1: float = 5e-4,
) -> FENet:
    """FE-Net `width`x for 224x224 images; at width 1 5,344 channels are displaced.

    The last bottleneck of a block has 6 times as many channels inside as at its `hidden` end. With "output" this is the
    network that the authors trained: 410.5 M MACs and 3.92 M weights with the head of 1,380 channels (73.6 % top-1),
    417.9 M and 4.61 M with one of 1,932; 773.2 M and 6.73 M at width 1.375. The published 301 M and 3.7 M, 563 M and
    5.9 M are near those of "input": 299.7 M and 3.52 M (head 1,380), 563.7 M and 5.99 M (width 1.375, head 1,932).
    Beside the weights there are two numbers for each displaced channel. `l1` pulls the displacements towards zero; they
    stay inside the 3x3 window that they start in, which the authors' code does not ask of them.
    """
    return FENet(classes, channels, width, hidden, head, l1)
