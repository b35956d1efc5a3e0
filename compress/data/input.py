"""What a network wants as input: the description that a model carries with its weights, and its application."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from compress.errors import ConfigError

CHANNELS = {"rgb": 3, "bgr": 3, "gray": 1}
NORMALIZATION = ("order", "scale", "mean", "std")
KEYS = (*NORMALIZATION, "size", "resize", "crop")


def complete(default: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The description with `changes` laid over `default` key by key, as plain values.

    Raises:
        ConfigError: an unknown key, or a value that makes no sense; all problems, one a line.
    """
    changes = changes or {}
    unknown = [str(key) for key in changes if key not in KEYS]
    if unknown:
        raise ConfigError(f"`input` has the unknown key {unknown[0]!r}; known keys are {', '.join(KEYS)}.")
    merged = {key: changes.get(key, default.get(key)) for key in KEYS}
    problems = _problems(merged)
    if problems:
        raise ConfigError("\n".join(problems))
    height, width = merged["size"]
    return {
        "order": merged["order"],
        "scale": float(merged["scale"]),
        "mean": [float(value) for value in merged["mean"]],
        "std": [float(value) for value in merged["std"]],
        "size": [int(height), int(width)],
        "resize": merged["resize"],
        "crop": merged["crop"],
    }


def _problems(given: Mapping[str, Any]) -> list[str]:
    problems = []
    order, scale, size, resize = given["order"], given["scale"], given["size"], given["resize"]
    if order not in CHANNELS:
        problems.append(f"`input.order` (={order!r}) must be one of {', '.join(CHANNELS)}.")
    if not _is_number(scale) or scale <= 0:
        problems.append(f"`input.scale` (={scale!r}) must be a number above 0, such as 255 for 8-bit images.")
    for key in ("mean", "std"):
        values = given[key]
        if not _is_list(values) or not all(_is_number(value) for value in values):
            problems.append(f"`input.{key}` (={values!r}) must be a list of numbers, one for each channel.")
        elif order in CHANNELS and len(values) != CHANNELS[order]:
            problems.append(
                f"`input.{key}` (={list(values)}) must hold {CHANNELS[order]} number(s), one for each channel of "
                f"order={order}."
            )
        elif key == "std" and min(values) <= 0:
            problems.append(f"`input.std` (={list(values)}) must be above 0 everywhere; images are divided by it.")
    if not _is_list(size) or len(size) != 2 or not all(_is_count(value) for value in size):
        problems.append(f"`input.size` (={size!r}) must be [height, width] in pixels, each at least 1.")
    elif resize is not None and (not _is_count(resize) or resize < max(size)):
        problems.append(
            f"`input.resize` (={resize!r}) must be the length of the shorter side in pixels, not less than the "
            f"larger side of `input.size` (={list(size)}) which is cut out of it; or null."
        )
    if given["crop"] not in (None, "center"):
        problems.append(f"`input.crop` (={given['crop']!r}) must be 'center' or null.")
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def normalise(pixels: Tensor, input: Mapping[str, Any]) -> Tensor:
    """(N, C, H, W) pixels in RGB or grey -> (N, channels, H, W) float32 as the network wants it.

    A grey image becomes three equal channels for `rgb` and `bgr`; a colour image becomes its channels' mean for
    `gray`. `mean` and `std` are in the order of the channels after that.
    """
    x = pixels.to(torch.float32, copy=True)  # the rest works in place
    channels = CHANNELS[input["order"]]
    if channels == 1 and x.shape[1] != 1:
        x = x.mean(dim=1, keepdim=True)
    elif channels == 3 and x.shape[1] == 1:
        x = x.repeat(1, 3, 1, 1)
    elif input["order"] == "bgr":
        x = x.flip(1)
    mean, std = _per_channel(tuple(input["mean"]), x.device), _per_channel(tuple(input["std"]), x.device)
    return x.div_(input["scale"]).sub_(mean).div_(std)


@lru_cache(maxsize=16)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept, since bringing new numbers to a GPU makes the CPU wait for it.
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
