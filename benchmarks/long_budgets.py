"""What long fine-tuning brings after pruning and low rank, where a GPU is at hand: `long_budgets.py [ROW ...]`.

`channels`: ResNet-56 by the recipe `channels`, 2.1 times fewer multiply-adds; `tucker`: ResNet-20 by the recipe
`tucker` with 72 % fewer. Both then learn from the labels and from the answers of a wider ResNet-20, which is trained
first. What that ends with is trained once more (`AGAIN`), from a lower rate, without mixup, and taught by the first
outcome of `channels`. 1,000 of the training images are held out, everywhere.
What is computed is kept in `outputs/benchmarks/long_budgets`, a folder for each row: `teacher`, `out`, `again`. Run
again, a row only measures the times anew, which is to be done when nothing else runs. `ROW=FOLDER` takes a row's folder
from another place, another machine say, and computes here what it lacks; the folder `channels` has to lie beside it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from common import ROOT, cifar, compress, data_root, ended, figures, newest, rows_by_name, teacher, timed
from torch import nn

from compress import load
from compress.stage import Edit
from compress.task import Task, Work

FOLDER = ROOT / "outputs" / "benchmarks" / "long_budgets"
DATA = ("data.val_images=1000", "data.batch_size=256")
WIDE = ("model=resnet20", "model.width=64", "model.train.epochs=60", "model.train.lr=0.2", "model.train.compile=true")
NARROW = ("model=resnet20", "model.width=48", "model.train.epochs=30", "model.train.lr=0.2")
CHANNELS = (
    "stages.recover.epochs=120",
    "stages.recover.lr=0.15",
    "stages.recover.mixup=0.5",
    "stages.recover.distill=0.9",
    "stages.recover.compile=true",
)
TUCKER = (
    "stages.recover.epochs=100",
    "stages.recover.distill=0.7",
    "stages.recover.lr=0.1",
    "stages.factorize.macs=0.28",
)
# name -> recipe, model, who is learned from, what differs from the recipe
ROWS: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "channels": ("channels", "resnet56", WIDE, CHANNELS),
    "tucker": ("tucker", "resnet20", NARROW, TUCKER),
}
AGAIN: dict[str, dict[str, float]] = {
    "channels": {"epochs": 20, "lr": 0.03, "distill": 0.5},
    "tucker": {"epochs": 32, "lr": 0.05, "weight_decay": 1e-4, "distill": 0.5},
}


@dataclass(frozen=True)
class Restore:
    """The network of a checkpoint takes the model's place."""

    checkpoint: str

    kind: ClassVar[str] = "substitute"
    files: ClassVar[tuple[str, ...]] = ("checkpoint",)

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        return Edit(load(self.checkpoint).to(task.device))


def run(name: str, elsewhere: str) -> dict[str, Any]:
    recipe, model, taught_by, settings = ROWS[name]
    folder = Path(elsewhere).resolve() if elsewhere else FOLDER / name
    if not ran(folder, "out"):
        learned = teacher(folder, *taught_by, *DATA, "data=cifar10", f"data.root={data_root()}")
        what = (f"recipe={recipe}", *cifar(model), *DATA, *settings, f"+stages.recover.teacher={learned}")
        compress(folder, *what, "measure=none", "export=[]")
    first = ended(newest(folder, "out"), recipe, model, (*settings, "+stages.recover.teacher=base.safetensors"))
    if not ran(folder, "again"):
        compress(folder, *cifar(model), *DATA, *further(name, folder), "measure=none", "export=[]", out="again")
    last = newest(folder, "again")
    report = json.loads((last / "report.json").read_text(encoding="utf-8"))
    if problem := why_another(report, first, AGAIN[name]):
        sys.exit(f"{last} holds another run: {problem}")
    taught = json.loads((folder / "teacher" / "report.json").read_text(encoding="utf-8"))
    row = {"name": name, "recipe": recipe, "model": model, "teacher": [*taught_by, *DATA]}
    row |= {"settings": [*DATA, *settings], "teacher_top1": taught["rows"][0]["accuracy"]["top1"], "again": AGAIN[name]}
    row |= {"threads": report["hardware"]["torch_threads"] if report["device"] == "cpu" else None}
    brought = figures(first)
    row |= {"first": {key: brought[key] for key in ("top1", "steps", "seconds", "on", "versions")}}
    return row | figures(timed(last, report))


def ran(folder: Path, out: str) -> bool:
    return any(folder.glob(f"{out}*/report.json"))


def further(name: str, folder: Path) -> tuple[str, str]:
    """The stages that train once more what the first run has ended with."""
    learned = folder.parent / "channels"
    if not ran(learned, "out"):
        sys.exit(f"{learned} is not there, or has not ended: make the row `channels` first, its outcome is the teacher")
    before, learned = (newest(each, "out") / "model.safetensors" for each in (folder, learned))
    settings = ",".join(f"{key}:{value}" for key, value in AGAIN[name].items())
    return (
        f"+stages.restore={{_target_:long_budgets.Restore,checkpoint:{before}}}",
        f"+stages.again={{_target_:compress.stages.FineTune,{settings},teacher:{learned}}}",
    )


def why_another(report: dict[str, Any], first: dict[str, Any], settings: dict[str, float]) -> str:
    """Why a run is not the one that goes on from the `first` with these settings; "" where it is."""
    if report["failure"]:
        return f"one that failed ({report['failure']})"
    _, restored, again, _ = report["rows"]
    differ = {key: again["settings"][key] for key, value in settings.items() if again["settings"][key] != value}
    differ |= {key: report[key] for key in ("seed", "data") if report[key] != first[key]}
    differ |= {"model": report["model"]} if report["model"]["factory"] != first["model"]["factory"] else {}
    differ |= {key: restored[key] for key in ("params", "nonzero", "macs") if restored[key] != first["rows"][-1][key]}
    return f"it has {differ}" if differ else ""


if __name__ == "__main__":
    rows_by_name("long_budgets", ROWS, run, data="CIFAR-10, 10,000 test images", seed=0)
