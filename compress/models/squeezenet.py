"""SqueezeNet: Fire modules, in which a narrow 1x1 convolution feeds a 1x1 and a 3x3 one side by side; no batch norm.

Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and < 0.5MB model size",
arXiv:1602.07360. Version 1.1 has the same accuracy with 2.4 times fewer multiply-adds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# (channels of the squeeze, of each expand) of fire2 .. fire9
FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))


class Fire(nn.Module):
    """Squeeze to few channels, expand by a 1x1 and a 3x3 convolution; (N, in, H, W) -> (N, 2 * expand, H, W).

    With `bypass` the input is added to the output; both need the same channels then.
    """

    def __init__(self, in_channels: int, squeeze: int, expand: int, bypass: bool) -> None:
        super().__init__()
        self.bypass = bypass
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.squeeze_activation = nn.ReLU()
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand1x1_activation = nn.ReLU()
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.expand3x3_activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.squeeze_activation(self.squeeze(x))
        near = self.expand1x1_activation(self.expand1x1(y))
        wide = self.expand3x3_activation(self.expand3x3(y))
        y = torch.cat((near, wide), 1)
        return y + x if self.bypass else y


class SqueezeNet(nn.Module):
    """A SqueezeNet; (N, channels, H, W) -> (N, classes). Parameter names are torchvision's.

    Pools round up, as the published weights want it, and images must be at least 17 pixels high and wide (version 1.0:
    21). `padding` is that of the last convolution, which is 1 in the published version 1.0. `bypass` adds its input to
    the output of every second Fire module, where the channels are the same.
    """

    def __init__(self, stem: nn.Conv2d, pools: tuple[int, int], classes: int, padding: int, bypass: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [stem, nn.ReLU(), _pool()]
        width = stem.out_channels
        for number, (squeeze, expand) in enumerate(FIRES, 2):
            layers.append(Fire(width, squeeze, expand, bypass and width == 2 * expand))
            width = 2 * expand
            if number in pools:
                layers.append(_pool())
        self.features = nn.Sequential(*layers)
        last = nn.Conv2d(width, classes, 1, padding=padding)
        self.classifier = nn.Sequential(nn.Dropout(0.5), last, nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if module is last:
                    nn.init.normal_(module.weight, std=0.01)
                else:
                    nn.init.kaiming_uniform_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)).flatten(1)  # type: ignore[no-any-return]  # nn.Module calls are untyped


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, 2, ceil_mode=True)


def squeezenet1_0(classes: int = 1000, channels: int = 3, padding: int = 0, bypass: bool = False) -> SqueezeNet:
    """SqueezeNet 1.0: 1,248,424 parameters at 1000 classes, with `bypass` or without."""
    return SqueezeNet(nn.Conv2d(channels, 96, 7, 2), (4, 8), classes, padding, bypass)


def squeezenet1_1(classes: int = 1000, channels: int = 3, padding: int = 0, bypass: bool = False) -> SqueezeNet:
    """SqueezeNet 1.1: 1,235,496 parameters at 1000 classes, with `bypass` or without."""
    return SqueezeNet(nn.Conv2d(channels, 64, 3, 2), (3, 5), classes, padding, bypass)
