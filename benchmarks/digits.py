"""The main job on the built-in images, three seeds, each from nothing: time, accuracy, size."""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import compress, figures, record

rows = []
for seed in range(3):
    with tempfile.TemporaryDirectory() as folder:
        report, seconds = compress(Path(folder), "recipe=shift_quant", f"seed={seed}")
        rows.append({"seed": seed, "wall_seconds": round(seconds, 1), **figures(report)})
record("digits", rows, recipe="shift_quant", model="small", data="digits")
