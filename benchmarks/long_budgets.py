"""What a hundred epochs bring after pruning and low rank, where a GPU is at hand: `long_budgets.py [ROW ...]`.

`channels`: ResNet-56 by the recipe `channels`, 2.1 times fewer multiply-adds; `tucker`: ResNet-20 by the recipe
`tucker` with 72 % fewer. Both then learn from the labels and from the answers of a ResNet-20 three times as wide, which
is trained first. 1,000 of the training images are held out, everywhere.
What is computed is kept in `outputs/benchmarks/long_budgets`: run again, a row only measures the times anew, which is
to be done when nothing else runs. `ROW=FOLDER` takes the row from a run that ended in this folder, on another machine
say, and measures only its times.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, cifar, compress, data_root, figures, finished, newest, record, teacher

FOLDER = ROOT / "outputs" / "benchmarks" / "long_budgets"
DATA = ("data.val_images=1000", "data.batch_size=256")
TEACHER = ("model=resnet20", "model.width=48", "model.train.epochs=30", "model.train.lr=0.2")
LONG = ("stages.recover.epochs=100", "stages.recover.distill=0.7")
ROWS: dict[str, tuple[str, str, tuple[str, ...]]] = {  # name -> recipe, model, what differs from the recipe
    "channels": ("channels", "resnet56", (*LONG, "stages.recover.lr=0.15")),
    "tucker": ("tucker", "resnet20", (*LONG, "stages.recover.lr=0.1", "stages.factorize.macs=0.28")),
}


def run(name: str, ended: str) -> dict[str, Any]:
    recipe, model, settings = ROWS[name]
    seen: dict[str, Any] = {}
    if not ended:
        learned = teacher(FOLDER, *TEACHER, *DATA, "data=cifar10", f"data.root={data_root()}")
        what = (f"recipe={recipe}", *cifar(model), *DATA, *settings, f"+stages.recover.teacher={learned}")
        compress(FOLDER, *what, "measure=none", "export=[]", out=name)
        ended = str(newest(FOLDER, name))
        report = json.loads((learned.parent / "report.json").read_text(encoding="utf-8"))
        seen = {"teacher_top1": report["rows"][0]["accuracy"]["top1"]}
    report = finished(Path(ended), recipe, model, (*settings, "+stages.recover.teacher=base.safetensors"))
    row = {"name": name, "recipe": recipe, "model": model, "settings": [*DATA, *settings]}
    return row | seen | figures(report)


def main() -> None:
    file = RESULTS / "long_budgets.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    for argument in sys.argv[1:] or ROWS:
        name, _, ended = argument.partition("=")
        if name not in ROWS:
            sys.exit(f"{name} is not one of {', '.join(ROWS)}")
        known = {each["name"]: each for each in (*rows, run(name, ended))}
        rows = [known[each] for each in ROWS if each in known]
        record("long_budgets", rows, teacher=[*TEACHER, *DATA], data="CIFAR-10, 10,000 test images", seed=0)


if __name__ == "__main__":
    main()
