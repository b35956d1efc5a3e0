"""Sharing a budget out over layers: every choice for a layer has a cost, and a harm measured on the whole network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.surgery import replace
from compress.train import divergence


@dataclass(frozen=True)
class Choice:
    """One way to treat a layer: what it costs (in the budget's unit), and what it does to the network's answers."""

    cost: int
    harm: float


def harm(model: nn.Module, old: nn.Module, new: nn.Module, images: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Mean divergence (nats) of the answers of `model` with `new` in the place of `old` from the logits `wanted`.

    `images` and `wanted` are batches. The model is left as it was.
    """
    try:
        model = replace(model, old, new)
        with torch.no_grad():
            total = sum(divergence(model(x), y) * len(x) for x, y in zip(images, wanted, strict=True))
        return total / sum(len(x) for x in images)
    finally:
        replace(model, new, old)


def share_out(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, int]:
    """Which choice each layer gets (its index), so that the sum of harms is small and the costs fit into `budget`.

    Starts with the cheapest everywhere, and takes again and again the step, of any length, that lowers the harm most
    for its cost and still fits. Harms of different layers are taken to add up.

    Raises:
        ValueError: the cheapest choices together cost more than `budget`.
    """
    taken = {name: min(range(len(each)), key=lambda i: (each[i].cost, each[i].harm)) for name, each in choices.items()}
    left = budget - sum(choices[name][i].cost for name, i in taken.items())
    if left < 0:
        raise ValueError(f"`budget` (={budget}) must be at least {budget - left}, the cost of the cheapest choices.")
    while True:
        best, step = 0.0, None
        for name, now in taken.items():
            here = choices[name][now]
            for i, choice in enumerate(choices[name]):
                cost, gain = choice.cost - here.cost, here.harm - choice.harm
                if gain > 0 and cost <= left and gain / max(cost, 1e-9) > best:
                    best, step = gain / max(cost, 1e-9), (name, i, cost)
        if step is None:
            return taken
        name, i, cost = step
        taken[name], left = i, left - cost
