"""What int8 gives in each runtime: `runtimes.py [MODEL ...]`.

The published CIFAR-10 ResNets through recipe `int8`; in each runtime its file beside that of the float network,
measured in turns, each in a process of its own. Do it when nothing else runs.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import cifar, compress, record

from compress.convert import convert
from compress.measure import latency

MODELS = ("resnet20", "resnet56")
FILES = {"onnxruntime": ".onnx", "openvino": ".onnx", "torch": ".pt2", "torch.compile": ".x86.pt2"}
BATCHES = (1, 32)


def measured(model: str, folder: Path) -> list[dict[str, Any]]:
    compress(folder, "recipe=int8", *cifar(model), "measure=none", "export=[onnx,pt2,pt2_x86]")
    out = folder / "out"
    convert(out / "base.safetensors", ["onnx", "pt2"])
    rows = []
    for runtime, suffix in FILES.items():
        pair = {"float": out / ("base.onnx" if suffix == ".onnx" else "base.pt2"), "int8": out / f"model{suffix}"}
        for batch in BATCHES:
            found = latency(pair, torch.zeros(2, 3, 32, 32), target=runtime, batch=batch, seconds=0.5)
            figures = {name: asdict(each) for name, each in found.items()}
            rows.append({"model": model, "runtime": runtime, "batch": batch, "file": f"model{suffix}", **figures})
    return rows


def main() -> None:
    rows = []
    for model in sys.argv[1:] or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows += measured(model, Path(folder))
    record("runtimes", rows, arguments=sys.argv[1:], data="times on noise of CIFAR-10's size", seed=0)


if __name__ == "__main__":
    main()
