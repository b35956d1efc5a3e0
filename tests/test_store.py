"""Under which keys outcomes are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from awkward import noise_task
from torch import nn

from compress.run import run
from compress.stage import Edit
from compress.stages import FineTune
from compress.store import NO_OUTCOME, PACKAGE
from compress.task import Task, Work

SHAPE = (2, 8, 8)
CALLS: list[str] = []


@dataclass(frozen=True)
class Thin:
    """Does nothing, but notes in which runtime it would have measured."""

    latency: float | None = None
    gate: str = "none"

    kind: ClassVar[str] = "substitute"

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        CALLS.append(work.target)
        return Edit(model)


def test_files_without_outcomes_are_there() -> None:
    assert all((PACKAGE / name).is_file() for name in NO_OUTCOME)


@pytest.mark.parametrize(
    ("settings", "calls"), [({"latency": 0.5}, 2), ({"gate": "latency"}, 2), ({}, 1), ({"gate": "macs"}, 1)]
)
def test_what_was_measured_in_one_runtime_does_not_hold_for_another(
    settings: dict[str, Any], calls: int, tmp_path: Path
) -> None:
    CALLS.clear()
    for number, target in enumerate(("onnxruntime", "torch", "onnxruntime")):
        run(
            {"thin": Thin(**settings)},
            noise_task(SHAPE),
            build=("compress.models.small", {"classes": 3, "channels": 2}),
            train=FineTune(epochs=1, lr=0.01),
            out=tmp_path / str(number),
            cache=tmp_path / "cache",
            target=target,
            measure="none",
        )
    assert ["onnxruntime", "torch"][:calls] == CALLS
