"""What the layers here have in common with torch's convolutions: how their geometry is given, kept and shown."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_DEFAULTS = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}


def pair(value: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """A size along height and width; one number stands for both."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def spatial_config(layer: nn.Module) -> dict[str, Any]:
    """The geometry of a layer as constructor arguments in plain values."""
    padding: Any = layer.padding
    return {
        "kernel_size": list(layer.kernel_size),  # type: ignore[arg-type]  # a pair
        "stride": list(layer.stride),  # type: ignore[arg-type]  # a pair
        "padding": padding if isinstance(padding, str) else list(padding),
        "dilation": list(layer.dilation),  # type: ignore[arg-type]  # a pair
        "padding_mode": layer.padding_mode,
    }


def unusual(layer: nn.Module) -> str:
    """What differs from a convolution's defaults, to append to a description: ", stride=2, groups=4"."""
    text = ""
    for name, default in _DEFAULTS.items():
        value = getattr(layer, name, default)
        if value != default:
            text += f", {name}={value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value}"
    return text


def take_channels(x: Tensor, order: Tensor) -> Tensor:
    """The channels of x (N, C, H, W) that `order` names, in its order."""
    if torch.compiler.is_compiling():
        # In a file the map is flat meanwhile: OpenVINO 2026.4 takes other channels where a convolution follows.
        return x.flatten(2).index_select(1, order).view(-1, len(order), *x.shape[2:])
    return x.index_select(1, order)
