"""One layer in onnxruntime: a lowered shift layer beside the 3x3 convolution and depthwise + pointwise it stands for.

Blocks of 64 and 128 channels on maps of 56 and 28, one image, two threads, all of a block's forms alternating.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import record
from torch import nn

from compress.lower.onnx_file import export_onnx
from compress.measure import Latency, latency
from compress.nn.shift import ShiftConv2d

ROUNDS = 7


def scattered(channels: int, taps: int) -> ShiftConv2d:
    """A shift layer whose copies stand at different places of the 3x3 window for different channels."""
    layer = ShiftConv2d(channels, channels, 3, taps, padding=1)
    places = torch.stack([torch.randperm(9)[:taps] for _ in range(channels)])
    with torch.no_grad():
        layer.displacement.copy_(torch.stack((places // 3 - 1, places % 3 - 1), -1))
    return layer


def forms(channels: int) -> dict[str, nn.Module]:
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    return {
        "3x3": nn.Conv2d(channels, channels, 3, padding=1),
        "depthwise + pointwise": nn.Sequential(depthwise, nn.Conv2d(channels, channels, 1)),
        "pointwise": nn.Conv2d(channels, channels, 1),
        "shift, 1 tap": scattered(channels, 1),
        "shift, 3 taps": scattered(channels, 3),
    }


torch.manual_seed(0)
rows: list[dict[str, Any]] = []
for channels in (64, 128):
    for size in (56, 28):
        example = torch.randn(2, channels, size, size)
        with tempfile.TemporaryDirectory() as folder:
            paths = {}
            for name, layer in forms(channels).items():
                paths[name] = Path(folder) / f"{len(paths)}.onnx"
                export_onnx(layer, example, paths[name], input={})
            times = latency(paths, example, rounds=ROUNDS, threads=2)

        def ratio(mine: str, other: str, times: dict[str, Latency] = times) -> float:
            rounds = zip(times[mine].rounds_ms, times[other].rounds_ms, strict=True)
            return round(median(a / b for a, b in rounds), 3)

        row: dict[str, Any] = {"channels": channels, "size": size}
        row["p50_ms"] = {name: round(time.p50_ms, 4) for name, time in times.items()}
        row["1 tap / (depthwise + pointwise)"] = ratio("shift, 1 tap", "depthwise + pointwise")
        row["1 tap / 3x3"] = ratio("shift, 1 tap", "3x3")
        row["3 taps / 3x3"] = ratio("shift, 3 taps", "3x3")
        rows.append(row)
record("shift_latency", rows, model="one layer", data="noise", seed=0, target="onnxruntime, batch 1, 2 threads")
