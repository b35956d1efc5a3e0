"""Shifts on a GPU, bfloat16, channels-last: one layer beside what it stands for, and ResNet-20 made of them.

Layers of 64 to 512 channels on maps of 56x56, 32 images; ResNet-20 (untrained, all 3x3 convolutions but the first
replaced), 128 images of 32x32. Forward: weights in bfloat16. Training step: forward and backward to weights and input
under autocast, without the optimizer's part. With one copy a shift layer moves its channels by the package's kernels;
with three it is trained as one dense kernel, made anew in each step, and deployed as one that was made once. Each is
recorded as a CUDA graph, so that what is timed is the GPU's work alone. All of a row take turns, in an order that is
reversed every other round.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from common import record
from shift_latency import scattered
from torch import Tensor, nn

from compress import surgery
from compress.lower.plain import lower
from compress.models import resnet20
from compress.nn.shift import ShiftConv2d

ROUNDS = 7
MILLISECONDS = 30.0  # of each candidate's turn in a round
CHANNELS, SIZE, IMAGES = (64, 128, 256, 512), 56, 32
Call = Callable[[], object]


def separable(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    move = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
    return nn.Sequential(move, nn.Conv2d(channels, out_channels, 1))


def layers(channels: int) -> dict[str, nn.Module]:
    return {
        "pointwise": nn.Conv2d(channels, channels, 1),
        "shift, 1 tap": scattered(channels, 1),
        "shift, 3 taps": scattered(channels, 3),
        "depthwise + pointwise": separable(channels, channels),
        "3x3": nn.Conv2d(channels, channels, 3, padding=1),
    }


def networks() -> dict[str, nn.Module]:
    def shift(taps: int) -> Callable[[str, Any], nn.Module]:
        def rule(name: str, layer: Any) -> nn.Module:
            new = ShiftConv2d(layer.in_channels, layer.out_channels, 3, taps, layer.stride, 1, bias=False)
            with torch.no_grad():
                new.displacement.copy_(torch.randint(-1, 2, new.displacement.shape))
            return new

        return rule

    rules: dict[str, Any] = {
        "pointwise": lambda _, layer: nn.Conv2d(layer.in_channels, layer.out_channels, 1, layer.stride, bias=False),
        "shift, 1 tap": shift(1),
        "shift, 3 taps": shift(3),
        "depthwise + pointwise": lambda _, layer: separable(layer.in_channels, layer.out_channels, layer.stride),
    }
    made: dict[str, nn.Module] = {}
    for name, rule in rules.items():
        made[name] = surgery.swap(resnet20(), rule, (nn.Conv2d,), exclude=("conv1",))[0]
    return made | {"3x3": resnet20()}


def forward(model: nn.Module, x: Tensor) -> Call:
    if any(getattr(module, "taps", 1) > 1 for module in model.modules()):
        model = lower(model, "torch")  # the dense kernels, made once
    model.eval().bfloat16()
    x = x.bfloat16()

    def call() -> Tensor:
        with torch.no_grad():
            return model(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped

    return call


def training(model: nn.Module, x: Tensor) -> Call:
    model.train()
    x = x.bfloat16().requires_grad_()  # as the layer before it hands it over
    grads: dict[torch.Size, Tensor] = {}

    def call() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            y = model(x)
        if y.shape not in grads:
            grads[y.shape] = torch.randn_like(y)
        y.backward(grads[y.shape])

    return call


def recorded(call: Call) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def timed(graph: torch.cuda.CUDAGraph, times: int) -> float:
    """Milliseconds of one replay, over so many in a row."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / times


def row(what: str, of: str, models: dict[str, nn.Module], x: Tensor) -> dict[str, Any]:
    x = x.cuda().contiguous(memory_format=torch.channels_last)
    make = forward if what == "forward" else training
    calls, graphs = {}, {}
    for name, model in models.items():
        model = model.cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # in torch's stubs
        calls[name] = make(model, x)  # kept, since it holds the memory that the recording reads
        graphs[name] = recorded(calls[name])
    times = {name: max(3, round(MILLISECONDS / timed(graph, 5))) for name, graph in graphs.items()}
    rounds: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(ROUNDS):
        for name in list(graphs) if number % 2 == 0 else reversed(list(graphs)):
            rounds[name].append(timed(graphs[name], times[name]))
    found: dict[str, Any] = {"what": what, "of": of, "images": len(x)}
    found["ms"] = {name: round(median(each), 4) for name, each in rounds.items()}
    for name in list(graphs)[1:]:
        ratios = [a / b for a, b in zip(rounds[name], rounds["pointwise"], strict=True)]
        found[f"{name} / pointwise"] = {"median": median(ratios), "low": min(ratios), "high": max(ratios)}
    return found


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("torch finds no GPU here.")
    torch.manual_seed(0)
    F.conv2d(torch.randn(1, 1, 3, 3, device="cuda"), torch.randn(1, 1, 3, 3, device="cuda"))  # starts cuDNN
    rows = []
    for what in ("forward", "training step"):
        for channels in CHANNELS:
            x = torch.randn(IMAGES, channels, SIZE, SIZE)
            rows.append(row(what, f"{channels} channels, {SIZE}x{SIZE}", layers(channels), x))
        rows.append(row(what, "ResNet-20", networks(), torch.randn(128, 3, 32, 32)))
    record("shift_cuda", rows, rounds=ROUNDS, precision="bfloat16, channels-last")


if __name__ == "__main__":
    main()
