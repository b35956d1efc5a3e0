"""The loop: the base model, then stage by stage, measured after each; at the end the files and the report."""

from __future__ import annotations

import copy
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import __version__, checkpoint, machine, progress, report, store
from compress.constructors import Build, named
from compress.errors import ConfigError, UserError
from compress.lower import EXPORTS
from compress.lower.forms import FORMS
from compress.lower.plain import lower
from compress.lower.pt2 import exported
from compress.lower.pt2_x86 import pt2_x86_problems
from compress.lower.torchao import torchao_problems
from compress.measure import RUNTIMES, require_runtime
from compress.models.weights import load_weights
from compress.off_map import off_the_map
from compress.place import MEASURES, Place
from compress.quantization import is_quantized
from compress.rows import answers, plain, row
from compress.stage import Stage, missing_problems, order_problems
from compress.store import Done
from compress.task import Task
from compress.unfit import require_fit


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
    floor: float = 0.0,
    cache: Path | str | None = Path("outputs/cache"),
    recipe: str = "",
    command: str = "",
) -> Result:
    """Compress a model, stage by stage, and write what came out into the folder `out`.

    The base is what `build` makes ("pkg.factory", {arguments}) with `weights` loaded, or trained by `train` where there
    are none; or a `model` instance, which can be compressed and exported but not stored, resumed, or written as a
    checkpoint, since nobody could build it again. `measure` says which rows get a latency in the runtime `target`:
    "ends" (base and result), "all", or "none". `forms` says which of its equal plain forms a layer takes in the file
    that `target` runs: the one that is "measured" to be fastest there, or its "default". `floor` is the share of val
    that has to get the base's answer after each stage that trains, and at the end; else the run stops there. `cache` is
    the store of finished stages and of what was measured for the forms; None turns it off.

    Raises:
        ConfigError: stages in an order that makes no sense, or no base.
        UserError: whatever a stage finds that it cannot do; a file that cannot be made, or answers below `floor`: then
            the checkpoint as it is and the report are written.
        TrainingError: a training that turned to NaN.
    """
    named = dict(stages) if isinstance(stages, Mapping) else {type(s).__name__.lower(): s for s in stages}
    if len(named) < len(stages):
        raise ConfigError("two stages of one class need names of their own: give `stages` as a mapping.")
    export = [export] if isinstance(export, str) else list(export)
    problems = _bad_choices({"target": target, "measure": measure, "forms": forms}, export) + order_problems(named)
    if model is None or not is_quantized(model):
        problems += missing_problems(named)
    if "pt2_x86" in export:
        problems += pt2_x86_problems(named)
    if target == "cuda" and measure != "none" and build is None:
        problems += torchao_problems(named)
    if not named:
        problems.append("`stages` must hold at least one stage.")
    if (build is None) == (model is None):
        problems.append("exactly one of `build` and `model` must be given.")
    if not 0 <= floor <= 1:
        problems.append(f"`floor` (={floor}) must be a share of val, between 0 (off) and 1.")
    if problems:
        raise ConfigError("\n".join(problems))
    if measure != "none":
        require_runtime(target)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"writes into {folder}", file=sys.stderr)
    display = progress.make()
    place = Place(build, folder, None if cache is None else Path(cache), target, forms, display)
    try:
        final, content = _carry_out(place, named, task, model, weights, train, export, measure, floor)
    finally:
        display.close()
    content |= {"recipe": recipe, "command": command}
    _publish(place, content)
    shutil.rmtree(place.scratch, ignore_errors=True)
    if content["failure"]:
        raise UserError(f"{content['failure']} What there is lies in {folder}.")
    return Result(final, folder, content)


def _bad_choices(given: Mapping[str, str], export: Sequence[str]) -> list[str]:
    """What is none of the names that there are, as sentences."""
    known = {"target": tuple(RUNTIMES), "measure": MEASURES, "forms": FORMS}
    problems = [
        f"`{name}` (={value!r}) must be one of {', '.join(known[name])}."
        for name, value in given.items()
        if value not in known[name]
    ]
    unknown = [kind for kind in export if kind not in EXPORTS]
    return problems + [f"`export` (={kind!r}) must be a list out of {', '.join(EXPORTS)}." for kind in unknown]


