"""What stands at the end of a residual branch that was taken out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Zero(nn.Module):
    """Zeros to be added to a shortcut: a single one, (N, ...) -> (1, ...), which fits any.

    With `like_input` as many as the input has, for a forward pass that adds the shortcut to them in place. Traces and
    files leave them out, and the addition with them.
    """

    def __init__(self, like_input: bool = False) -> None:
        super().__init__()
        self.like_input = like_input

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.like_input else x.new_zeros((1,) * x.dim())

    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"like_input": self.like_input}

    def macs(self, input_shape: tuple[int, ...]) -> int:
        """None."""
        return 0

    def lower(self, target: str) -> nn.Module:
        """It is plain already."""
        return self

    def extra_repr(self) -> str:
        return "like_input=True" if self.like_input else ""
