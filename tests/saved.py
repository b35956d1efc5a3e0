"""Checkpoints of small networks, for the tests about what comes back and about what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import checkpoint

INPUT = {"order": "gray", "scale": 16.0, "mean": [0.3], "std": [0.4], "size": [8, 8], "resize": None, "crop": None}
SMALL: tuple[str, dict[str, Any]] = ("compress.models.small", {})
RESNET = ("compress.models.resnet20", {"classes": 10})


def save(model: nn.Module, path: Path, build: Any = SMALL, **other: Any) -> int:
    given = {"input": INPUT, "provenance": {"seed": 0}, "results": {"accuracy": 97.5}} | other
    return checkpoint.save(model, path, build=build, **given)


class Stepped(nn.Module):
    """A base model of the user's: a tied weight, a buffer outside the state, a plain tensor, a module used twice."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a = self.b = nn.Conv2d(1, width, 1)
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("outside", torch.arange(width) / 7, persistent=False)
        self.plain = torch.arange(width) / 3
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = (self.a(x) + self.b(x)).mean((2, 3))
        return self.second(self.first(y)) * self.factor + self.outside + self.plain


HOME = __name__
STEPPED = (f"{HOME}.Stepped", {"width": 4})
