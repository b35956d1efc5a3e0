"""Recipes on CIFAR-10 with a published ResNet, from nothing but its weights: `cifar10.py [RECIPE ...] [model=...]`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from common import RESULTS, cifar, compress, figures, record

asked = [argument for argument in sys.argv[1:] if "=" not in argument] or ["int8", "int8_qat", "shift_quant"]
model = next((a.partition("=")[2] for a in sys.argv[1:] if a.startswith("model=")), "resnet20")
file = RESULTS / "cifar10.json"
rows = json.loads(file.read_text())["rows"] if file.exists() else []
for recipe in asked:
    with tempfile.TemporaryDirectory() as folder:
        report, seconds = compress(Path(folder), f"recipe={recipe}", *cifar(model))
    rows = [row for row in rows if (row["recipe"], row["model"]) != (recipe, model)]
    rows.append({"recipe": recipe, "model": model, "seed": 0, "wall_seconds": round(seconds, 1), **figures(report)})
    record("cifar10", sorted(rows, key=lambda row: (row["model"], row["recipe"])), data="CIFAR-10, 10,000 test images")
