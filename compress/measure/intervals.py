"""How sure an accuracy is, and whether two models differ on the same images."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from compress.errors import UserError

Z95 = 1.959963984540054


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy, in percent (Wilson, 1927): sensible at 0 and 100 % too.

    Raises:
        UserError: no images, or more correct than there are.
    """
    if total < 1 or not 0 <= correct <= total:
        raise UserError(f"`correct` (={correct}) must lie between 0 and `total` (={total}), and `total` be at least 1.")
    share, z2 = correct / total, Z95**2
    middle = share + z2 / (2 * total)
    reach = Z95 * sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    scale = 100 / (1 + z2 / total)
    low = 0.0 if correct == 0 else scale * (middle - reach)
    high = 100.0 if correct == total else scale * (middle + reach)
    return low, high


def accuracy(correct: int, total: int) -> dict[str, float]:
    """An accuracy as the report wants it: {correct, total, top1, low, high}, the last three in percent."""
    low, high = wilson(correct, total)
    return {"correct": correct, "total": total, "top1": 100 * correct / total, "low": low, "high": high}


def paired(base_correct: Tensor, result_correct: Tensor) -> dict[str, float]:
    """How the result's accuracy differs from the base's on the same images.

    Both are bool tensors (images,), True where the model was right. Gives the `difference` in points (result minus
    base), its 95 % interval `low`, `high` (Agresti and Min, 2005), `p` (exact two-sided McNemar test: the chance of a
    difference at least this large between equally good models), and the counts `lost` (only the base was right) and
    `gained` (only the result was).

    Raises:
        UserError: the tensors differ in shape, are not bool, or are empty.
    """
    if base_correct.dtype != torch.bool or result_correct.dtype != torch.bool:
        raise UserError(
            f"`base_correct` ({base_correct.dtype}) and `result_correct` ({result_correct.dtype}) must be bool tensors."
        )
    if base_correct.shape != result_correct.shape or base_correct.numel() == 0:
        raise UserError(
            f"`base_correct` {tuple(base_correct.shape)} and `result_correct` {tuple(result_correct.shape)} must be "
            "of one shape and not empty: the same images in the same order."
        )
    base, result = base_correct.cpu().flatten(), result_correct.cpu().flatten()
    total = base.numel()
    lost, gained = int((base & ~result).sum()), int((~base & result).sum())
    # Half an image added to each of the four outcomes: the plain interval has no width where nothing differs.
    more, middle = total + 2, (gained - lost) / (total + 2)
    reach = Z95 * sqrt((lost + gained + 1) / more**2 - middle**2 / more)
    return {
        "difference": 100 * (gained - lost) / total,
        "low": 100 * max(-1.0, middle - reach),
        "high": 100 * min(1.0, middle + reach),
        "p": mcnemar(lost, gained),
        "lost": lost,
        "gained": gained,
    }


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p value: a fair coin tossed `lost + gained` times falling at least this unevenly."""
    tosses = lost + gained
    term = tail = 1
    for k in range(min(lost, gained)):
        term = term * (tosses - k) // (k + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << tosses))