def _carry_out(
    place: Place,
    stages: Mapping[str, Stage],
    task: Task,
    model: nn.Module | None,
    weights: Path | str | None,
    train: Stage | None,
    export: Sequence[str],
    which: str,
    floor: float,
) -> tuple[nn.Module, dict[str, Any]]:
    """Base, stages, checkpoint, exports, latency; gives back the result and the report's content."""
    started = time.perf_counter()
    done, given = _base(place, task, model, weights, train, writes=bool(export) or which != "none")
    teacher = copy.deepcopy(done.edit.model).eval().requires_grad_(False)
    task = replace(task, teacher=teacher, val_seen=task.val_seen or given)
    first = answers(done.edit.model, task, place.display, "base")
    rows = [row("base", None if given or train is None else store.described(train), done, first, first, task)]
    hits = [] if given else [{"stage": "base", "key": done.key, "hit": done.hit}]
    timed = {"base": teacher} if which != "none" else {}
    base_key, lineage, failure = done.key, "base", None
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
        if stage.kind == "finetune" and (failure := _below(rows[-1], floor)):
            break

    begun, final, file = time.perf_counter(), done.edit.model, None
    if place.build is not None:
        file = place.folder / "model.safetensors"
        provenance = {
            "stages": {name: store.described(stages[name]) for name in [line["name"] for line in rows[1:]]},
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
    exports: list[dict[str, Any]] = []
    failure = failure or _below(result, floor)
    try:
        for kind in () if failure else export:
            exports.append(place.write(final, place.folder / f"model{EXPORTS[kind]}", task))
        if timed and not failure:
            measured = place.latencies(timed | {"result": final}, [export["file"] for export in exports], task)
            for line in rows:
                line["latency"] = measured.get(line["name"])
    except UserError as error:  # hours of training may be behind this: what there is gets its report
        failure = str(error)
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
        "failure": failure,
        "store": hits,
    }


def _below(line: Mapping[str, Any], floor: float) -> str | None:
    """What to say where a row's network gives too few of the base's answers."""
    if line["agreement"] >= floor:
        return None
    return (
        f"after `{line['name']}` {100 * line['agreement']:.1f} % of val get the base's answer, and `floor` (={floor}) "
        "asks for more: ask less of the stages before it, train longer, or lower `floor`."
    )


def _base(
    place: Place,
    task: Task,
    model: nn.Module | None,
    weights: Path | str | None,
    train: Stage | None,
    writes: bool,
) -> tuple[Done, bool]:
    """The base model, and whether it came with weights of its own: built and loaded, or built and trained (stored)."""
    started = time.perf_counter()
    torch.manual_seed(task.seed)
    given = model is not None
    if model is None:
        assert place.build is not None
        model = named(place.build[0])(**place.build[1])
        assert model is not None
    if writes and (place.build is None or checkpoint.foreign(place.build)):  # ours are known to be fit for files
        exported(lower(copy.deepcopy(model).eval(), place.target), task.example)
    what = {"build": place.build, "code": store.code_of(named(place.build[0])) if place.build else None}
    if weights is not None:
        load_weights(model, weights, allow=store.home(place.build), input=task.input)
    require_fit(model)
    if off := off_the_map(model, task.example):
        raise ConfigError("\n".join(off))
    if weights is None and train is not None:
        key = store.key(store.key("", what, task), [store.described(train), store.files_of(train)], task)
        return place.outcome("base", train, model, task, key), False
    key = store.key(store.state_digest(model), what, task)
    done = replace(plain(model.eval(), time.perf_counter() - started), key=key).on(task.device)
    return done, given or weights is not None


def _publish(place: Place, content: dict[str, Any]) -> None:
    """Say how to load what was written, write the report, print the table."""
    content["checkpoint"] = None
    if place.build is not None:
        file = place.folder / "model.safetensors"
        remark = checkpoint.foreign(place.build)
        allow = f", allow={store.home(place.build)}" if remark else ""
        load = f'compress.load("{file}"{allow})'
        content["checkpoint"] = {"file": file.name, "bytes": file.stat().st_size, "load": load}
        if remark:
            content["checkpoint"]["remark"] = remark
    report.write(content, place.folder)
    report.show(content)
