"""AlexNet for 32x32 images: five 3x3 convolutions with batch norm, three fully connected layers.

Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", NeurIPS 2012: its channels and
fully connected layers, in the form in which it is used on CIFAR.
"""

from __future__ import annotations

from torch import Tensor, nn

from compress.errors import ConfigError

CHANNELS = (64, 192, 384, 256, 256)
POOLED = (0, 1, 4)  # the convolutions with a pool behind them
HIDDEN = 4096


class AlexNet(nn.Module):
    """Convolutions (without biases: batch norm has them), pools after three of them; (N, channels, size, size) ->
    (N, classes)."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        if size < 2 ** len(POOLED):
            raise ConfigError(f"`size` (={size}) must be at least 8 pixels: the three pools halve the sides.")
        layers: list[nn.Module] = []
        before = channels
        for number, wide in enumerate(CHANNELS):
            layers += [nn.Conv2d(before, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
            if number in POOLED:
                layers.append(nn.MaxPool2d(2))
            before = wide
        self.features = nn.Sequential(*layers)
        side = size // 2 ** len(POOLED)
        self.classifier = nn.Sequential(
            *(nn.Dropout(0.5), nn.Linear(before * side * side, HIDDEN), nn.ReLU()),
            *(nn.Dropout(0.5), nn.Linear(HIDDEN, HIDDEN), nn.ReLU()),
            nn.Linear(HIDDEN, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]  # nn.Module calls are untyped


def alexnet(classes: int = 10, channels: int = 3, size: int = 32) -> AlexNet:
    """AlexNet for square images of `size` pixels: 35,856,330 parameters at 32, 33,603,594 of them fully connected."""
    return AlexNet(classes, channels, size)
