"""The loop: the base model, then stage by stage, measured after each; at the end the files and the report."""

from __future__ import annotations

import copy
import inspect
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import __version__, checkpoint, measure, progress, report, store
from compress.errors import ConfigError, UserError
from compress.lower import export_onnx, export_pt2
from compress.models.weights import load_weights
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight
from compress.stage import Edit, Stage, order_problems
from compress.task import Progress, Task, Work
from compress.train import divergence, logits

Build = tuple[str, dict[str, Any]]
ONNX_TARGETS = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Result:
    """What a run gives back: the compressed model, where its files are, and the report as plain JSON."""

    model: nn.Module
    folder: Path
    report: dict[str, Any]

    @property
    def checkpoint(self) -> Path | None:
        """The file for `compress.load`; None for a model without `build`."""
        path = self.folder / "model.safetensors"
        return path if path.exists() else None


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
    cache: Path | str | None = Path("outputs/cache"),
    recipe: str = "",
    command: str = "",
) -> Result:
    """Compress a model, stage by stage, and write what came out into the folder `out`.

    The base is what `build` makes ("pkg.factory", {arguments}) with `weights` loaded, or trained by `train` where there
    are none; or a `model` instance, which can be compressed and exported but not stored, resumed, or written as a
    checkpoint, since nobody could build it again. `measure` says which rows get a latency in the runtime `target`:
    "ends" (base and result), "all", or "none". `cache` is the store of finished stages; None turns it off.

    Raises:
        ConfigError: stages in an order that makes no sense, or no base.
        UserError: whatever a stage finds that it cannot do.
        TrainingError: a training that turned to NaN.
    """
    named = dict(stages) if isinstance(stages, Mapping) else {type(s).__name__.lower(): s for s in stages}
    if len(named) < len(stages):
        raise ConfigError("two stages of one class need names of their own: give `stages` as a mapping.")
    problems = order_problems(named)
    if problems or not named:
        raise ConfigError("\n".join(problems) or "`stages` must hold at least one stage.")
    if (build is None) == (model is None):
        raise ConfigError("exactly one of `build` and `model` must be given.")
    started = store.timed()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    display = progress.make()
    scratch = folder / "unfinished"
    try:
        job = _Job(
            task=task,
            build=build,
            folder=folder,
            scratch=scratch,
            cache=None if cache is None else Path(cache),
            target=target,
            measure=measure,
            display=display,
            started=started,
        )
        result = job.carry_out(named, model, weights, train, export, recipe, command)
    finally:
        display.close()
    shutil.rmtree(scratch, ignore_errors=True)
    return result


@dataclass(frozen=True)
class Answers:
    """What a model answers: which test images it gets right, and its logits on val."""

    correct: Tensor
    val: Tensor


