"""One layer in plain torch on the CPU: a shift with one copy beside the pointwise convolution that it holds.

Blocks of 64 and 128 channels on maps of 56 and 28, all cores. Inference in float32, channels first, one image and 32. A
training step (forward, backward to weights and input) as `compress.train` trains: channels-last, bfloat16 autocast, 32
images. The layers take turns, in an order that is reversed every other round; ratios are medians over the rounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import record
from shift_latency import scattered
from torch import nn

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 15
SECONDS = 0.2  # of each layer's turn in a round
BATCHES = (1, 32)
TRAINED = 32


def kinds(channels: int) -> dict[str, nn.Module]:
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    return {
        "pointwise": nn.Conv2d(channels, channels, 1),
        "shift, 1 tap": scattered(channels, 1),
        "depthwise + pointwise": nn.Sequential(depthwise, nn.Conv2d(channels, channels, 1)),
        "3x3": nn.Conv2d(channels, channels, 3, padding=1),
    }


def inference(layer: nn.Module, channels: int, size: int, batch: int) -> Callable[[], None]:
    x = torch.randn(batch, channels, size, size)
    layer.eval()

    def call() -> None:
        with torch.no_grad():
            layer(x)

    return call


def training(layer: nn.Module, channels: int, size: int, batch: int) -> Callable[[], None]:
    layer.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # missing in torch's stubs
    x = torch.randn(batch, channels, size, size).contiguous(memory_format=torch.channels_last)
    x = x.bfloat16().requires_grad_()  # as the layer before it hands it over
    grad = torch.randn_like(x)

    def call() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.backward(grad)

    return call


def timed(call: Callable[[], None]) -> float:
    """Median milliseconds of a call, over SECONDS and at least 3 calls."""
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return median(times)


def row(what: str, make: Callable[..., Callable[[], None]], channels: int, size: int, batch: int) -> dict[str, Any]:
    calls = {name: make(layer, channels, size, batch) for name, layer in kinds(channels).items()}
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for number in range(ROUNDS):
        for name in list(calls) if number % 2 == 0 else reversed(list(calls)):
            rounds[name].append(timed(calls[name]))
    found: dict[str, Any] = {"what": what, "channels": channels, "size": size, "batch": batch}
    found["ms"] = {name: round(median(times), 4) for name, times in rounds.items()}
    for name in list(calls)[1:]:
        ratios = [a / b for a, b in zip(rounds[name], rounds["pointwise"], strict=True)]
        found[f"{name} / pointwise"] = round(median(ratios), 3)
    return found


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for channels in (64, 128):
        for size in (56, 28):
            rows += [row("inference", inference, channels, size, batch) for batch in BATCHES]
            rows.append(row("training step", training, channels, size, TRAINED))
    training_as = f"channels-last, bfloat16 autocast, batch {TRAINED}"
    record(
        "shift_torch",
        rows,
        arguments=sys.argv[1:],
        model="one layer",
        data="noise",
        seed=0,
        target=f"torch on the CPU, {torch.get_num_threads()} threads",
        inference="channels first, float32",
        training=training_as,
        rounds=ROUNDS,
    )


if __name__ == "__main__":
    main()
