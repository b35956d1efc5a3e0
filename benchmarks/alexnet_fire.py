"""SqueezeNet's claim on CIFAR-10: AlexNet's accuracy with fifty times fewer parameters: `alexnet_fire.py [SEED ...]`.

The base, AlexNet's form for CIFAR (35.9 M parameters), is trained from nothing with seed 0, on the labels and on the
answers of the published ResNet-56; the recipe `alexnet_fire` then makes the small network with each seed (0, 1, 2) and
the same teacher.
Rows are stored as they come. All is kept in `outputs/benchmarks/alexnet_fire`, where a run that was killed goes on.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from common import RESULTS, ROOT, cifar, compress, data_root, figures, record, teacher

FOLDER = ROOT / "outputs" / "benchmarks" / "alexnet_fire"
SEEDS = (0, 1, 2)
TEACHER = FOLDER / "teacher" / "base.safetensors"
BASE = ("model.train.epochs=40", "model.train.lr=0.05", "+model.train.distill=0.7")
TAUGHT = (*BASE, f"+model.train.teacher={TEACHER}")
SMALL_TEACHER = f"+stages.recover.teacher={TEACHER}"


def main() -> None:
    teacher(FOLDER, *cifar("resnet56"))
    file = RESULTS / "alexnet_fire.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    known = {row["seed"] for row in rows}
    for seed in [int(name) for name in sys.argv[1:]] or [seed for seed in SEEDS if seed not in known]:
        bases = sorted(FOLDER.glob("seed-0*/base.safetensors"))
        if seed and not bases:
            sys.exit(f"{FOLDER} has no base yet: run seed 0 first, which trains it.")
        start = (f"model.weights={bases[0]}",) if seed else TAUGHT
        settings = ("recipe=alexnet_fire", "model=alexnet", "data=cifar10", f"data.root={data_root()}", f"seed={seed}")
        report, seconds = compress(FOLDER, *settings, *start, SMALL_TEACHER, "measure=none", out=f"seed-{seed}")
        row = {"seed": seed, "settings": [*BASE], "wall_seconds": round(seconds), **figures(report)}
        rows = sorted([row, *(other for other in rows if other["seed"] != seed)], key=lambda row: row["seed"])
        record("alexnet_fire", rows, model="alexnet", teacher="resnet56", data="CIFAR-10, 10,000 test images")


if __name__ == "__main__":
    main()
