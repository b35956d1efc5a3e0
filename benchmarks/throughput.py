"""`FineTune` against a bare PyTorch loop over the same batches in the same precision: images per second.

Both do the same number of steps in turns, several rounds, so that a drifting machine hurts both alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from common import data_root, record

from compress.data import cifar10, make_task
from compress.models import resnet20
from compress.stages import FineTune
from compress.task import Work
from compress.train import fit

STEPS, ROUNDS = 40, 7


class Some:
    """The first batches of a split, made beforehand, so that both loops see the same and none pays for it."""

    def __init__(self, batches: Any) -> None:
        self.kept = [batch for batch, _ in zip(batches.epoch(0), range(STEPS), strict=False)]
        self.images = sum(len(y) for _, y in self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def epoch(self, seed: int) -> Iterator[Any]:
        return iter(self.kept)


def bare(model: torch.nn.Module, batches: Some) -> None:
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for x, y in batches.epoch(0):
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(output.float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def ours(model: torch.nn.Module, task: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        fit(model, task, Work(Path(folder)), FineTune(epochs=1, lr=0.01))


task = make_task(cifar10(data_root()), precision="bfloat16")
batches = Some(task.train)
task = replace(task, train=batches)
ours(resnet20(), task)
times: dict[str, list[float]] = {"bare": [], "ours": []}
for _ in range(ROUNDS):
    for name, work in (("bare", lambda: bare(resnet20(), batches)), ("ours", lambda: ours(resnet20(), task))):
        started = time.perf_counter()
        work()
        times[name].append(time.perf_counter() - started)
ratios = [b / o for b, o in zip(times["bare"], times["ours"], strict=True)]
rows = [
    {
        "images_per_second": {name: round(batches.images / median(t), 1) for name, t in times.items()},
        "ratio": round(median(ratios), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
    }
]
record("throughput", rows, model="resnet20", data="CIFAR-10", batch_size=128, steps=STEPS, rounds=ROUNDS)
