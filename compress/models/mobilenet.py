"""MobileNets: depthwise convolutions, and pointwise ones that mix the channels.

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", arXiv:1704.04861;
Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import ConfigError

# Version 1: (channels at width 1, stride) of the 13 blocks
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
# Version 2: (expansion, channels at width 1, blocks) of the 7 groups
GROUPS = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
STRIDES = (2, 1, 2, 2, 2, 1, 2, 1)


class MobileNetV1(nn.Module):
    """MobileNet version 1; (N, channels, H, W) -> (N, classes).

    Padding is TensorFlow's "SAME" for maps of even height and width: a convolution of stride 2 sees one row of zeros
    below and one column on the right. Sides that are no multiple of 32 lose a row or a column where they are odd.
    """

    def __init__(self, classes: int, channels: int, width: float) -> None:
        super().__init__()
        _check_width(width)
        inner = max(int(32 * width), 8)
        self.pad = _same(2)
        self.stem = _normed(channels, inner, 3, stride=2, padding=0, eps=1e-3)
        blocks = []
        for wide, stride in BLOCKS:
            outer = max(int(wide * width), 8)
            blocks.append(SeparableBlock(inner, outer, stride))
            inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inner, classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(self.pad(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]  # untyped calls


class SeparableBlock(nn.Module):
    """A depthwise 3x3 and a pointwise convolution; (N, in, H, W) -> (N, out, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.pad = _same(stride)
        padding = 1 if stride == 1 else 0
        self.dw = _normed(in_channels, in_channels, 3, stride, padding, groups=in_channels, eps=1e-3)
        self.pw = _normed(in_channels, out_channels, 1, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.dw(self.pad(x)))  # type: ignore[no-any-return]  # nn.Module calls are untyped


class MobileNetV2(nn.Module):
    """MobileNet version 2; (N, channels, H, W) -> (N, classes). Parameter names are torchvision's.

    `strides` are those of the first convolution and of the 7 groups of blocks.
    """

    def __init__(self, classes: int, channels: int, width: float, strides: list[int] | tuple[int, ...]) -> None:
        super().__init__()
        _check_width(width)
        if len(strides) != len(STRIDES) or not set(strides) <= {1, 2}:
            raise ConfigError(
                f"`strides` (={list(strides)}) must be {len(STRIDES)} times 1 or 2: for the first convolution and the "
                f"7 groups of blocks, such as {list(STRIDES)} for photographs."
            )
        inner = _rounded(32 * width)
        layers: list[nn.Module] = [_normed(channels, inner, 3, strides[0], 1)]
        for (expansion, wide, blocks), stride in zip(GROUPS, strides[1:], strict=True):
            outer = _rounded(wide * width)
            for number in range(blocks):
                layers.append(InvertedResidual(inner, outer, 1 if number else stride, expansion))
                inner = outer
        last = _rounded(1280 * max(1.0, width))
        self.features = nn.Sequential(*layers, _normed(inner, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        return self.classifier(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped


class InvertedResidual(nn.Module):
    """Pointwise up to `expansion` times the channels, depthwise 3x3, pointwise down without ReLU.

    (N, in, H, W) -> (N, out, H / stride, W / stride); the input is added where the shapes are the same.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        up = [_normed(in_channels, hidden, 1)] if expansion != 1 else []
        depthwise = _normed(hidden, hidden, 3, stride, 1, groups=hidden)
        down = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.conv = nn.Sequential(*up, depthwise, down, nn.BatchNorm2d(out_channels))
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


def _normed(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    eps: float = 1e-5,
) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels, eps), nn.ReLU6())


def _same(stride: int) -> nn.Module:
    return nn.ZeroPad2d((0, 1, 0, 1)) if stride == 2 else nn.Identity()


def _rounded(channels: float) -> int:
    """To a multiple of 8, and never below nine tenths."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


def _check_width(width: float) -> None:
    if not (math.isfinite(width) and width > 0):
        raise ConfigError(f"`width` (={width}) must be a finite number above 0; the paper's are 0.25 to 1.4.")


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def mobilenet_v1(classes: int = 1000, channels: int = 3, width: float = 1.0) -> MobileNetV1:
    """MobileNet version 1: 4,231,976 parameters at 1000 classes, 2,585,560 with `width` 0.75."""
    return MobileNetV1(classes, channels, width)


def mobilenet_v2(
    classes: int = 1000,
    channels: int = 3,
    width: float = 1.0,
    strides: tuple[int, ...] = STRIDES,
) -> MobileNetV2:
    """MobileNet version 2: 3,504,872 parameters at 1000 classes.

    For images of 32x32 pixels the usual `strides` are [1, 1, 1, 2, 2, 1, 2, 1]: 2,236,682 parameters at 10 classes.
    """
    return MobileNetV2(classes, channels, width, strides)
