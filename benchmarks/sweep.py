"""A sweep over three settings: what the store saves.

The wall time of the sweep is held against one base and three chains, timed in runs that stand alone: each of those
starts from nothing, and its chain is what it took beyond its base.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import compress, record

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    command = [sys.executable, "-m", "compress", "-m", "recipe=shift_quant", "stages.shift.taps=1,2,3", "out=out"]
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
    wall = time.perf_counter() - started
    reports = [json.loads(file.read_text()) for file in folder.glob("out*/report.json")]

reports.sort(key=lambda report: report["rows"][1]["settings"]["taps"])
rows, bases, chains = [], [], []
for report in reports:
    taps = report["rows"][1]["settings"]["taps"]
    with tempfile.TemporaryDirectory() as name:
        alone, seconds = compress(Path(name), "recipe=shift_quant", f"stages.shift.taps={taps}")
    bases.append(alone["rows"][0]["seconds"])
    chains.append(seconds - bases[-1])
    result = report["rows"][-1]
    rows.append({"taps": taps, "top1": result["accuracy"]["top1"], "bytes": result["bytes"]})
    rows[-1] |= {"from_the_store": [hit["stage"] for hit in report["store"] if hit["hit"]]}
    rows[-1] |= {"alone_seconds": round(seconds, 1), "alone_base_seconds": round(bases[-1], 1)}
expected = median(bases) + sum(chains)
record(
    "sweep",
    rows,
    wall_seconds=round(wall, 1),
    one_base_and_three_chains_seconds=round(expected, 1),
    ratio=round(wall / expected, 3),
    bases_trained=sum("base" not in row["from_the_store"] for row in rows),
)
