"""What every benchmark needs: the command line run for real, and results kept with what they were measured on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from compress import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")


def data_root() -> Path:
    """The folder with CIFAR-10 and the published weights: COMPRESS_DATA, or ../shared/data beside the checkout."""
    root = Path(os.environ.get("COMPRESS_DATA") or ROOT.parent / "shared" / "data")
    if not root.is_dir():
        sys.exit(f"{root} is not a folder: set COMPRESS_DATA to the one with cifar-10-batches-py/ and weights/")
    return root


def cifar(model: str = "resnet20") -> list[str]:
    """Overrides for a published CIFAR-10 ResNet with its weights."""
    weights = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}[model]
    root = data_root()
    return ["data=cifar10", f"model={model}", f"data.root={root}", f"model.weights={root / 'weights' / weights}"]


def compress(folder: Path, *overrides: str, out: str = "out") -> tuple[dict[str, Any], float]:
    """Run `python -m compress` in `folder`, into `folder/out`; gives back the report and the seconds it all took."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "compress", f"out={folder / out}", *overrides]
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(Path(__file__).parent))))
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr, env=os.environ | {"PYTHONPATH": path})
    seconds = time.perf_counter() - started
    newest = max(folder.glob(f"{out}*/report.json"), key=lambda file: file.stat().st_mtime)
    return json.loads(newest.read_text(encoding="utf-8")), seconds


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
    }
    return chosen


def record(name: str, rows: list[dict[str, Any]], script: str | None = None, **context: Any) -> None:
    """Keep the rows of a benchmark in results/NAME.json, with machine, versions and the command that repeats it."""
    content = {
        "command": " ".join(["python", f"benchmarks/{script or name}.py", *sys.argv[1:]]),
        "hardware": machine.hardware(),
        "versions": machine.versions(),
        **context,
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1))
