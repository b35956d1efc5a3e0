"""Residual networks of active shifts: the spatial work is done by displacements that are learned with the weights.

Jeon & Kim, "Constructing Fast Network through Deconstruction of Convolution", NeurIPS 2018, section 4. Layers and
counts are those of the authors' prototxt files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.nn.displace import Shift2d

WINDOW = 15  # seven pixels each way; in the published AS-ResNet-w32 the furthest displacement is 4.75


class Block(nn.Module):
    """Pre-activation: 1x1, active shift (with the stride), 1x1; (N, in, H, W) -> (N, out, H / stride, W / stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = out_channels * expansion
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, middle, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(middle)
        self.shift = Shift2d(middle, WINDOW, stride, start="uniform", learn=True, quantize=False)
        self.conv2 = nn.Conv2d(middle, out_channels, 1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(y)
        y = F.relu(self.bn2(self.conv1(y)))
        return self.conv2(self.shift(y)) + kept  # type: ignore[no-any-return]  # nn.Module calls are untyped


class ASResNet(nn.Module):
    """(N, channels, H, W) -> (N, classes). `groups` are (width, blocks, stride of the first block).

    The authors' files have each batch norm merged into a scale and a bias; `translate` reads those too.
    """

    def __init__(
        self, groups: Sequence[tuple[int, int, int]], stem_stride: int, expansion: int, classes: int, channels: int
    ) -> None:
        super().__init__()
        width, blocks, _ = groups[0]
        if min(width, expansion, blocks) < 1:
            raise ConfigError(
                f"`width` (={width}), `expansion` (={expansion}) and `blocks` (={blocks}) must be at least 1."
            )
        self.conv0 = nn.Conv2d(channels, width, 3, stem_stride, 1, bias=False)
        layers = []
        for wide, blocks, stride in groups:
            for number in range(blocks):
                layers.append(Block(width, wide, stride if number == 0 else 1, expansion))
                width = wide
        self.blocks = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.blocks(self.conv0(x))))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.linear(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped

    def translate(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of an authors' file under this network's names; a file that has these names already as it is."""
        if "fc/linear.weight" not in given:
            return dict(given)
        names = self._published()
        translated: dict[str, Tensor] = {}
        for name, tensor in given.items():
            layer, _, field = name.rpartition(".")
            if layer not in names:
                translated[name] = tensor
            elif field in ("shift_x", "shift_y"):
                pair = [given.get(f"{layer}.{part}", torch.zeros(0)) for part in ("shift_y", "shift_x")]
                if pair[0].shape == pair[1].shape:
                    translated[f"{names[layer]}.displacement"] = torch.stack(pair, -1)
            else:
                translated[f"{names[layer]}.{field}"] = tensor
        for name, module in self.named_modules():
            if isinstance(module, nn.BatchNorm2d):  # merged: what is left is a scale and a bias
                translated[f"{name}.running_mean"] = torch.zeros(module.num_features)
                translated[f"{name}.running_var"] = torch.full((module.num_features,), 1 - module.eps)
        return translated

    def _published(self) -> dict[str, str]:
        """Layer of the authors' files -> ours."""
        names = {"conv0": "conv0", "scale/bnlast": "bn", "fc/linear": "linear"}
        group, number = -1, 0
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            # The first block, at the width of the stem, is a group of its own and counts from 0.
            group, number = (group + 1, min(index, 1)) if index == 0 or block.shift.stride > 1 else (group, number + 1)
            place = f"{group}_{number}"
            parts = {f"scale{place}": "bn1", f"conv{place}/1": "conv1", f"scale{place}/1": "bn2"}
            parts |= {f"shift{place}/2": "shift", f"conv{place}/3": "conv2", f"conv/shortcut{group}": "shortcut"}
            if block.shortcut is None:
                del parts[f"conv/shortcut{group}"]
            names |= {theirs: f"blocks.{index}.{ours}" for theirs, ours in parts.items()}
        return names


def _imagenet(width: int, classes: int, channels: int) -> ASResNet:
    groups = [(width, 1, 1), (width, 3, 2), (2 * width, 4, 2), (4 * width, 6, 2), (8 * width, 3, 2)]
    return ASResNet(groups, 2, 1, classes, channels)


def as_resnet_w32(classes: int = 1000, channels: int = 3) -> ASResNet:
    """AS-ResNet-w32 for 224x224 images: 901,256 parameters, of which 3,840 are displacements."""
    return _imagenet(32, classes, channels)


def as_resnet_w50(classes: int = 1000, channels: int = 3) -> ASResNet:
    """AS-ResNet-w50 for 224x224 images: 1.96 M parameters."""
    return _imagenet(50, classes, channels)


def as_resnet_w68(classes: int = 1000, channels: int = 3) -> ASResNet:
    """AS-ResNet-w68 for 224x224 images: 3.42 M parameters."""
    return _imagenet(68, classes, channels)


def as_net(width: int = 16, expansion: int = 1, classes: int = 10, channels: int = 3, blocks: int = 3) -> ASResNet:
    """The network "[width x expansion]" for 32x32 images; published: [16x1], [16x3], [16x6], [16x9], [46x1], [88x1]."""
    groups = [(width, blocks, 1), (2 * width, blocks, 2), (4 * width, blocks, 2)]
    return ASResNet(groups, 1, expansion, classes, channels)
