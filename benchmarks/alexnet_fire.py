"""SqueezeNet's claim on CIFAR-10: AlexNet's accuracy with fifty times fewer parameters: `alexnet_fire.py [SEED ...]`.

The base, AlexNet's form for CIFAR (35.8 M parameters), is trained from nothing with seed 0; the recipe `alexnet_fire`
then makes the small network with each seed (0, 1, 2). Rows are stored as they come. All is kept in
`outputs/benchmarks/alexnet_fire`, where a run that was killed goes on.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from common import RESULTS, ROOT, compress, data_root, figures, record

SEEDS = (0, 1, 2)
BASE = ("model.train.epochs=16", "model.train.lr=0.04", "model.train.label_smoothing=0.1")
SMALL = ("stages.recover.epochs=10",)


def main() -> None:
    folder = ROOT / "outputs" / "benchmarks" / "alexnet_fire"
    folder.mkdir(parents=True, exist_ok=True)
    file = RESULTS / "alexnet_fire.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    known = {row["seed"] for row in rows}
    for seed in [int(name) for name in sys.argv[1:]] or [seed for seed in SEEDS if seed not in known]:
        bases = sorted(folder.glob("seed-0*/base.safetensors"))
        if seed and not bases:
            sys.exit(f"{folder} has no base yet: run seed 0 first, which trains it.")
        start = (f"model.weights={bases[0]}",) if seed else BASE
        settings = ("recipe=alexnet_fire", "model=alexnet", "data=cifar10", f"data.root={data_root()}", f"seed={seed}")
        report, seconds = compress(folder, *settings, *start, *SMALL, "measure=none", out=f"seed-{seed}")
        row = {"seed": seed, "settings": [*BASE, *SMALL], "wall_seconds": round(seconds), **figures(report)}
        rows = sorted([row, *(other for other in rows if other["seed"] != seed)], key=lambda row: row["seed"])
        record("alexnet_fire", rows, model="alexnet", data="CIFAR-10, 10,000 test images")


if __name__ == "__main__":
    main()
