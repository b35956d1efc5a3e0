"""Displacements pulled to zero, on ResNet-20 / CIFAR-10: `sparse_shift.py [L1 ...]`.

The recipe `sparse_shift` with five epochs, for several weights of the displacements' L1 norm: how many displacements
are zero, and what that costs against the same network trained without the pull, on the same test images. Without any
L1 on the command line, all that are not stored yet are run. `correct` in a row says which test images the network gets
right: a bit for each, in base64.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, cifar, compress, data_root, record
from torch import Tensor

from compress import load
from compress.data import cifar10, make_task
from compress.measure import paired
from compress.train import logits

EPOCHS = 5
# In the order they are run. Unheld by the images, a displacement travels about 440 x l1 in the five epochs (the sum of
# the learning rates, 44, over one minus the momentum): below 1.1e-3 the pull alone takes none from one pixel to zero.
L1 = (0.0, 1.5e-3, 1e-3, 2e-3, 3e-3, 5e-4)
CONTEXT: dict[str, Any] = {"model": "resnet20", "data": "CIFAR-10, 10,000 test images", "seed": 0, "epochs": EPOCHS}
Row = dict[str, Any]


def packed(correct: Tensor) -> str:
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()


def unpacked(text: str, images: int) -> Tensor:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=images)
    return torch.from_numpy(bits).bool()


def correct_on_test(checkpoint: Path) -> Tensor:
    """Which test images the network in this file classifies correctly."""
    model = load(checkpoint)
    task = make_task(cifar10(data_root()), input=model.input)
    outputs, labels = logits(model, task.test, torch.device("cpu"))
    return outputs.argmax(1) == labels


def trained(l1: float, folder: Path) -> Row:
    """The row of one run, without its comparison with the run that is not pulled."""
    settings = [f"stages.shift.l1={l1}", f"stages.recover.epochs={EPOCHS}", "measure=none", "export=[]"]
    report, seconds = compress(folder, "recipe=sparse_shift", *cifar(), *settings)
    start, result = (next(row for row in report["rows"] if row["name"] == name) for name in ("shift", "result"))
    accuracy = result["accuracy"]
    return {
        "l1": l1,
        **{key: accuracy[key] for key in ("top1", "low", "high", "total")},
        "paired_base": result["paired"],
        "displacements": result["displacements"],
        "displacements_start": start["displacements"],
        **{key: result[key] for key in ("params", "nonzero", "macs", "bytes")},
        "wall_seconds": round(seconds, 1),
        "correct": packed(correct_on_test(folder / "out" / "model.safetensors")),
    }


def compared(rows: list[Row]) -> list[Row]:
    """The rows by `l1`, each with its paired difference to the network that is not pulled, once that is there."""
    free = next((row for row in rows if row["l1"] == 0), None)
    for row in rows:
        row["paired_free"] = None
        if free is not None and row is not free:
            pair = (unpacked(each["correct"], each["total"]) for each in (free, row))
            row["paired_free"] = paired(*pair)
    return sorted(rows, key=lambda row: row["l1"])


def main() -> None:
    file = RESULTS / "sparse_shift.json"
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    known = {row["l1"] for row in rows}
    for l1 in [float(name) for name in sys.argv[1:]] or [l1 for l1 in L1 if l1 not in known]:
        with tempfile.TemporaryDirectory() as folder:
            row = trained(l1, Path(folder))
        rows = compared([row, *(other for other in rows if other["l1"] != l1)])
        record("sparse_shift", rows, **CONTEXT)


if __name__ == "__main__":
    main()
