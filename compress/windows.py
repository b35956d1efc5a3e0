"""What a convolution sees of its input at each position of its output, for any stride, padding and dilation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def windows(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What each output position of a convolution sees of its input: (N, C * P, L), channel by channel."""
    return F.unfold(_padded(layer, x), layer.kernel_size, layer.dilation, 0, layer.stride)


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
