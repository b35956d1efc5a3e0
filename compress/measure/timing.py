"""Latency of model files in a named runtime, base and candidates alternating.

Each file gets a process of its own and only one of them works at a time: two runtimes in one process spoil each
other's thread pools, and a machine that drifts (frequency, neighbours) hurts models alike when their turns alternate.
Threads wait asleep, not spinning, where the runtime lets us choose: on an idle machine medians are a few percent above
those of a runtime left to itself, on a busy one figures stay usable.
"""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from compress.errors import UserError

# target -> (the package it needs, the file it reads, how to get the package)
RUNTIMES = {
    "onnxruntime": ("onnxruntime", ".onnx", "pip install onnxruntime"),
    "openvino": ("openvino", ".onnx", "pip install 'compress-cnn[openvino]'"),
    "torch": ("torch", ".pt2", "pip install torch"),
    "torch.compile": ("torch", ".pt2", "pip install torch"),
    "cuda": ("torch", ".pt2", "pip install torch"),
}
CHECKPOINT = ".safetensors"  # torch and cuda run one too, layers that torchao has kernels for in those
WORKER = Path(__file__).with_name("worker.py")
LOAD_TIMEOUT_S = 600.0
# OpenVINO's threads spin for a moment after their work, and would take the cores from the next model.
SETTLE_S = 0.03


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one inference of a whole batch, and how that compares with the first file measured.

    `rounds_ms` has the median of each round; `ratio` is the median over the rounds of (this / first) and `ratio_low`,
    `ratio_high` their smallest and largest, so below 1 is faster than the first. `precision` is what the runtime
    computes in where it says so.
    """

    file: str
    target: str
    runtime: str
    precision: str
    threads: int
    batch: int
    calls: int
    p50_ms: float
    p95_ms: float
    rounds_ms: tuple[float, ...]
    ratio: float
    ratio_low: float
    ratio_high: float


def latency(
    paths: Mapping[str, Path],
    example: Tensor,
    *,
    target: str | Mapping[str, str] = "onnxruntime",
    rounds: int = 5,
    batch: int = 1,
    threads: int | None = None,
    seconds: float = 0.25,
    precision: str = "f32",
    allow: Sequence[str] = (),
    timeout_s: float = LOAD_TIMEOUT_S,
) -> dict[str, Latency]:
    """Measure model files (name -> path) against the first of them, on noise of the shape of `example`.

    Files are .onnx for onnxruntime and openvino, .pt2 for torch, torch.compile and cuda; for torch and cuda they may be
    checkpoints too, `allow` being what loading them takes: their dynamic layers run in torchao's kernels, which no .pt2
    holds. `target` is one runtime for all of them, or name -> runtime. Each model works for about `seconds` a round,
    `rounds` rounds, in an order that is reversed every other round. `threads` defaults to all cores this process may
    use. `precision` is OpenVINO's INFERENCE_PRECISION_HINT: "f32", "bf16", "f16", or "" for its own choice (bf16 on
    some processors, whatever the file says).

    Raises:
        UserError: a target, file or number that will not do, a runtime that is not installed, or a process that
            failed (with the end of what it said) or was silent for `timeout_s`.
    """
    threads = available_threads() if threads is None else threads
    targets = dict.fromkeys(paths, target) if isinstance(target, str) else dict(target)
    _check(paths, targets, {"rounds": rounds, "batch": batch, "threads": threads})
    shape = [batch, *example.shape[1:]]
    turns: dict[str, list[list[float]]] = {name: [] for name in paths}
    with ExitStack() as stack:
        workers = {}
        for name, path in paths.items():
            settings: dict[str, Any] = {"path": str(Path(path).resolve()), "target": targets[name], "shape": shape}
            settings |= {"threads": threads, "precision": precision, "allow": list(allow)}
            workers[name] = stack.enter_context(_Worker(name, path, settings, timeout_s))
        loaded = {name: worker.answer() for name, worker in workers.items()}
        for worker in workers.values():
            worker.turn(seconds)
        for index in range(rounds):
            for name in list(paths) if index % 2 == 0 else reversed(list(paths)):
                turns[name].append(workers[name].turn(seconds))
    first = [median(turn) for turn in turns[next(iter(paths))]]
    return {
        name: _summary(Path(paths[name]).name, targets[name], loaded[name], threads, batch, turns[name], first)
        for name in paths
    }


def _summary(
    file: str,
    target: str,
    loaded: Mapping[str, str],
    threads: int,
    batch: int,
    turns: Sequence[Sequence[float]],
    first: Sequence[float],
) -> Latency:
    calls = np.concatenate([np.asarray(turn) for turn in turns])
    medians = [median(turn) for turn in turns]
    ratios = [mine / base for mine, base in zip(medians, first, strict=True)]
    return Latency(
        file=file,
        target=target,
        runtime=loaded["runtime"],
        precision=loaded["precision"],
        threads=threads,
        batch=batch,
        calls=len(calls),
        p50_ms=float(np.percentile(calls, 50)),
        p95_ms=float(np.percentile(calls, 95)),
        rounds_ms=tuple(medians),
        ratio=median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
    )


def available_threads() -> int:
    """Cores that this process may use: its affinity, and where a container sets one, its CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def require_runtime(target: str) -> None:
    """Raise `UserError` where the runtime `target`, one of `RUNTIMES`, is not installed."""
    package, _, remedy = RUNTIMES[target]
    if find_spec(package) is None:
        raise UserError(f"`target` (={target!r}) needs the package {package}, which is not installed: {remedy}.")


