"""What a convolution sees of its input at each position of its output, for any stride, padding and dilation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def windows(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What each output position of a convolution sees of its input: (N, C * P, L), channel by channel."""
    seen = _padded(layer, x)
    for axis, (k, d, stride) in enumerate(zip(layer.kernel_size, layer.dilation, layer.stride, strict=True), start=2):
        seen = seen.unfold(axis, (k - 1) * d + 1, stride)[..., ::d]  # a view; F.unfold takes two to four times as long
    return seen.permute(0, 1, 4, 5, 2, 3).reshape(len(x), x.shape[1] * math.prod(layer.kernel_size), -1)


def windows_at(layer: nn.Conv2d, x: Tensor, chosen: Tensor, width: int) -> Tensor:
    """What `windows` gives at the `chosen` places of an output so wide, without the others: (N, C * P, chosen)."""
    padded = _padded(layer, x)
    rows, columns = (torch.arange(k) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True))
    inside = (rows.unsqueeze(1) * padded.shape[-1] + columns).flatten().to(chosen)
    corners = chosen // width * layer.stride[0] * padded.shape[-1] + chosen % width * layer.stride[1]
    return padded.flatten(2)[:, :, (inside.unsqueeze(1) + corners).flatten()].view(len(padded), -1, len(chosen))


def _padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    # Also right for padding="same", which may be wider on one side.
    around = layer._reversed_padding_repeated_twice
    return F.pad(x, around, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
