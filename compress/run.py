"""The loop: the base model, then stage by stage, measured after each; at the end the files and the report."""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import __version__, checkpoint, machine, measure, progress, report, store
from compress.constructors import Build, named
from compress.errors import ConfigError, TrainingError, UserError
from compress.files import UNFINISHED
from compress.lower import EXPORTS, SUFFIXES, write_file
from compress.lower.forms import FORMS
from compress.lower.pt2_x86 import pt2_x86_problems
from compress.lower.torchao import is_dynamic, torchao_problems
from compress.models.weights import load_weights
from compress.quantization import is_quantized
from compress.reconstruct import plain_images
from compress.rows import answers, plain, row
from compress.stage import Stage, missing_problems, order_problems
from compress.store import Done
from compress.task import Progress, Task, Work

PARITY_IMAGES = 98  # 7 x 14, since batches of 7 are compared too


@dataclass(frozen=True)
class Result:
    """What a run gives back: the compressed model, where its files are, and the report as plain JSON."""

    model: nn.Module
    folder: Path
    report: dict[str, Any]

    @property
    def checkpoint(self) -> Path | None:
        """The file for `compress.load`; None for a model without `build`."""
        written = self.report["checkpoint"]
        return self.folder / written["file"] if written else None


def run(
    stages: Mapping[str, Stage] | Sequence[Stage],
    task: Task,
    *,
    build: Build | None = None,
    model: nn.Module | None = None,
    weights: Path | str | None = None,
    train: Stage | None = None,
    out: Path | str = Path("outputs/runs/run"),
    export: Sequence[str] = (),
    target: str = "onnxruntime",
    measure: str = "ends",
    forms: str = "measured",
    cache: Path | str | None = Path("outputs/cache"),
    recipe: str = "",
    command: str = "",
) -> Result:
    """Compress a model, stage by stage, and write what came out into the folder `out`.

    The base is what `build` makes ("pkg.factory", {arguments}) with `weights` loaded, or trained by `train` where there
    are none; or a `model` instance, which can be compressed and exported but not stored, resumed, or written as a
    checkpoint, since nobody could build it again. `measure` says which rows get a latency in the runtime `target`:
    "ends" (base and result), "all", or "none". `forms` says which of its equal plain forms a layer takes in the file
    that `target` runs: the one that is "measured" to be fastest there, or its "default". `cache` is the store of
    finished stages and of what was measured for the forms; None turns it off.

    Raises:
        ConfigError: stages in an order that makes no sense, or no base.
        UserError: whatever a stage finds that it cannot do.
        TrainingError: a training that turned to NaN.
    """
    named = dict(stages) if isinstance(stages, Mapping) else {type(s).__name__.lower(): s for s in stages}
    if len(named) < len(stages):
        raise ConfigError("two stages of one class need names of their own: give `stages` as a mapping.")
    problems = order_problems(named)
    if model is None or not is_quantized(model):
        problems += missing_problems(named)
    if "pt2_x86" in export:
        problems += pt2_x86_problems(named)
    if target == "cuda" and measure != "none" and build is None:
        problems += torchao_problems(named)
    if problems or not named:
        raise ConfigError("\n".join(problems) or "`stages` must hold at least one stage.")
    if (build is None) == (model is None):
        raise ConfigError("exactly one of `build` and `model` must be given.")
    if forms not in FORMS:
        raise ConfigError(f"`forms` (={forms!r}) must be one of {', '.join(FORMS)}.")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"writes into {folder}", file=sys.stderr)
    display = progress.make()
    place = _Place(build, folder, None if cache is None else Path(cache), target, forms, display)
    try:
        final, content = _carry_out(place, named, task, model, weights, train, export, measure)
    finally:
        display.close()
    content |= {"recipe": recipe, "command": command}
    _publish(place, content)
    shutil.rmtree(place.scratch, ignore_errors=True)
    return Result(final, folder, content)


@dataclass(frozen=True)
class _Place:
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


