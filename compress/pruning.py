"""Which weights matter least: scores of single weights, and how many zeros each layer gets.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, for the Taylor score.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.errors import ConfigError
from compress.nn.masked import GONE, kept
from compress.task import Batches


@dataclass
class Weights:
    """The weights of one convolution or linear layer of a site, their scores, and how many of them shall be zero.

    `scores` has the weight's shape; weights that are zero already have the score `GONE`. `least` weights have to stay.
    """

    site: str
    layer: nn.Module
    scores: Tensor
    least: int
    wanted: int = 0

    @property
    def total(self) -> int:
        return self.scores.numel()

    @property
    def zeros(self) -> int:
        """How many are zero already."""
        return int((self.scores == GONE).sum())

    @property
    def most(self) -> int:
        """So many may be zero at the most."""
        return max(self.total - self.least, self.zeros)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight as it is used."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def smallest_allowed(layer: nn.Module, floor: float) -> int:
    """How many weights have to stay: a share of them, and one for each output."""
    weight = weight_of(layer)
    return max(math.ceil(floor * weight.numel()), len(weight))


def share_evenly(parts: Collection[Weights], amount: float, setting: str = "amount") -> None:
    """Each gets zeros for this share of its weights, as far as it may; `setting` is where `amount` was given.

    Raises:
        ConfigError: one has more zeros already.
    """
    for part in parts:
        wanted = round(amount * part.total)
        if wanted < part.zeros:
            raise ConfigError(
                f"`{setting}` (={amount}) must be at least {part.zeros / part.total:.4g} for {part.site}, of whose "
                f"{part.total} weights {part.zeros} are zero already; raise it, or exclude the layer."
            )
        part.wanted = min(wanted, part.most)


def share_out(parts: Collection[Weights], amount: float) -> None:
    """Zeros for this share of all weights together go to those with the smallest scores, as far as a layer may.

    Raises:
        ConfigError: there are more zeros already, or so many weights may not go.
    """
    total, zeros = sum(part.total for part in parts), sum(part.zeros for part in parts)
    wanted, most = round(amount * total), sum(part.most for part in parts)
    if not zeros <= wanted <= most:
        ends = f"{zeros / total:.4g} and {math.floor(1e4 * most / total) / 1e4:.4g}"
        raise ConfigError(
            f"`amount` (={amount}) must lie between {ends}: of {total} weights {zeros} are zero already, and "
            f"{total - most} have to stay (`floor`, and one for each output of a layer)."
        )
    held = [_held(part) for part in parts]
    flat = torch.cat([scores.flatten() for scores in held])
    left = torch.split(kept(flat, total - wanted), [part.total for part in parts])
    for part, stays in zip(parts, left, strict=True):
        part.wanted = part.total - int(stays.sum())


def _held(part: Weights) -> Tensor:
    """The scores, with infinity for those that stay whatever happens."""
    stay = kept(part.scores, part.total - part.most)
    return torch.where(stay, float("inf"), part.scores).float().cpu()


def taylor_scores(
    model: nn.Module, layers: Collection[nn.Module], batches: Batches, images: int, device: torch.device
) -> list[Tensor]:
    """(weight x gradient)^2 of the cross-entropy for each weight of the layers, added up over the batches."""
    was_training = model.training
    model.eval()
    weights = [_given(layer) for layer in layers]
    wants = [weight.requires_grad for weight in weights]
    scores = [torch.zeros_like(weight) for weight in weights]
    left = images
    for weight in weights:
        weight.requires_grad_(True)
    for x, y in batches:
        x, y = x[:left].to(device), y[:left].to(device)
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), weights, allow_unused=True)
        for score, weight, gradient in zip(scores, weights, gradients, strict=True):
            if gradient is not None:
                score += (weight.detach() * gradient).square()
        left -= len(x)
        if left <= 0:
            break
    for weight, wanted in zip(weights, wants, strict=True):
        weight.requires_grad_(wanted)
    model.train(was_training)
    return scores


def _given(layer: nn.Module) -> Tensor:
    """The parameter that is trained; beneath a mask the gradient is zero where the weight is."""
    masked = parametrize.is_parametrized(layer, "weight")
    weight = layer.parametrizations.weight.original if masked else layer.weight  # type: ignore[union-attr]  # untyped
    assert isinstance(weight, Tensor)
    return weight
