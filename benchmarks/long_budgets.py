"""What long fine-tuning brings after pruning and low rank, where a GPU is at hand: `long_budgets.py [ROW ...]`.

`channels`: ResNet-56 by the recipe `channels`, 2.1 times fewer multiply-adds; `tucker`: ResNet-20 by the recipe
`tucker` with 72 % fewer. Both then learn from the labels and from the answers of a wider ResNet-20, which is trained
first. 1,000 of the training images are held out, everywhere.
What is computed is kept in `outputs/benchmarks/long_budgets`: run again, a row only measures the times anew, which is
to be done when nothing else runs. `ROW=FOLDER` takes the row from a run that ended in this folder, on another machine
say, and measures only its times; the folder `teacher` beside it says what was learned from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import ROOT, cifar, compress, data_root, figures, finished, newest, rows_by_name, teacher

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


def run(name: str, ended: str) -> dict[str, Any]:
    recipe, model, taught_by, settings = ROWS[name]
    folder = FOLDER / name
    if not ended:
        learned = teacher(folder, *taught_by, *DATA, "data=cifar10", f"data.root={data_root()}")
        what = (f"recipe={recipe}", *cifar(model), *DATA, *settings, f"+stages.recover.teacher={learned}")
        compress(folder, *what, "measure=none", "export=[]")
        ended = str(newest(folder, "out"))
    taught = json.loads((Path(ended).parent / "teacher" / "report.json").read_text(encoding="utf-8"))
    report = finished(Path(ended), recipe, model, (*settings, "+stages.recover.teacher=base.safetensors"))
    row = {"name": name, "recipe": recipe, "model": model, "teacher": [*taught_by, *DATA]}
    row |= {"settings": [*DATA, *settings], "teacher_top1": taught["rows"][0]["accuracy"]["top1"]}
    return row | figures(report)


if __name__ == "__main__":
    rows_by_name("long_budgets", ROWS, run, data="CIFAR-10, 10,000 test images", seed=0)