def _carry_out(
    place: _Place,
    stages: Mapping[str, Stage],
    task: Task,
    model: nn.Module | None,
    weights: Path | str | None,
    train: Stage | None,
    export: Sequence[str],
    which: str,
) -> tuple[nn.Module, dict[str, Any]]:
    """Base, stages, checkpoint, exports, latency; gives back the result and the report's content."""
    started = time.perf_counter()
    done, given = _base(place, task, model, weights, train)
    teacher = copy.deepcopy(done.edit.model).eval().requires_grad_(False)
    task = replace(task, teacher=teacher, val_seen=task.val_seen or given)
    first = answers(done.edit.model, task, place.display, "base")
    rows = [row("base", None if given or train is None else store.described(train), done, first, first, task)]
    hits = [] if given else [{"stage": "base", "key": done.key, "hit": done.hit}]
    timed = {"base": teacher} if which != "none" else {}
    base_key, lineage = done.key, "base"
    if place.build is not None:
        rows[0] |= {"bytes": place.save(teacher, "base.safetensors", task, "training"), "file": "base.safetensors"}

    for name, stage in stages.items():
        what = store.described(stage)
        measures = getattr(stage, "gate", "none") == "latency" or getattr(stage, "latency", None)
        timing = place.target if measures else None  # then the target decides too
        lineage = f"{lineage}/{name}"
        key = store.key(done.key, [what, store.files_of(stage), store.code_of(type(stage)), timing, lineage], task)
        done = place.outcome(lineage, stage, done.edit.model, task, key)
        hits.append({"stage": name, "key": done.key, "hit": done.hit})
        rows.append(row(name, what, done, answers(done.edit.model, task, place.display, name), first, task))
        if which == "all":
            timed[name] = copy.deepcopy(done.edit.model)

    begun, final, file = time.perf_counter(), done.edit.model, None
    if place.build is not None:
        file = place.folder / "model.safetensors"
        provenance = {
            "stages": {name: store.described(stage) for name, stage in stages.items()},
            "seed": task.seed,
            "data": task.fingerprint,
            "base": base_key,
            "versions": {"compress": __version__, "torch": torch.__version__},
        }
        results = {key: rows[-1]["accuracy"][key] for key in ("correct", "total")}
        results |= {key: rows[-1][key] for key in ("params", "macs")}
        place.save(final, file.name, task, "packed", provenance=provenance, results=results)
        final = checkpoint.load(file, allow=store.home(place.build)).to(task.device)
    result = row("result", None, plain(final, 0.0), answers(final, task, place.display, "result"), first, task)
    result["seconds"] = time.perf_counter() - begun
    if file is not None:
        result |= {"bytes": file.stat().st_size, "file": file.name}
    rows.append(result)
    exports = [place.write(final, place.folder / f"model{EXPORTS[kind]}", task) for kind in export]
    if timed:
        measured = place.latencies(timed | {"result": final}, [export["file"] for export in exports], task)
        for line in rows:
            line["latency"] = measured.get(line["name"])
    factory, arguments = place.build or (None, {})
    return final, {
        "format": report.FORMAT,
        "seed": task.seed,
        "data": {
            "name": task.name or "images",
            "fingerprint": task.fingerprint,
            "sizes": {name: getattr(task, name).images for name in ("train", "val", "test")},
            "input": dict(task.input),
        },
        "model": {"factory": factory, "arguments": arguments, "weights": str(weights) if weights else None},
        "device": str(task.device),
        "precision": task.precision,
        "target": place.target,
        "val_seen": task.val_seen,
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "seconds": time.perf_counter() - started,
        "rows": rows,
        "exports": exports,
        "store": hits,
    }


def _base(
    place: _Place, task: Task, model: nn.Module | None, weights: Path | str | None, train: Stage | None
) -> tuple[Done, bool]:
    """The base model, and whether it came with weights of its own: built and loaded, or built and trained (stored)."""
    started = time.perf_counter()
    torch.manual_seed(task.seed)
    given = model is not None
    if model is None:
        assert place.build is not None
        model = named(place.build[0])(**place.build[1])
        assert model is not None
    what = {"build": place.build, "code": store.code_of(named(place.build[0])) if place.build else None}
    if weights is not None:
        load_weights(model, weights, allow=store.home(place.build), input=task.input)
    elif train is not None:
        key = store.key(store.key("", what, task), [store.described(train), store.files_of(train)], task)
        return place.outcome("base", train, model, task, key), False
    key = store.key(store.state_digest(model), what, task)
    done = replace(plain(model.eval(), time.perf_counter() - started), key=key).on(task.device)
    return done, given or weights is not None


def _publish(place: _Place, content: dict[str, Any]) -> None:
    """Say how to load what was written, write the report, print the table."""
    content["checkpoint"] = None
    if place.build is not None:
        file = place.folder / "model.safetensors"
        content["checkpoint"] = {"file": file.name, "bytes": file.stat().st_size, "load": f'compress.load("{file}")'}
        if remark := checkpoint.foreign(place.build):
            content["checkpoint"]["remark"] = remark
    report.write(content, place.folder)
    report.show(content)
