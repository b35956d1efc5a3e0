"""Deep Compression of AlexNet's form for CIFAR, and of what `alexnet_fire` makes of it: `alexnet_deep.py [ROW ...]`.

The base is that of `alexnet_fire.py 0`, and `fire` goes on from its small network of seed 0: both are found in the
store, or made. Rows are stored as they come; all is kept in `outputs/benchmarks/alexnet_fire`, where a run that was
killed goes on.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from alexnet_fire import FOLDER, SMALL_TEACHER, TAUGHT
from common import RESULTS, cifar, compress, data_root, figures, record, teacher

DEEP = (
    "recipe=deep_compression",
    "stages.prune.amount=0.965",
    "stages.prune.epochs=4",
    "stages.recover.epochs=6",
    "stages.recover.distill=0.7",
    "stages.cluster.bits=5",
    "stages.polish.epochs=3",
    "stages.polish.distill=0.7",
)
PRUNE = "+stages.prune={_target_:compress.stages.Prune,amount:0.6,schedule:cubic,epochs:6}"
THIN = "+stages.thin={_target_:compress.stages.FineTune,epochs:10,lr:0.02,distill:0.5}"
CLUSTER = "+stages.cluster={_target_:compress.stages.Cluster,bits:4}"
POLISH = "+stages.polish={_target_:compress.stages.FineTune,epochs:4,lr:2e-3,distill:0.5}"
POLISH_TEACHER = SMALL_TEACHER.replace("recover", "polish")
ROWS = {
    "deep": DEEP,
    "fire": ("recipe=alexnet_fire", PRUNE, THIN, CLUSTER, POLISH),
}


def main() -> None:
    teacher(FOLDER, *cifar("resnet56"))
    file = RESULTS / "alexnet_deep.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    known = {row["name"] for row in rows}
    for name in sys.argv[1:] or [name for name in ROWS if name not in known]:
        if name not in ROWS:
            sys.exit(f"{name} is not one of {', '.join(ROWS)}")
        taught = (*TAUGHT, SMALL_TEACHER, *(() if name == "fire" else (POLISH_TEACHER,)))
        settings = (*ROWS[name], *taught, "model=alexnet", "data=cifar10", f"data.root={data_root()}", "measure=none")
        report, seconds = compress(FOLDER, *settings, out=name)
        row = {"name": name, "settings": [*ROWS[name]], "wall_seconds": round(seconds), **figures(report)}
        rows = [*(each for each in rows if each["name"] != name), row]
        context = {"model": "alexnet", "teacher": "resnet56", "data": "CIFAR-10, 10,000 test images", "seed": 0}
        record("alexnet_deep", rows, **context)


if __name__ == "__main__":
    main()
