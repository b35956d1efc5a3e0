"""Squeeze-and-excitation: each channel is scaled by a gate that looks at the means of all channels.

Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

LEAST = 4  # units of the bottleneck: with few channels, channels / reduction describes nothing any more


class SqueezeExcitation(nn.Module):
    """x * gate, with gate = largest * sigmoid(fc2(relu(fc1(mean of each channel)))); any (N, channels, H, W).

    The bottleneck has `channels / reduction` units, and at least 4. `fc2` is zero at the start, where a sigmoid is one
    half. So with `largest` 2 the gate is exactly 1 then: put into a trained network, the layer changes nothing, and
    each channel can be raised as well as lowered by training. The paper's gate, for networks trained from the start
    with it, has `largest` 1.

    Raises:
        ValueError: `channels` or `reduction` below 1, or a `largest` that is not above 0.
    """

    def __init__(self, channels: int, reduction: int = 16, largest: float = 2.0) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("reduction", reduction)):
            if value < 1:
                raise ValueError(f"`{name}` (={value}) must be at least 1.")
        if not (math.isfinite(largest) and largest > 0):
            raise ValueError(f"`largest` (={largest}) must be a finite number above 0; 2 starts as the identity.")
        self.channels, self.reduction, self.largest = channels, reduction, largest
        hidden = max(channels // reduction, LEAST)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.relu = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.sigmoid = nn.Sigmoid()
        nn.init.zeros_(self.fc2.weight)
        assert self.fc2.bias is not None
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.sigmoid(self.fc2(self.relu(self.fc1(self.pool(x)))))
        if self.largest != 1:
            gate = self.largest * gate
        return x * gate  # type: ignore[no-any-return]  # nn.Module calls are untyped

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"channels": self.channels, "reduction": self.reduction, "largest": self.largest}

    def extra_repr(self) -> str:
        text = f"{self.channels}, reduction={self.reduction}"
        return text if self.largest == 2 else f"{text}, largest={self.largest:g}"
