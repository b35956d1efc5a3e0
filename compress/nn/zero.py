"""What stands at the end of a residual branch that was taken out."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Zero(nn.Module):
    """A single zero, to be added to a shortcut of any shape; (N, ...) -> (1, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros((1,) * x.dim())

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {}

    def macs(self, input_shape: tuple[int, ...]) -> int:
        """None."""
        return 0

    def lower(self, target: str) -> nn.Module:
        """It is plain already: a constant, which runtimes leave out of the addition."""
        return self
