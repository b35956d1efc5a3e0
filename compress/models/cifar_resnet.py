"""CIFAR residual networks of depth 6n + 2. `width` is the number of channels of the first stage; the paper has 16.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.nn.squeeze_excite import SqueezeExcitation


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; (N, in, H, W) -> (N, out, H/stride, W/stride).

    With `reduction`, squeeze-and-excitation stands at the end of the convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, shortcut: str, reduction: int | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.se = None if reduction is None else SqueezeExcitation(out_channels, reduction, largest=1.0)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = (
                PadShortcut(stride, out_channels - in_channels)
                if shortcut == "pad"
                else nn.Sequential(
                    nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.se is not None:
            y = self.se(y)
        return F.relu(y + self.shortcut(x))


class PadShortcut(nn.Module):
    """The shortcut without parameters ("option A"): every stride-th position, new channels zero on both sides."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))


class CifarResNet(nn.Module):
    """A CIFAR ResNet; (N, channels, H, W) -> (N, classes). Parameter names are those of the published weights."""

    def __init__(
        self, depth: int, classes: int, channels: int, shortcut: str, width: int, reduction: int | None = None
    ) -> None:
        super().__init__()
        if (depth - 2) % 6 or depth < 8:
            raise ConfigError(f"`depth` (={depth}) must be 6n + 2, such as 20, 32, 44, 56 or 110.")
        if width < 1:
            raise ConfigError(f"`width` (={width}) must be at least 1; the paper has 16.")
        if shortcut not in ("pad", "conv"):
            raise ConfigError(f"`shortcut` (={shortcut!r}) must be 'pad' (no parameters) or 'conv' (1x1 convolution).")
        if reduction is not None and reduction < 1:
            raise ConfigError(f"`reduction` (={reduction}) must be at least 1; 16 is usual.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _group(width, width, blocks, 1, shortcut, reduction)
        self.layer2 = _group(width, 2 * width, blocks, 2, shortcut, reduction)
        self.layer3 = _group(2 * width, 4 * width, blocks, 2, shortcut, reduction)
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


def _group(
    in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: str, reduction: int | None
) -> nn.Sequential:
    first = Block(in_channels, out_channels, stride, shortcut, reduction)
    rest = [Block(out_channels, out_channels, 1, shortcut, reduction) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def resnet20(classes: int = 10, channels: int = 3, shortcut: str = "pad", width: int = 16) -> CifarResNet:
    """ResNet-20 for 32x32 images: 269,722 parameters with the `pad` shortcut, 272,474 with `conv`."""
    return CifarResNet(20, classes, channels, shortcut, width)


def resnet32(classes: int = 10, channels: int = 3, shortcut: str = "pad", width: int = 16) -> CifarResNet:
    """ResNet-32 for 32x32 images."""
    return CifarResNet(32, classes, channels, shortcut, width)


def resnet44(classes: int = 10, channels: int = 3, shortcut: str = "pad", width: int = 16) -> CifarResNet:
    """ResNet-44 for 32x32 images."""
    return CifarResNet(44, classes, channels, shortcut, width)


def resnet56(classes: int = 10, channels: int = 3, shortcut: str = "pad", width: int = 16) -> CifarResNet:
    """ResNet-56 for 32x32 images: 853,018 parameters with the `pad` shortcut, 855,770 with `conv`."""
    return CifarResNet(56, classes, channels, shortcut, width)


def resnet110(classes: int = 10, channels: int = 3, shortcut: str = "pad", width: int = 16) -> CifarResNet:
    """ResNet-110 for 32x32 images: 1,730,714 parameters with the `conv` shortcut."""
    return CifarResNet(110, classes, channels, shortcut, width)


def small(classes: int = 10, channels: int = 1) -> CifarResNet:
    """A residual network for small images such as the 8x8 digits, fast enough to train in seconds on a CPU."""
    return CifarResNet(8, classes, channels, "conv", width=24)
