"""What a model is for (`Task`), and what a stage works with (`Work`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
PRECISIONS = ("float32", "bfloat16")


class Batches(Protocol):
    """Batches of (images, labels): float32 normalised NCHW, and int64 class numbers.

    Iterating gives the plain order and no augmentation for val, test and calibration. `epoch(seed)` gives the
    shuffled, augmented order that belongs to `seed` for training batches; the same seed gives the same batches.
    """

    @property
    def images(self) -> int: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...

    def epoch(self, seed: int) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Task:
    """What the model is for: the data, the classes, where and how precisely to compute.

    `input` is what the network wants: {order, scale, mean, std, size, resize, crop}. `example` is a normalised batch
    of two, (2, C, H, W), so that export keeps the batch dynamic. `fingerprint` stands for the data, its split and
    its augmentation, `name` is what people call it. `val_seen` says that the given base weights may
    have been trained on `val`.
    """

    train: Batches
    calibration: Batches
    val: Batches
    test: Batches
    example: Tensor
    classes: int
    input: Mapping[str, Any]
    fingerprint: str
    name: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "bfloat16"
    seed: int = 0
    teacher: nn.Module | None = None
    val_seen: bool = False


class Progress(Protocol):
    """Where a long piece of work says how far it is."""

    def start(self, what: str, total: int) -> None: ...

    def step(self, note: str = "") -> None: ...

    def end(self) -> None: ...


class Silent:
    """A `Progress` that says nothing."""

    def start(self, what: str, total: int) -> None: ...

    def step(self, note: str = "") -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class Work:
    """What a stage has to work with beside the model and the task.

    `folder` is its own and survives a killed run. `lineage` holds the names of the stages up to this one; random
    numbers follow from it, so that they stay the same when settings or code change. `target` is the runtime to serve.
    """

    folder: Path
    lineage: str = ""
    progress: Progress = field(default_factory=Silent)
    target: str = "onnxruntime"

    def seed(self, base: int, *salt: int | str) -> int:
        """A seed that follows from (the run's seed, the stages' names, `salt`), not from what was drawn before."""
        text = "/".join(str(part) for part in (base, self.lineage, *salt))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
