"""Whether an exported file computes what the model computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BATCHES = (1, 2, 7)


def parity(
    model: Callable[[Tensor], Tensor], file: Callable[[Tensor], Tensor], example: Tensor
) -> list[dict[str, Any]]:
    """For each batch size, the largest difference of the logits and the share of images with the same top-1 class.

    The images are those of `example` (N, C, H, W), and noisy ones of the same range after them.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for batch in BATCHES:
        images = example.detach().cpu()[torch.arange(batch) % len(example)]
        noise = torch.randn(images.shape, generator=generator) * images.std()
        noise[: len(example)] = 0
        images = images + noise / 4
        with torch.no_grad():
            expected = model(images)
        given = file(images)
        same = (expected.argmax(1) == given.argmax(1)).float().mean()
        rows.append({"batch": batch, "max_abs": float((expected - given).abs().max()), "top1_agreement": float(same)})
    return rows
