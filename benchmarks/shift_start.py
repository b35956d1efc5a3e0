"""`Shift` alone on ResNet-20, no training: accuracy right after substitution, and the time that it takes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import cifar, compress, record

STAGE = "stages.shift={_target_:compress.stages.Shift,taps:%d,exclude:[conv1]}"
rows = []
for taps in (2, 3, 4, 5):
    with tempfile.TemporaryDirectory() as folder:
        report, _ = compress(Path(folder), "+" + STAGE % taps, *cifar(), "measure=none", "cache=off")
    shift = report["rows"][1]
    rows.append({"taps": taps, "top1": shift["accuracy"]["top1"], "seconds": round(shift["seconds"], 1)})
    rows[-1] |= {"params": shift["params"], "macs": shift["macs"], "images": shift["settings"]["images"]}
record("shift_start", rows, model="resnet20", data="CIFAR-10, 10,000 test images", seed=0)
