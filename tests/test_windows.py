"""What a convolution sees: times its weights it is what the convolution gives, whatever the geometry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compress.windows import windows, windows_at

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"padding": 1},
    "strided": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": (1, 2), "stride": 2, "padding": 2},
    "same": {"padding": "same", "dilation": (3, 1)},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
}


def layer_and_images(geometry: str) -> tuple[nn.Conv2d, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, (3, 2), bias=False, dtype=torch.float64, **GEOMETRIES[geometry])
    return layer, torch.randn(4, 3, 9, 8, dtype=torch.float64)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_windows_times_weights_are_the_output(geometry: str, memory: torch.memory_format) -> None:
    layer, x = layer_and_images(geometry)
    seen = windows(layer, x.contiguous(memory_format=memory))
    torch.testing.assert_close(layer.weight.flatten(1) @ seen, layer(x).flatten(2))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_windows_at_some_places_are_those_of_all(geometry: str) -> None:
    layer, x = layer_and_images(geometry)
    places = torch.tensor([7, 0, 3, 11])
    chosen = windows_at(layer, x, places, layer(x).shape[-1])
    torch.testing.assert_close(chosen, windows(layer, x)[..., places], rtol=0, atol=0)
