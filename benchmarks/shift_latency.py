"""One layer in a runtime: every form of a shift layer beside the 3x3 convolution and depthwise + pointwise.

Blocks of 64, 128 and 256 channels on maps of 56, 28 and 14, one image, two threads, all of a block's forms alternating;
then what `choose` takes for the layer at that shape. `shift_latency.py [TARGET]`, by default onnxruntime.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import record
from torch import nn

from compress.lower.forms import choose
from compress.lower.onnx_file import export_onnx
from compress.measure import Latency, latency
from compress.nn.displace import Shift2d
from compress.nn.shift import ShiftConv2d

ROUNDS = 7
SHAPES = ((64, 56), (64, 28), (128, 56), (128, 28), (256, 14))


def scattered(channels: int, taps: int) -> ShiftConv2d:
    """A shift layer whose copies stand at different places of the 3x3 window for different channels."""
    layer = ShiftConv2d(channels, channels, 3, taps, padding=1)
    places = torch.stack([torch.randperm(9)[:taps] for _ in range(channels)])
    with torch.no_grad():
        layer.displacement.copy_(torch.stack((places // 3 - 1, places % 3 - 1), -1))
    return layer


def sparse(channels: int) -> Shift2d:
    """A standalone shift of which three channels in four stay where they are."""
    layer = Shift2d(channels, start="random")
    layer.displacement[torch.arange(channels) % 4 != 0] = 0
    return layer


def shifts(channels: int) -> dict[str, ShiftConv2d | Shift2d]:
    return {
        "shift, 1 tap": scattered(channels, 1),
        "shift, 3 taps": scattered(channels, 3),
        "sparse shift alone": sparse(channels),
    }


def plain(channels: int) -> dict[str, nn.Module]:
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    return {
        "3x3": nn.Conv2d(channels, channels, 3, padding=1),
        "depthwise + pointwise": nn.Sequential(depthwise, nn.Conv2d(channels, channels, 1)),
        "pointwise": nn.Conv2d(channels, channels, 1),
    }


def ratio(times: dict[str, Latency], mine: str, other: str) -> float:
    rounds = zip(times[mine].rounds_ms, times[other].rounds_ms, strict=True)
    return round(median(a / b for a, b in rounds), 3)


def row(channels: int, size: int, target: str) -> dict[str, Any]:
    example = torch.randn(2, channels, size, size)
    layers, defaults = plain(channels), {}
    for name, layer in shifts(channels).items():
        forms = layer.forms(target)
        defaults[name] = f"{name}: {next(iter(forms))}"
        layers |= {f"{name}: {form}": module for form, module in forms.items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name, layer in layers.items():
            paths[name] = Path(folder) / f"{len(paths)}.onnx"
            export_onnx(layer, example, paths[name], input={}, target=target)
        times = latency(paths, example, target=target, rounds=ROUNDS, threads=2)
    found: dict[str, Any] = {"channels": channels, "size": size}
    found["p50_ms"] = {name: round(time.p50_ms, 4) for name, time in times.items()}
    found["1 tap / (depthwise + pointwise)"] = ratio(times, defaults["shift, 1 tap"], "depthwise + pointwise")
    found["1 tap / 3x3"] = ratio(times, defaults["shift, 1 tap"], "3x3")
    found["3 taps / 3x3"] = ratio(times, defaults["shift, 3 taps"], "3x3")
    found["to the default"] = {
        name: ratio(times, name, default)
        for default in defaults.values()
        for name in times
        if name != default and name.startswith(default.partition(":")[0] + ":")
    }
    found["chosen"] = {name: choose(layer, example, target)[""].form for name, layer in shifts(channels).items()}
    return found


def main() -> None:
    target = sys.argv[1] if len(sys.argv) > 1 else "onnxruntime"
    torch.manual_seed(0)
    rows = [row(channels, size, target) for channels, size in SHAPES]
    name = "shift_latency" + ("" if target == "onnxruntime" else f"_{target}")
    about = {"model": "one layer", "data": "noise", "seed": 0, "target": f"{target}, batch 1, 2 threads"}
    record(name, rows, "shift_latency", sys.argv[1:], **about)


if __name__ == "__main__":
    main()
