"""Thinning to a latency: fewer multiply-adds, step by step, until the time measured in the target is reached."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from compress.channels.groups import ChannelGroup
from compress.channels.slices import remove
from compress.errors import ConfigError
from compress.files import write
from compress.gate import timed
from compress.task import Task, Work

STEP = 0.1  # of the MACs


def reached_in_time(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    order: Mapping[str, Tensor],
    shared: Callable[[float], dict[str, int]],
    least: float,
    wanted: float,
    task: Task,
    work: Work,
) -> tuple[float, dict[str, Any]]:
    """The largest share of the MACs, in steps, with which the network takes at most `wanted` of its time; notes.

    `shared` says how many units each group keeps for a share of the MACs. What is measured is stored and replayed.

    Raises:
        ConfigError: not even with `least` of the MACs; the fastest is named.
    """
    file = work.folder / "latency.json"
    measured: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    steps = [round(1 - STEP * i, 2) for i in range(1, 10) if 1 - STEP * i > least]
    for share in [*steps, least]:
        left = shared(share)
        question = f"{work.target}: {json.dumps(left, sort_keys=True)}"
        if question not in measured:
            thin = copy.deepcopy(model)
            gone = {g.name: order[g.name][: g.units - left[g.name]] for g in groups if left[g.name] < g.units}
            remove(thin, groups, gone)
            times = timed({"before": model, "after": thin}, task.example.shape[1:], work.target)
            measured[question] = round(times["after"].p50_ms / times["before"].p50_ms, 4)
            write(file, json.dumps(measured, indent=1).encode())
        if measured[question] <= wanted:
            return share, {"latency": {"achieved": measured[question], "target": work.target}}
    fastest = min(measured.values())
    raise ConfigError(
        f"`latency` (={wanted}) cannot be reached: the fastest of what `floor` and `multiple` allow took {fastest} of "
        f"the time in {work.target}; that is the closest."
    )
