"""torch's own layers, as a blueprint says them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from compress.constructors import TORCH, arguments, make


@pytest.mark.parametrize("cls", TORCH.values(), ids=list(TORCH))
def test_every_torch_layer_in_the_table_says_its_arguments(cls: type[nn.Module]) -> None:
    given: dict[str, Any] = {
        "Conv1d": dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, padding="valid", bias=False),
        "Conv2d": dict(in_channels=4, out_channels=6, kernel_size=(3, 1), stride=(2, 1), padding=(1, 0), dilation=2)
        | dict(groups=2, bias=False, padding_mode="reflect"),
        "ConvTranspose2d": dict(in_channels=4, out_channels=6, kernel_size=3, stride=2, output_padding=1),
        "Linear": dict(in_features=4, out_features=6, bias=False),
        "BatchNorm1d": dict(num_features=4, affine=False),
        "BatchNorm2d": dict(num_features=4, eps=1e-3, momentum=None, track_running_stats=False),
        "GroupNorm": dict(num_groups=2, num_channels=4, affine=False),
        "LayerNorm": dict(normalized_shape=(8, 8), elementwise_affine=False),
        "Dropout": dict(p=0.1, inplace=True),
        "Dropout2d": dict(p=0),
        "Flatten": dict(start_dim=2),
        "LeakyReLU": dict(negative_slope=0.3),
        "PReLU": dict(num_parameters=4),
        "ELU": dict(alpha=0.5),
        "GELU": dict(approximate="tanh"),
        "Softmax": dict(dim=1),
        "Hardtanh": dict(min_val=0.0, max_val=4.0),
        "MaxPool2d": dict(kernel_size=3, stride=2, padding=1, ceil_mode=True),
        "AvgPool2d": dict(kernel_size=2, count_include_pad=False, divisor_override=3),
        "AdaptiveAvgPool2d": dict(output_size=(None, 2)),
        "AdaptiveMaxPool2d": dict(output_size=1),
        "ZeroPad2d": dict(padding=(1, 1, 1, 1)),
        "ReflectionPad2d": dict(padding=1),
        "Upsample": dict(scale_factor=2, mode="bilinear", align_corners=True),
        "PixelShuffle": dict(upscale_factor=2),
        "ChannelShuffle": dict(groups=2),
    }.get(cls.__name__, {})
    layer = cls(**given)
    if cls is nn.Sequential:
        return
    said = arguments(layer)
    again = make(cls.__name__, said, "cpu", 0)
    assert arguments(again) == said
    assert again.extra_repr().replace("(", "").replace(")", "") == layer.extra_repr().replace("(", "").replace(")", "")
    assert [p.shape for p in again.parameters()] == [p.shape for p in layer.parameters()]
    assert set(given) <= set(said)
