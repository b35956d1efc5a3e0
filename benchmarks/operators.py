"""Every operator on ResNet-20 / CIFAR-10, started from the trained weights and from noise: `operators.py [ROW ...]`.

Accuracy right after substitution, after 1 and after 5 epochs of fine-tuning (the same settings for all). A ROW is
OPERATOR (from the trained weights) or OPERATOR/noise; without any, all that are not stored yet are run. `operators.py
latency` times all operators and the base in one go for each runtime: do it when nothing else runs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from common import RESULTS, cifar, compress, here, record
from torch import nn

from compress import load
from compress.lower import export_onnx, export_pt2
from compress.measure import latency
from compress.stage import Edit
from compress.task import Task, Work

OPERATORS = {
    "shift-3": "Shift,taps:3",
    "shift-4": "Shift,taps:4",
    "separable-1": "Separable,multiplier:1",
    "separable-3": "Separable,multiplier:3",
    "shift-1": "Shift,taps:1",
    "grouped-3": "Shift,taps:3,places:grouped",
    "random-3": "Shift,taps:3,places:random",
    "active-3": "Shift,taps:3,learn:true,quantize:false",
    "fire": "Fire,squeeze:0.5,pct3:0.5",
    "fire-3x3": "Fire,squeeze:0.3,pct3:1",
    "invert-1": "Invert,expansion:1",
    "group-2": "Group,groups:2",
    "group-4": "Group,groups:4",
}
EPOCHS = (1, 5)
CONTEXT: dict[str, Any] = {"model": "resnet20", "data": "CIFAR-10, 10,000 test images", "seed": 0}


@dataclass(frozen=True)
class FromNoise:
    """A stage that forgets what the substituted layers started from: every other layer stays as it is trained."""

    kind: ClassVar[str] = "finetune"

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        for name, layer in model.named_modules():
            inside = name.startswith("layer") and name.count(".") > 2
            if inside and isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
        return Edit(model)


def substitution(operator: str, more: str = "") -> str:
    return f"+stages.substitute={{_target_:compress.stages.{OPERATORS[operator]},exclude:[conv1]{more}}}"


def trained(operator: str, start: str, folder: Path) -> dict[str, Any]:
    """Accuracies of one row; the substitution is done once, and found by the second run."""
    noise = ["+stages.noise={_target_:operators.FromNoise}"] if start == "noise" else []
    row: dict[str, Any] = {"operator": operator, "setting": OPERATORS[operator], "start": start, **here()}
    for epochs in EPOCHS:
        recover = f"+stages.recover={{_target_:compress.stages.FineTune,epochs:{epochs},distill:0.5}}"
        report, _ = compress(folder, substitution(operator), *noise, *cifar(), recover, "measure=none")
        rows = {line["name"]: line for line in report["rows"]}
        after = rows["recover"]["accuracy"]
        row |= {f"top1_{epochs}": after["top1"], f"interval_{epochs}": [after["low"], after["high"]]}
        row |= {name: rows["result"][name] for name in ("params", "macs")}
        row["top1_0"] = rows["noise" if noise else "substitute"]["accuracy"]["top1"]
    return row


def timed() -> None:
    """Time depends on no weight's value, so the networks are substituted on a few images and not trained."""
    rows: list[dict[str, Any]] = [{"operator": name} for name in ("base", *OPERATORS)]
    example = torch.zeros(2, 3, 32, 32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for operator in OPERATORS:
            settings = (*cifar(), "measure=none", "export=[onnx,pt2]")
            compress(folder, substitution(operator, ",images:64"), *settings, out=operator)
        base = load(folder / next(iter(OPERATORS)) / "base.safetensors")
        (folder / "base").mkdir()
        export_onnx(base, example, folder / "base" / "model.onnx", input={})
        export_pt2(base, example, folder / "base" / "model.pt2")
        for target, suffix in (("onnxruntime", ".onnx"), ("torch", ".pt2")):
            paths = {row["operator"]: folder / row["operator"] / f"model{suffix}" for row in rows}
            measured = latency(paths, example, target=target)
            for row in rows:
                row[target] = asdict(measured[row["operator"]])
    record("operators-latency", rows, "operators", ["latency"], **CONTEXT)


def main() -> None:
    if sys.argv[1:] == ["latency"]:
        return timed()
    file = RESULTS / "operators.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    known = {(row["operator"], row["start"]) for row in rows}
    every = [(operator, start) for start in ("trained", "noise") for operator in OPERATORS]
    named = [(name.partition("/")[0], name.partition("/")[2] or "trained") for name in sys.argv[1:]]
    for operator, start in named or [row for row in every if row not in known]:
        if (operator, start) not in every:
            sys.exit(f"{operator}/{start} is not one of {', '.join('/'.join(row) for row in every)}")
        with tempfile.TemporaryDirectory() as folder:
            row = trained(operator, start, Path(folder))
        rows = [r for r in rows if (r["operator"], r["start"]) != (operator, start)] + [row]
        record("operators", rows, **CONTEXT)


if __name__ == "__main__":
    main()
