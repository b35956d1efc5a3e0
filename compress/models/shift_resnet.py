"""CIFAR residual networks of depth 6n + 2 with a shift between two pointwise convolutions for every two 3x3 ones.

Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", CVPR 2018, section 4.1. Blocks and
counts are those of the authors' repository, in which a ReLU ends the block's convolutions and none follows the sum.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.nn.displace import Shift2d

# How the displacements come about: settings of Shift2d.
SHIFTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "random": {"kernel_size": 7, "start": "random"},
    "active": {"kernel_size": 15, "start": "uniform", "learn": True, "quantize": False},
    "sparse": {"learn": True, "normalize": False, "lr_scale": 1.0},
}
L1 = 5e-4  # of sparse displacements


class CSC(nn.Module):
    """Convolution, shift, convolution, the paper's CSC module: 1x1, shift, 1x1 (with the stride), and a shortcut.

    (N, in, H, W) -> (N, out, H / stride, W / stride).
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, expansion: float, shift: dict[str, Any]
    ) -> None:
        super().__init__()
        middle = int(out_channels * expansion)
        self.conv1 = nn.Conv2d(in_channels, middle, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle)
        self.shift = Shift2d(middle, **shift)
        self.conv2 = nn.Conv2d(middle, out_channels, 1, stride, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(self.shift(y))))
        return y + self.shortcut(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


class ShiftResNet(nn.Module):
    """A CIFAR ResNet of shifts; (N, channels, H, W) -> (N, classes).

    `shift` says where the displacements come from: "grouped" (fixed, the paper's), "random" (fixed, up to three
    pixels: the baseline that learning has to beat), "active" (Jeon & Kim: learned, bilinear) or "sparse" (Chen et al.:
    learned, rounded, pulled towards zero by `l1`, their L1 norm's weight in the loss; here they stay inside the 3x3
    window that they start in). Fixed displacements are no parameters; learned ones are.
    """

    def __init__(self, depth: int, classes: int, channels: int, expansion: float, shift: str, l1: float) -> None:
        super().__init__()
        if (depth - 2) % 6 or depth < 8:
            raise ConfigError(f"`depth` (={depth}) must be 6n + 2, such as 20, 56 or 110.")
        if int(16 * expansion) < 1:
            raise ConfigError(f"`expansion` (={expansion}) must be at least 1/16; 1, 3, 6 and 9 are published.")
        if shift not in SHIFTS:
            raise ConfigError(f"`shift` (={shift!r}) must be one of {', '.join(SHIFTS)}.")
        if not (math.isfinite(l1) and l1 >= 0):
            raise ConfigError(f"`l1` (={l1}) must be a finite number, 0 or more.")
        moved = SHIFTS[shift] | ({"l1": l1} if shift == "sparse" else {})
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, width = [], 16
        for wide, first in ((16, 1), (32, 2), (64, 2)):
            for stride in (first, *[1] * ((depth - 2) // 6 - 1)):
                blocks.append(CSC(width, wide, stride, expansion, moved))
                width = wide
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


def shift_resnet20(
    classes: int = 10, channels: int = 3, expansion: float = 6, shift: str = "grouped", l1: float = L1
) -> ShiftResNet:
    """ShiftResNet-20 for 32x32 images: 34,906, 95,642, 186,746 or 277,850 parameters at expansion 1, 3, 6 or 9."""
    return ShiftResNet(20, classes, channels, expansion, shift, l1)


def shift_resnet56(
    classes: int = 10, channels: int = 3, expansion: float = 6, shift: str = "grouped", l1: float = L1
) -> ShiftResNet:
    """ShiftResNet-56 for 32x32 images: 102,106, 294,554, 583,226 or 871,898 parameters at expansion 1, 3, 6 or 9."""
    return ShiftResNet(56, classes, channels, expansion, shift, l1)


def shift_resnet110(
    classes: int = 10, channels: int = 3, expansion: float = 6, shift: str = "grouped", l1: float = L1
) -> ShiftResNet:
    """ShiftResNet-110 for 32x32 images: 202,906 to 1,762,970 parameters at expansion 1 to 9."""
    return ShiftResNet(110, classes, channels, expansion, shift, l1)
