"""Displacements pulled to zero, on CIFAR-10: `sparse_shift.py [NET/L1 ...]`.

For several weights of the displacements' L1 norm: how many displacements are zero, and what that costs against the same
network trained without the pull, on the same test images. The networks: the first half of the recipe `sparse_shift`,
five epochs, on the published ResNet-20; and ShiftResNet-20, trained from nothing with Chen et al.'s displacements, one
for each of three or six times as many channels, in 8 and in 20; and the latter frozen half-way, as they do: 20 epochs
more in which only the weights learn. Without any row named, all that are not stored yet are run.
`correct` in a row says which test images the network gets right: a bit for each, in base64.
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
from common import RESULTS, cifar, compress, data_root, here, record
from torch import Tensor

from compress import load
from compress.data import cifar10, make_task
from compress.measure import paired
from compress.train import logits

# Unheld by the images, a displacement travels about (sum of the learning rates) x l1 / (1 - momentum) pixels: 440 x l1
# in the recipe's five epochs, 1400 x l1 in eight at twice the rate, 3500 x l1 in twenty; half a pixel makes a neighbour
# of zero a zero.
L1 = {
    "shift_resnet20x6_frozen": (0.0, 1.75e-4, 2e-4),
    "shift_resnet20x6": (0.0, 1.5e-4, 2e-4, 3e-4),
    "shift_resnet20": (0.0, 5e-4),
    "resnet20": (0.0, 1.5e-3),
}
TRAINED = {  # expansion, epochs, epochs with the displacements frozen
    "shift_resnet20": (3, 8, 0),
    "shift_resnet20x6": (6, 20, 0),
    "shift_resnet20x6_frozen": (6, 20, 20),
}
FREEZE = "+stages.freeze={_target_:compress.stages.FreezeShifts}"
SETTLE = "+stages.settle={{_target_:compress.stages.FineTune,epochs:{epochs},lr:0.05}}"
CONTEXT: dict[str, Any] = {"data": "CIFAR-10, 10,000 test images", "seed": 0}
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


def settings(net: str, l1: float) -> list[str]:
    if net == "resnet20":
        return ["recipe=sparse_shift", *cifar(), f"stages.shift.l1={l1}", "~stages.prune", "~stages.settle"]
    expansion, epochs, frozen = TRAINED[net]
    model = [f"model.expansion={expansion}", "model.shift=sparse", f"model.l1={l1}", f"model.train.epochs={epochs}"]
    stages = [FREEZE, SETTLE.format(epochs=frozen)] if frozen else [FREEZE]
    return ["model=shift_resnet20", *model, "data=cifar10", f"data.root={data_root()}", *stages]


def trained(net: str, l1: float, folder: Path) -> Row:
    """The row of one run, without its comparison with the run that is not pulled."""
    report, seconds = compress(folder, *settings(net, l1), "measure=none", "export=[]")
    result = report["rows"][-1]
    accuracy = result["accuracy"]
    return {
        "net": net,
        "l1": l1,
        **{key: accuracy[key] for key in ("top1", "low", "high", "total")},
        "paired_base": result["paired"],
        "displacements": result["displacements"],
        **{key: result[key] for key in ("params", "nonzero", "macs", "bytes")},
        "wall_seconds": round(seconds, 1),
        **here(),
        "correct": packed(correct_on_test(folder / "out" / "model.safetensors")),
    }


def compared(rows: list[Row]) -> list[Row]:
    """The rows by net and `l1`, each with its paired difference to the one that is not pulled, once that is there."""
    unpulled = {row["net"]: row for row in rows if row["l1"] == 0}
    for row in rows:
        row["paired_free"], free = None, unpulled.get(row["net"])
        if free is not None and row is not free:
            pair = (unpacked(each["correct"], each["total"]) for each in (free, row))
            row["paired_free"] = paired(*pair)
    return sorted(rows, key=lambda row: (row["net"], row["l1"]))


def main() -> None:
    file = RESULTS / "sparse_shift.json"
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    known = {(row["net"], row["l1"]) for row in rows}
    named = [(net, float(l1)) for net, _, l1 in (name.partition("/") for name in sys.argv[1:])]
    for net, l1 in named or [(net, l1) for net, each in L1.items() for l1 in each if (net, l1) not in known]:
        if net not in L1:
            sys.exit(f"{net} is not one of {', '.join(L1)}")
        with tempfile.TemporaryDirectory() as folder:
            row = trained(net, l1, Path(folder))
        rows = compared([row, *(other for other in rows if (other["net"], other["l1"]) != (net, l1))])
        record("sparse_shift", rows, **CONTEXT)


if __name__ == "__main__":
    main()
