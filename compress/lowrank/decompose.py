"""Decompositions of weights alone: Tucker-2 and CP by tensorly, and the rank that a noisy matrix really has.

Nakajima et al., "Global Analytic Solution of Fully-observed Variational Bayesian Matrix Factorization", JMLR 2013.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROUNDS = 10  # of orthogonal iteration, at most
CP_ROUNDS = 100


def partial_tucker(tensor: Tensor, ranks: tuple[int, int], rounds: int = ROUNDS) -> tuple[Tensor, Tensor, Tensor]:
    """U (C, r), core (r, P, s) and W (T, s), the last two axes' mode as it is: tensor (C, P, T) ~ core x U x W.

    By higher-order orthogonal iteration, at most so many `rounds`; U and W have orthonormal columns.
    """
    from tensorly.decomposition import partial_tucker as hooi

    rules: dict[str, Any] = {"n_iter_max": rounds, "tol": 1e-3, "svd": _wide_svd}
    (core, (first, last)), _ = hooi(tensor.numpy(), rank=list(ranks), modes=[0, 2], **rules)
    return (*(torch.from_numpy(part.copy()) for part in (first, core, last)),)  # type: ignore[return-value]  # three


def _wide_svd(matrix: Any, n_eigenvecs: int, **_: Any) -> tuple[Any, Any, Any]:
    """The largest singular values of a matrix (NumPy's) and their vectors, for few rows and many columns.

    From its rows' products with each other: in a fraction of the time, small singular values only to 1e-8.
    """
    squares, left = np.linalg.eigh(matrix @ matrix.T)
    values = np.sqrt(np.maximum(squares[::-1][:n_eigenvecs], np.finfo(matrix.dtype).tiny))
    left = left[:, ::-1][:, :n_eigenvecs]
    return left, values, left.T @ matrix / values[:, None]


def cp(tensor: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, ...]:
    """One factor (size, rank) for each axis of the tensor: it is about the sum of their outer products."""
    from tensorly.decomposition import parafac

    with warnings.catch_warnings():  # of singular systems on the way, where the rank is more than the tensor needs
        warnings.simplefilter("ignore")
        weights, factors = parafac(
            tensor.numpy(), rank, n_iter_max=CP_ROUNDS, init="svd", tol=1e-6, random_state=seed, l2_reg=1e-9
        )
    first, *others = (torch.from_numpy(factor.copy()) for factor in factors)
    return (first * torch.from_numpy(weights.copy()), *others)


def vbmf_rank(matrix: Tensor) -> int:
    """How many singular values stand out of the noise, by the analytic empirical variational Bayes solution.

    0 where none does, as in a matrix of noise alone. The noise has the variance that explains the matrix best.
    """
    from scipy.optimize import minimize_scalar

    low, high = sorted(matrix.shape)
    squares = torch.linalg.svdvals(matrix.detach().double().cpu()).square()
    total = float(squares.sum())
    if total == 0:
        return 0
    share = low / high
    least = 2.5129 * math.sqrt(share)  # what a signal has to have, in units of the noise
    limit = (1 + least) * (1 + share / least)

    def free_energy(variance: float) -> float:
        x = (squares / (high * variance)).clamp(min=1e-300)
        noise, signal = x[x <= limit], x[x > limit]
        around = signal - (1 + share)
        strength = (around + (around.square() - 4 * share).clamp(min=0).sqrt()) / 2
        explained = signal - strength + ((strength + 1) / signal).log() + share * (strength / share + 1).log()
        return float((noise - noise.log()).sum() + explained.sum())

    most = min(math.ceil(low / (1 + share)) - 1, low) - 1
    tail = squares[max(most + 1, 0) :]
    upper = total / (low * high)
    lower = max(float(tail[0]) / (high * limit), float(tail.mean()) / high)
    found = minimize_scalar(free_energy, bounds=(min(lower, upper), upper), method="bounded")
    return int((squares > high * float(found.x) * limit).sum())
