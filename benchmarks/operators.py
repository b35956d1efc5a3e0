"""Every operator on ResNet-20 / CIFAR-10, started from the trained weights and from noise: `operators.py [NAME ...]`.

Accuracy right after substitution, after 1 and after 5 epochs of fine-tuning (the same settings for all), params, MACs,
latency in onnxruntime and in torch. Rows are stored as they come; without names, all that are not stored yet are run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from common import RESULTS, cifar, compress, record
from torch import nn

from compress.stage import Edit
from compress.task import Task, Work

# Three budgets: a ninth of the 3x3 weights and a little, a third, four ninths.
OPERATORS = {
    "shift-1": "compress.stages.Shift,taps:1",
    "shift-3": "compress.stages.Shift,taps:3",
    "shift-4": "compress.stages.Shift,taps:4",
    "separable-1": "compress.stages.Separable,multiplier:1",
    "separable-3": "compress.stages.Separable,multiplier:3",
}
EPOCHS = (1, 5)


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


def measured(operator: str, start: str, folder: Path) -> dict[str, Any]:
    noise = ["+stages.noise={_target_:operators.FromNoise}"] if start == "noise" else []
    substituted = [f"+stages.substitute={{_target_:{OPERATORS[operator]},exclude:[conv1]}}", *noise, *cifar()]
    row: dict[str, Any] = {"operator": operator, "setting": OPERATORS[operator].rpartition(",")[2], "start": start}
    for epochs in EPOCHS:
        recover = f"+stages.recover={{_target_:compress.stages.FineTune,epochs:{epochs},distill:0.5}}"
        last = epochs == EPOCHS[-1] and start == "trained"
        report, _ = compress(folder, *substituted, recover, f"measure={'ends' if last else 'none'}")
        rows = {line["name"]: line for line in report["rows"]}
        row |= {f"top1_{epochs}": rows["recover"]["accuracy"]["top1"]}
        row |= {name: rows["result"][name] for name in ("params", "macs")}
        row["top1_0"] = rows["noise" if noise else "substitute"]["accuracy"]["top1"]
        if last:
            report_torch, _ = compress(folder, *substituted, recover, "target=torch")
            row["latency"] = {
                target: {key: content["rows"][-1]["latency"][key] for key in ("ratio", "ratio_low", "ratio_high")}
                for target, content in (("onnxruntime", report), ("torch", report_torch))
            }
    return row


def main() -> None:
    file = RESULTS / "operators.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    wanted = sys.argv[1:] or list(OPERATORS)
    for start in ("trained", "noise"):
        for operator in wanted:
            known = any((row["operator"], row["start"]) == (operator, start) for row in rows)
            if operator not in OPERATORS:
                sys.exit(f"{operator!r} is not one of {', '.join(OPERATORS)}")
            if known and not sys.argv[1:]:
                continue
            with tempfile.TemporaryDirectory() as folder:
                row = measured(operator, start, Path(folder))
            rows = [r for r in rows if (r["operator"], r["start"]) != (operator, start)] + [row]
            record("operators", rows, model="resnet20", data="CIFAR-10, 10,000 test images", seed=0)


if __name__ == "__main__":
    main()
