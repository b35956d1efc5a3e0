"""A sweep over three settings: what the store saves. The base is trained once, and each run does its own chain."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import record

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    command = [sys.executable, "-m", "compress", "-m", "recipe=shift_quant", "stages.shift.taps=1,2,3", "out=out"]
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
    wall = time.perf_counter() - started
    reports = [json.loads(file.read_text()) for file in folder.glob("out*/report.json")]

reports.sort(key=lambda report: report["rows"][1]["settings"]["taps"])
rows = []
for report in reports:
    own = {row["name"]: round(row["seconds"], 2) for row in report["rows"]}
    rows.append(
        {
            "taps": report["rows"][1]["settings"]["taps"],
            "top1": report["rows"][-1]["accuracy"]["top1"],
            "bytes": report["rows"][-1]["bytes"],
            "seconds": own,
            "run_seconds": report["seconds"],
            "from_the_store": [hit["stage"] for hit in report["store"] if hit["hit"]],
        }
    )
base = rows[0]["seconds"]["base"]
chains = sum(row["run_seconds"] for row in rows) - base
record(
    "sweep",
    rows,
    wall_seconds=round(wall, 1),
    base_seconds=base,
    chain_seconds=round(chains, 1),
    ratio=round(wall / (base + chains), 3),
    bases_trained=sum("base" not in row["from_the_store"] for row in rows),
)
