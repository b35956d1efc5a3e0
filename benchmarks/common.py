"""What every benchmark needs: the command line run for real, and results kept with what they were measured on."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from compress import machine
from compress.convert import convert
from compress.measure import latency

ROOT = Path(__file__).resolve().parents[1]
MODELS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}
RESULTS = Path(os.environ.get("COMPRESS_RESULTS") or Path(__file__).with_name("results"))


def data_root() -> Path:
    """The folder with CIFAR-10 and the published weights: COMPRESS_DATA, or ../shared/data beside the checkout."""
    root = Path(os.environ.get("COMPRESS_DATA") or ROOT.parent / "shared" / "data")
    if not root.is_dir():
        sys.exit(f"{root} is not a folder: set COMPRESS_DATA to the one with cifar-10-batches-py/ and weights/")
    return root


def cifar(model: str = "resnet20") -> list[str]:
    """Overrides for a published CIFAR-10 ResNet with its weights."""
    root = data_root()
    return ["data=cifar10", f"model={model}", f"data.root={root}", f"model.weights={root / 'weights' / MODELS[model]}"]


def compress(folder: Path, *overrides: str, out: str = "out") -> tuple[dict[str, Any], float]:
    """Run `python -m compress` in `folder`, into `folder/out`; gives back the report and the seconds it all took."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "compress", f"out={folder / out}", *overrides]
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(Path(__file__).parent))))
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr, env=os.environ | {"PYTHONPATH": path})
    seconds = time.perf_counter() - started
    return json.loads((newest(folder, out) / "report.json").read_text(encoding="utf-8")), seconds


def newest(folder: Path, out: str) -> Path:
    """Where the last run into `folder/out` that ended put its files: a folder that is in use gets a number."""
    return max(folder.glob(f"{out}*/report.json"), key=lambda file: file.stat().st_mtime).parent


def teacher(folder: Path, *overrides: str) -> Path:
    """A checkpoint to learn from, made once in `folder`: the base of a run that does next to nothing with it."""
    made = folder / "teacher" / "base.safetensors"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(made.parent, ignore_errors=True)  # of a run that was killed; what it computed is in the store
        fold = "+stages.fold={_target_:compress.stages.FoldBatchNorm}"
        compress(folder, fold, *overrides, "measure=none", "export=[]", out="teacher")
    return made


def _what(recipe: str, model: str, seed: int, arguments: Sequence[str]) -> dict[str, Any]:
    """What a run is known by; of a teacher the name of its file, wherever that lies."""
    stages = sorted(each for each in arguments if each.lstrip("+~").startswith("stages."))
    stages = [re.sub(r"(teacher=).*/", r"\1", each) for each in stages]
    return {"recipe": recipe, "model": model, "seed": seed, "stages": stages}


def ended(folder: Path, recipe: str, model: str, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The report of a run that ended in `folder`; it must be that of `recipe`, `model` and `settings`."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    seed = int(dict(each.split("=", 1) for each in settings if "=" in each).get("seed", 0))
    wanted = _what(recipe, model, seed, settings)
    factory = report["model"]["factory"].rpartition(".")[2]
    ran = _what(report["recipe"], factory, report["seed"], shlex.split(report["command"] or ""))
    differ = [f"{key} {ran[key]}, where the row has {wanted[key]}" for key in wanted if ran[key] != wanted[key]]
    if differ:
        sys.exit(f"{folder} holds another run: {'; '.join(differ)}")
    return report


def timed(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report of a run, the latencies of its two checkpoints in `folder` measured here. When nothing else runs."""
    with tempfile.TemporaryDirectory() as name:
        paths = {}
        for row, file in ((report["rows"][0], "base"), (report["rows"][-1], "model")):
            convert(folder / f"{file}.safetensors", ["onnx"], name, forms="measured")
            paths[row["name"]] = Path(name) / f"{file}.onnx"
        wanted = report["data"]["input"]
        example = torch.zeros(1, len(wanted["mean"]), *wanted["size"])
        measured = latency(paths, example, target="onnxruntime")
    for row in report["rows"]:
        row["latency"] = asdict(measured[row["name"]]) if row["name"] in measured else None
    return report


def finished(folder: Path, recipe: str, model: str, settings: Sequence[str] = ()) -> dict[str, Any]:
    """The report of a run that ended elsewhere, on a machine with a GPU say, its latencies measured here."""
    return timed(folder, ended(folder, recipe, model, settings))


def where(hardware: dict[str, Any]) -> str:
    """A machine in a few words."""
    return hardware["gpu"] or f"{hardware['processor']}, {hardware['cores']} cores"


def here() -> dict[str, Any]:
    """What a row says of where it was computed, where that is this machine."""
    return {"on": where(machine.hardware()), "versions": machine.versions()}


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of a run that tables show: base and result side by side."""
    base, result = report["rows"][0], report["rows"][-1]
    chosen = {
        "base_top1": base["accuracy"]["top1"],
        "top1": result["accuracy"]["top1"],
        "low": result["accuracy"]["low"],
        "high": result["accuracy"]["high"],
        "steps": {row["name"]: row["accuracy"]["top1"] for row in report["rows"]},
        "paired": result["paired"],
        "base_bytes": base["bytes"],
        "bytes": result["bytes"],
        "base_params": base["params"],
        "params": result["params"],
        "base_macs": base["macs"],
        "macs": result["macs"],
        "latency": result["latency"],
        "base_latency": base["latency"],
        "parity": {export["file"]: export["parity"] for export in report["exports"]},
        "seconds": {row["name"]: round(row["seconds"], 1) for row in report["rows"]},
        "on": where(report["hardware"] | ({"gpu": None} if report["device"] == "cpu" else {})),
        "versions": report["versions"],
    }
    return chosen


def record(
    name: str, rows: list[dict[str, Any]], script: str | None = None, arguments: Sequence[str] = (), **context: Any
) -> None:
    """Keep the rows of a benchmark in results/NAME.json, with this machine, its versions and the command.

    The command is the one that makes all rows from nothing, whichever were asked for this time. `script` is the file's
    where it is not NAME, and `arguments` are those without which it would make other rows.
    """
    content = {
        "command": shlex.join(["python", f"benchmarks/{script or name}.py", *arguments]),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        **context,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))


def rows_by_name(name: str, known: Collection[str], run: Callable[[str, str], dict[str, Any]], **context: Any) -> None:
    """Make the rows that the command line asks for, or all `known`, by `run(ROW, FOLDER)`, and keep the others.

    A row is asked for as ROW, or as ROW=FOLDER where its run has ended in a folder; else `run` gets "" for it.
    """
    file = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    for argument in sys.argv[1:] or known:
        row, _, ended = argument.partition("=")
        if row not in known:
            sys.exit(f"{row} is not one of {', '.join(known)}")
        made = {each["name"]: each for each in (*rows, run(row, ended))}
        rows = [made[each] for each in known if each in made]
        record(name, rows, **context)
