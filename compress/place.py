"""Where a run works: its folder and its store, and what it writes and measures there."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import checkpoint, measure, store
from compress.constructors import Build
from compress.errors import TrainingError, UserError
from compress.files import UNFINISHED
from compress.lower import EXPORTS, SUFFIXES, write_file
from compress.lower.torchao import is_dynamic
from compress.reconstruct import plain_images
from compress.stage import Stage
from compress.store import Done
from compress.task import Progress, Task, Work

MEASURES = ("ends", "all", "none")  # which rows of the report get a latency
PARITY_IMAGES = 98  # 7 x 14, since batches of 7 are compared too


@dataclass(frozen=True)
class Place:
    """Where a run works, and what stays the same through it."""

    build: Build | None
    folder: Path
    cache: Path | None
    target: str
    forms: str
    display: Progress

    @property
    def scratch(self) -> Path:
        """For stages that no store keeps; gone when the run ends well."""
        return self.folder / UNFINISHED

    def outcome(self, lineage: str, stage: Stage, model: nn.Module, task: Task, key: str) -> Done:
        """What a stage makes of the model: from the store where it is there, else by doing it."""
        with store.entry(self.cache, self.scratch, key, self.build) as entry:
            found = entry.load() if self.cache is not None else None
            if found is None:
                started = time.perf_counter()
                torch.manual_seed(task.seed)
                work = Work(entry.work, lineage, self.display, self.target)
                try:
                    # On a GPU too in float32 proper, and the same each time.
                    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
                        edit = stage(model.to(task.device), task, work)
                except (UserError, TrainingError) as error:
                    where = "model.train" if lineage == "base" else f"stages.{lineage.rpartition('/')[2]}"
                    raise type(error)(f"`{where}`: {error}") from error
                found = entry.keep(Done(edit, key, time.perf_counter() - started, False), task.input)
            return found.on(task.device)

    def save(self, model: nn.Module, name: str, task: Task, form: str, **about: dict[str, Any]) -> int:
        """Write a checkpoint into the run's folder; gives back its bytes."""
        assert self.build is not None
        about = {"provenance": {}, "results": {}} | about
        return checkpoint.save(model, self.folder / name, build=self.build, input=task.input, form=form, **about)

    def write(self, model: nn.Module, path: Path, task: Task) -> dict[str, Any]:
        """Export a model to `path`, whose ending says the kind; gives back what the exporter says of it."""
        self.display.start(f"write {path.name}", 0)
        example = torch.cat(plain_images(task.calibration, PARITY_IMAGES, torch.device("cpu")))
        store = (self.cache or self.scratch) / "forms"
        written = write_file(model, example, path, input=task.input, target=self.target, forms=self.forms, store=store)
        self.display.end()
        return written

    def latencies(
        self, models: Mapping[str, nn.Module], exported: Sequence[str], task: Task
    ) -> dict[str, dict[str, Any]]:
        """Latency of each model in the target runtime, against the first; the result's `exported` file is used."""
        suffix = SUFFIXES.get(self.target, ".pt2")
        fastest = EXPORTS["pt2_x86"] if self.target == "torch.compile" else suffix
        given = next((f"model{end}" for end in (fastest, suffix) if f"model{end}" in exported), None)
        with tempfile.TemporaryDirectory(prefix="compress-") as temporary:
            paths = {}
            for name, model in models.items():
                if self.target == "cuda" and is_dynamic(model):  # no .pt2 holds the kernels that it runs in
                    paths[name] = Path(temporary) / (name + measure.CHECKPOINT)
                    self.save(model, str(paths[name]), task, "packed")
                elif name == "result" and given:
                    paths[name] = self.folder / given
                else:
                    paths[name] = Path(temporary) / (name + suffix)
                    self.write(model, paths[name], task)
            self.display.start("latency", 0)
            measured = measure.latency(paths, task.example, target=self.target, allow=store.home(self.build))
            self.display.end()
        return {name: asdict(latency) for name, latency in measured.items()}
