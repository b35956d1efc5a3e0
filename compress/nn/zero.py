"""What stands at the end of a residual branch that was taken out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Zero(nn.Module):
    """Zeros to be added to a shortcut: (N, C, H, W) -> (1, 1, 1, 1), which fits any.

    With `channels`, (N, channels, ceil(H / stride), ceil(W / stride)), for a forward pass that adds the shortcut in
    place. Traces and files leave them out, and the addition with them.

    Raises:
        ValueError: `channels` below 0 or a `stride` below 1.
    """

    def __init__(self, channels: int = 0, stride: int = 1) -> None:
        super().__init__()
        for name, value, least in (("channels", channels, 0), ("stride", stride, 1)):
            if value < least:
                raise ValueError(f"`{name}` (={value}) must be at least {least}.")
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        if not self.channels:
            return x.new_zeros((1,) * x.dim())
        places = [-(-size // self.stride) for size in x.shape[2:]]
        return x.new_zeros(x.shape[0], self.channels, *places)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"channels": self.channels, "stride": self.stride}

    def macs(self, input_shape: tuple[int, ...]) -> int:
        """None."""
        return 0

    def lower(self, target: str) -> nn.Module:
        """It is plain already."""
        return self

    def extra_repr(self) -> str:
        return f"{self.channels}, stride={self.stride}" if self.channels else ""
