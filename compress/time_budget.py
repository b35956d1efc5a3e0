"""A budget in time: fewer multiply-adds, step by step, until the time measured in the target runtime is reached."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import nn

from compress.errors import ConfigError
from compress.files import write
from compress.gate import timed
from compress.task import Task, Work

STEP = 0.1  # of the MACs

Made = tuple[Any, Callable[[], nn.Module]]  # what makes the network as fast as it is, as JSON; the network


def reached_in_time(
    model: nn.Module, made: Callable[[float], Made], least: float, limits: str, wanted: float, task: Task, work: Work
) -> tuple[float, dict[str, Any]]:
    """The largest share of the MACs, in steps, with which the network takes at most `wanted` of its time; notes.

    `made` gives the network that a share of the MACs leaves. What is measured is stored and replayed.

    Raises:
        ConfigError: not even with `least` of the MACs, which is all that the settings `limits` allow; the fastest is
            named.
    """
    file = work.folder / "latency.json"
    measured: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    steps = [round(1 - STEP * i, 2) for i in range(1, 10) if 1 - STEP * i > least]
    for share in [*steps, least]:
        what, build = made(share)
        question = f"{work.target}: {json.dumps(what, sort_keys=True)}"
        if question not in measured:
            times = timed({"before": model, "after": build()}, task.example.shape[1:], work.target)
            measured[question] = round(times["after"].p50_ms / times["before"].p50_ms, 4)
            write(file, json.dumps(measured, indent=1).encode())
        if measured[question] <= wanted:
            return share, {"latency": {"achieved": measured[question], "target": work.target}}
    fastest = min(measured.values())
    raise ConfigError(
        f"`latency` (={wanted}) cannot be reached: the fastest of what {limits} allow took {fastest} of the time in "
        f"{work.target}; that is the closest."
    )