@dataclass
class _Job:
    """One run. Its rows grow as stages end; everything else stays as it was given."""

    task: Task
    build: Build | None
    folder: Path
    scratch: Path
    cache: Path | None
    target: str
    measure: str
    display: Progress
    started: float

    def carry_out(
        self,
        stages: Mapping[str, Stage],
        model: nn.Module | None,
        weights: Path | str | None,
        train: Stage | None,
        export: Sequence[str],
        recipe: str,
        command: str,
    ) -> Result:
        """Base, stages, files, report."""
        self.rows: list[dict[str, Any]] = []
        self.hits: list[dict[str, Any]] = []
        base, key = self._base(model, weights, train)
        base_key = key
        teacher = copy.deepcopy(base).to(self.task.device).eval()
        self.task = replace(
            self.task, teacher=teacher.requires_grad_(False), val_seen=self.task.val_seen or train is None
        )
        measured = {"base": base} if self.measure != "none" else {}
        self.first = self._answers(base, "base")
        base_row = self._row("base", None, base, self.first, self.base_edit, self.base_seconds, self.base_hit)
        if self.build is not None:
            base_row["bytes"] = self._save(base, "base.safetensors", {"weights": base_key}, {}, form="training")
            base_row["file"] = "base.safetensors"
        self.rows.append(base_row)

        current = base
        for name, stage in stages.items():
            what = store.described(stage)
            key = store.key(key, what, self.task)
            edit, seconds, hit = self._stage(name, stage, current, key)
            current = edit.model
            answers = self._answers(current, name)
            self.rows.append(self._row(name, stage, current, answers, edit, seconds, hit))
            if self.measure == "all":
                measured[name] = copy.deepcopy(current)

        final, row = self._finish(current, stages, base_key, recipe)
        self.rows.append(row)
        exports = self._export(final, export)
        if self.measure != "none":
            self._latencies(measured | {"result": final})
        content = self._report(stages, exports, weights, recipe, command)
        report.write(content, self.folder)
        report.show(content)
        return Result(final, self.folder, content)

    def _base(self, model: nn.Module | None, weights: Path | str | None, train: Stage | None) -> tuple[nn.Module, str]:
        """The base model and its key: built and loaded, or built and trained (once, then stored)."""
        started = store.timed()
        self.base_edit, self.base_hit = Edit(nn.Identity()), False
        torch.manual_seed(self.task.seed)
        if model is None:
            assert self.build is not None
            model = _factory(self.build)(**self.build[1])
        assert model is not None
        what = {"build": self.build, "source": _source(self.build)}
        if weights is not None:
            load_weights(model, Path(weights))
            key = store.key(store.file_digest(Path(weights)), what, self.task)
        else:
            key = store.key("", what, self.task)
            if train is not None:
                key = store.key(key, store.described(train), self.task)
                edit, seconds, self.base_hit = self._stage("base", train, model, key)
                self.base_edit, model = edit, edit.model
                started = store.timed() - seconds
        self.base_seconds = store.timed() - started
        return model.to(self.task.device).eval(), key

    def _stage(self, name: str, stage: Stage, model: nn.Module, key: str) -> tuple[Edit, float, bool]:
        """The outcome of a stage: from the store where it is there, else by doing it."""
        with store.entry(self.cache, self.scratch, key, self.build) as entry:
            found = entry.load() if self.cache is not None else None
            self.hits.append({"stage": name, "key": key, "hit": found is not None})
            if found is not None:
                edit, seconds = found
            else:
                started = store.timed()
                torch.manual_seed(self.task.seed)
                work = Work(entry.work, key, self.display, self.target)
                try:
                    edit = stage(model.to(self.task.device), self.task, work)
                except UserError as error:
                    raise type(error)(f"`stages.{name}`: {error}") from error
                seconds = store.timed() - started
                edit = entry.keep(edit, seconds, self.task.input)
            return replace(edit, model=edit.model.to(self.task.device)), seconds, found is not None

    def _answers(self, model: nn.Module, name: str) -> Answers:
        self.display.start(f"evaluate {name}", 2)
        outputs, labels = logits(model, self.task.test, self.task.device)
        self.display.step("test")
        val, _ = logits(model, self.task.val, self.task.device)
        self.display.step("val")
        self.display.end()
        return Answers(outputs.argmax(1) == labels, val)

    def _row(
        self,
        name: str,
        stage: Stage | None,
        model: nn.Module,
        answers: Answers,
        edit: Edit,
        seconds: float,
        hit: bool,
    ) -> dict[str, Any]:
        """One line of the table: what the model is now, and how it answers beside the base."""
        profile = measure.profile(model, self.task.example.to(self.task.device))
        weight_bits, activation_bits = _bits(model)
        correct, total = int(answers.correct.sum()), len(answers.correct)
        notes = dict(edit.notes)
        history = notes.pop("history", [])
        is_base = name == "base"
        same = answers.val.argmax(1) == self.first.val.argmax(1)
        return {
            "name": name,
            "stage": type(stage).__name__ if stage is not None else None,
            "settings": {k: v for k, v in store.described(stage).items() if k != "stage"} if stage is not None else {},
            "accuracy": {"correct": correct, "total": total, **measure.accuracy(correct, total)},
            "paired": None if is_base else measure.paired(self.first.correct, answers.correct),
            "agreement": None if is_base else float(same.float().mean()),
            "divergence": None if is_base else divergence(answers.val, self.first.val),
            "params": profile.params,
            "nonzero": profile.nonzero,
            "macs": profile.macs,
            "uncounted": list(profile.uncounted),
            "activation_bytes": profile.activation_bytes,
            "bytes": None,
            "file": None,
            "latency": None,
            "energy_uj": measure.energy(profile, weight_bits, activation_bits).total_uj,
            "seconds": seconds,
            "cached": hit,
            "sites": [asdict(site) for site in edit.sites],
            "notes": notes,
            "history": history,
        }

    def _finish(
        self, model: nn.Module, stages: Mapping[str, Stage], base_key: str, recipe: str
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Write the checkpoint; the result is what loads from it, and is what is measured."""
        started = store.timed()
        file = None
        if self.build is not None:
            provenance = {
                "recipe": recipe,
                "stages": {name: store.described(stage) for name, stage in stages.items()},
                "seed": self.task.seed,
                "data": self.task.fingerprint,
                "base": base_key,
                "versions": {"compress": __version__, "torch": torch.__version__},
            }
            last = self.rows[-1]
            results = {k: last["accuracy"][k] for k in ("correct", "total")} | {k: last[k] for k in ("params", "macs")}
            size = self._save(model, "model.safetensors", provenance, results)
            allow = [self.build[0].rpartition(".")[0]]
            model = checkpoint.load(self.folder / "model.safetensors", allow=allow).to(self.task.device)
            file = "model.safetensors"
        answers = self._answers(model, "result")
        row = self._row("result", None, model, answers, Edit(model), store.timed() - started, False)
        if file is not None:
            row |= {"bytes": size, "file": file}
        return model, row

    def _save(
        self, model: nn.Module, name: str, provenance: dict[str, Any], results: dict[str, Any], form: str = "packed"
    ) -> int:
        assert self.build is not None
        path = self.folder / name
        return checkpoint.save(
            model,
            path,
            build=self.build,
            input=self.task.input,
            provenance=provenance,
            results=results,
            form=form,
        )

    def _export(self, model: nn.Module, export: Sequence[str]) -> list[dict[str, Any]]:
        return [self._write(model, self.folder / f"model.{kind}") for kind in export]

    def _write(self, model: nn.Module, path: Path) -> dict[str, Any]:
        self.display.start(f"write {path.name}", 1)
        example = self.task.example.cpu()
        model = copy.deepcopy(model).cpu().eval()
        if path.suffix == ".onnx":
            written = export_onnx(model, example, path, input=self.task.input, target=self.target)
        else:
            written = export_pt2(model, example, path)
        self.display.step()
        self.display.end()
        return written | {"file": path.name}

    def _latencies(self, models: Mapping[str, nn.Module]) -> None:
        """Measure the models against the base, in the target runtime, alternating; fill the rows in."""
        suffix = "onnx" if self.target in ONNX_TARGETS else "pt2"
        with tempfile.TemporaryDirectory(prefix="compress-") as temporary:
            paths = {}
            for name, model in models.items():
                ready = self.folder / f"model.{suffix}"
                if name == "result" and ready.exists():
                    paths[name] = ready
                    continue
                paths[name] = Path(temporary) / f"{name}.{suffix}"
                self._write(model, paths[name])
            self.display.start("latency", 1)
            measured = measure.latency(paths, self.task.example, target=self.target)
            self.display.step()
            self.display.end()
        for row in self.rows:
            if row["name"] in measured:
                row["latency"] = asdict(measured[row["name"]])

    def _report(
        self,
        stages: Mapping[str, Stage],
        exports: list[dict[str, Any]],
        weights: Path | str | None,
        recipe: str,
        command: str,
    ) -> dict[str, Any]:
        file = self.folder / "model.safetensors"
        written = None
        if self.build is not None:
            sentence = checkpoint.foreign(self.build)
            written = {"file": file.name, "bytes": file.stat().st_size, "load": f'compress.load("{file}")'}
            written |= {"remark": sentence} if sentence else {}
        factory, arguments = self.build or (None, {})
        return {
            "format": report.FORMAT,
            "recipe": recipe,
            "command": command,
            "seed": self.task.seed,
            "data": {
                "fingerprint": self.task.fingerprint,
                "sizes": {name: getattr(self.task, name).images for name in ("train", "val", "test")},
                "input": dict(self.task.input),
            },
            "model": {"factory": factory, "arguments": arguments, "weights": str(weights) if weights else None},
            "device": str(self.task.device),
            "precision": self.task.precision,
            "target": self.target,
            "val_seen": self.task.val_seen,
            "versions": _versions(),
            "hardware": _hardware(),
            "seconds": store.timed() - self.started,
            "rows": self.rows,
            "exports": exports,
            "checkpoint": written,
            "store": self.hits,
        }


def _factory(build: Build) -> Any:
    module, _, name = build[0].rpartition(".")
    return getattr(import_module(module), name)


def _source(build: Build | None) -> str | None:
    """A digest of the code that builds the base, so that a changed model never finds old outcomes."""
    if build is None:
        return None
    try:
        return store.file_digest(Path(inspect.getfile(_factory(build))))
    except (TypeError, OSError):
        return None


def _bits(model: nn.Module) -> tuple[int, int]:
    """Bits of the weights and of the activations: the widest of each; 32 where nothing is quantized."""
    weights = [m.bits for m in model.modules() if isinstance(m, FakeQuantizeWeight)]
    activations = [m.bits for m in model.modules() if isinstance(m, FakeQuantize)]
    return max(weights, default=32), max(activations, default=32)


def _versions() -> dict[str, str]:
    found = {"compress": __version__, "python": platform.python_version()}
    for package in ("torch", "torchao", "onnx", "onnxruntime", "openvino"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "processor": processor,
        "cores": measure.available_threads(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu,
        "system": platform.system(),
    }
