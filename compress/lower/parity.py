"""Whether an exported file computes what the model computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BATCHES = (1, 2, 7)


def parity(
    model: Callable[[Tensor], Tensor], file: Callable[[Tensor], Tensor], example: Tensor
) -> list[dict[str, Any]]:
    """For each batch size, the largest difference of the logits and the share of images with the same top-1 class.

    All images of `example` (N, C, H, W) take part at every batch size; fewer than the largest batch are filled up with
    noisy copies of the same range. Where one of the two gives what is no number, or infinite, the other must too: else
    the difference is infinite, and the image counts as another class.
    """
    images = example.detach().cpu()
    missing = max(max(BATCHES) - len(images), 0)
    copies = images[torch.arange(missing) % len(images)]
    noise = torch.randn(copies.shape, generator=torch.Generator().manual_seed(0)) * images.std()
    images = torch.cat((images, copies + noise / 4))
    rows = []
    for batch in BATCHES:
        largest, same = 0.0, []
        for part in torch.split(images[: len(images) // batch * batch], batch):
            with torch.no_grad():
                expected = model(part)
            given = file(part)
            apart = (expected - given).abs().masked_fill(_alike(expected, given), 0)
            largest = max(largest, float(apart.nan_to_num(nan=math.inf, posinf=math.inf).max()))
            same.append((expected.argmax(1) == given.argmax(1)) & apart.isfinite().all(1))
        agreement = float(torch.cat(same).float().mean())
        rows.append({"batch": batch, "images": sum(map(len, same)), "max_abs": largest, "top1_agreement": agreement})
    return rows


def _alike(expected: Tensor, given: Tensor) -> Tensor:
    """Where both are the same infinity or no number at all."""
    return (expected == given) | (expected.isnan() & given.isnan())
