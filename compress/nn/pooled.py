"""Global average pooling and one linear layer, for the place where a fully connected head reads the flattened map.

Lin et al., "Network in Network", ICLR 2014.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class PooledLinear(nn.Module):
    """The mean of each channel over all positions, then `linear`; (N, in_channels * H * W) -> (N, out_features).

    Reads a map as `flatten(1)` leaves it, of any height and width.

    Raises:
        ValueError: `in_channels` or `out_features` below 1.
    """

    def __init__(self, in_channels: int, out_features: int) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"`{name}` (={value}) must be at least 1.")
        self.in_channels, self.out_features = in_channels, out_features
        self.positions = nn.Unflatten(1, (in_channels, -1, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(in_channels, out_features)

    def means(self, x: Tensor) -> Tensor:
        """What `linear` reads: (N, in_channels)."""
        # In two dimensions, of which one is 1: integer runtimes have a kernel for that pooling.
        out: Tensor = self.pool(self.positions(x)).flatten(1)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.means(x))
        return out

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"in_channels": self.in_channels, "out_features": self.out_features}

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_features}"