def _check(paths: Mapping[str, Path], targets: Mapping[str, str], counts: Mapping[str, int]) -> None:
    if not paths:
        raise UserError("`paths` is empty; give at least one model file, by name.")
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"`{name}` (={value}) must be at least 1.")
    for name, path in paths.items():
        target = targets.get(name)
        if target not in RUNTIMES:
            raise UserError(f"`target` (={target!r}) must be one of: {', '.join(RUNTIMES)}.")
        require_runtime(target)
        suffix = RUNTIMES[target][1]
        suffixes = (suffix, CHECKPOINT) if target in ("torch", "cuda") else (suffix,)
        if Path(path).suffix not in suffixes:
            raise UserError(f"`paths[{name!r}]` (={path}) must be a {suffix} file for `target` {target!r}.")
        if not Path(path).is_file():
            raise UserError(f"`paths[{name!r}]` (={path}) must be a file; there is none.")


class _Worker:
    """One process that holds one model; a context manager, so that none outlives the measurement."""

    def __init__(self, name: str, path: Path, settings: dict[str, Any], timeout_s: float) -> None:
        self.title = f"{name!r} (={path}) in {settings['target']}"
        self.timeout_s = timeout_s
        self.answers: queue.Queue[str] = queue.Queue()
        self.said = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__, with the process
        threads = str(settings["threads"])
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            # PASSIVE: torch's threads sleep while they wait; spinning ones made single calls fifty times as long.
            env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"},
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def answer(self) -> dict[str, Any]:
        try:
            line = self.answers.get(timeout=self.timeout_s)
        except queue.Empty:
            raise UserError(f"{self.title} could not be measured: no answer in {self.timeout_s:g} s.") from None
        if not line:
            code = self.process.wait()
            self.said.seek(0)
            tail = self.said.read().decode(errors="replace").strip().splitlines()[-8:]
            raise UserError(
                f"{self.title} could not be measured: its process ended with code {code}, saying:\n"
                + "\n".join(f"  {text}" for text in tail or ["(nothing)"])
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def turn(self, seconds: float) -> list[float]:
        """Let this model work alone for `seconds` (at least 5 calls); milliseconds of each call."""
        assert self.process.stdin is not None
        try:
            print(json.dumps({"seconds": seconds, "least": 5}), file=self.process.stdin, flush=True)
        except OSError:
            self.answer()  # which says how the process ended
        times: list[float] = self.answer()["ms"]
        time.sleep(SETTLE_S)
        return times

    def __enter__(self) -> _Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.said.close()
