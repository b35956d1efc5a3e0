"""Gram matrices: the products of all rows of a matrix with each other."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_BLOCK = 128  # rows: smaller products of matrices take no less time than larger ones


def gram(rows: Tensor) -> Tensor:
    """rows rows' of (..., F, N); of blocks that are each other's mirror image, one is computed."""
    half = rows.shape[-2] // 2
    if half < LEAST_BLOCK:
        return rows @ rows.mT
    top, bottom = rows[..., :half, :], rows[..., half:, :]
    corner = top @ bottom.mT
    upper, lower = torch.cat((gram(top), corner), -1), torch.cat((corner.mT, gram(bottom)), -1)
    return torch.cat((upper, lower), -2)
