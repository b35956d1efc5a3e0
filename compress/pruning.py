"""Which weights matter least: scores of single weights, and how many zeros each layer gets.

Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, for the Taylor score.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.errors import ConfigError, DataError
from compress.nn.masked import GONE, MaskedWeight, kept, parsed
from compress.task import Batches

STAY = "`floor`, or as many as a layer has outputs"


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
    asked: float = 0.0  # the share that was asked for

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

    @property
    def emptied(self) -> int:
        """How many outputs have lost the last of their weights since they were scored."""
        before, now = (zero.flatten(1).all(1) for zero in (self.scores == GONE, weight_of(self.layer) == 0))
        return int((now & ~before).sum())


def weight_of(layer: nn.Module) -> Tensor:
    """The weight as it is used."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def smallest_allowed(layer: nn.Module, floor: float) -> int:
    """How many weights have to stay: a share of them, and as many as there are outputs, wherever they are."""
    weight = weight_of(layer)
    return max(math.ceil(floor * weight.numel()), len(weight))


def require_multiples(pattern: str, layers: Mapping[str, Sequence[nn.Module]]) -> None:
    """Raise `ConfigError` for layers, inside sites by name, whose input channels a pattern N:M does not divide."""
    _, m = parsed(pattern)
    uneven = {name: layer for name, inner in layers.items() for layer in inner if weight_of(layer).shape[1] % m}
    if not uneven:
        return
    said = ", ".join(f"{name} has {weight_of(layer).shape[1]}" for name, layer in uneven.items())
    rule = f"`pattern` (={pattern}) needs multiples of {m} input channels (in a group), and "
    if len(uneven) == len(layers):
        widths = math.gcd(*(weight_of(layer).shape[1] for layer in uneven.values()))
        other = next((f"`pattern: {k // 2}:{k}`" for k in (4, 2) if widths % k == 0), "an `amount`")
        raise ConfigError(f"{rule}no layer has that: {said}; take {other} instead.")
    raise ConfigError(f"{rule}{said}; put {'it' if len(uneven) == 1 else 'them'} into `exclude`.")


def require_an_end(model: nn.Module, epochs: int, steps: int) -> None:
    """Raise `ConfigError` where so many epochs of so many steps end before a schedule does: none can be the best."""
    masks = [module for module in model.modules() if isinstance(module, MaskedWeight) and module.steps]
    left = max((mask.steps - int(mask.step) for mask in masks), default=0)
    if left > epochs * steps:
        raise ConfigError(
            f"`keep` (=best) chooses among the epochs after the schedule of `Prune`, which has {left} steps left, more "
            f"than `epochs` (={epochs}) of {steps} steps make; take {-(-left // steps)} epochs, or `keep: last`."
        )


def share_evenly(parts: Collection[Weights], amount: float, setting: str = "amount") -> None:
    """Each gets zeros for this share of its weights; `setting` is where `amount` was given.

    Raises:
        ConfigError: one has more zeros already, or so many of its weights may not go.
    """
    for part in parts:
        wanted = round(amount * part.total)
        if wanted < part.zeros:
            raise ConfigError(
                f"`{setting}` (={amount}) must be at least {_up(part.zeros, part.total)} for {part.site}, of whose "
                f"{part.total} weights {part.zeros} are zero already; raise it, or exclude the layer."
            )
        if wanted > part.most:
            raise ConfigError(
                f"`{setting}` (={amount}) must be at most {_down(part.most, part.total)} for {part.site}, of whose "
                f"{part.total} weights {part.total - part.most} have to stay ({STAY}); lower it (by `layers`, for "
                "this layer alone), or exclude the layer."
            )
        part.wanted, part.asked = wanted, amount


def share_out(parts: Collection[Weights], amount: float) -> None:
    """Zeros for this share of all weights together go to those with the smallest scores, as far as a layer may.

    Raises:
        ConfigError: there are more zeros already, or so many weights may not go.
    """
    total, zeros = sum(part.total for part in parts), sum(part.zeros for part in parts)
    wanted, most = round(amount * total), sum(part.most for part in parts)
    if not zeros <= wanted <= most:
        raise ConfigError(
            f"`amount` (={amount}) must lie between {_up(zeros, total)} and {_down(most, total)}: of {total} weights "
            f"{zeros} are zero already, and {total - most} have to stay ({STAY})."
        )
    held = [_held(part) for part in parts]
    flat = torch.cat([scores.flatten() for scores in held])
    left = torch.split(kept(flat, total - wanted), [part.total for part in parts])
    for part, stays in zip(parts, left, strict=True):
        part.wanted, part.asked = part.total - int(stays.sum()), amount


def _up(part: int, whole: int) -> str:
    """A share in four digits that is not too low."""
    return f"{-(-10_000 * part // whole) / 10_000:.4g}"


def _down(part: int, whole: int) -> str:
    return f"{10_000 * part // whole / 10_000:.4g}"


def _held(part: Weights) -> Tensor:
    """The scores, with infinity for those that stay whatever happens."""
    stay = kept(part.scores, part.total - part.most)
    return torch.where(stay, float("inf"), part.scores).float().cpu()


def taylor_scores(
    model: nn.Module, layers: Collection[nn.Module], batches: Batches, images: int, device: torch.device
) -> list[Tensor]:
    """(weight x gradient)^2 of the cross-entropy for each weight of the layers, added up over the batches.

    Raises:
        DataError: one of them is NaN or infinite.
    """
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
    if not all(bool(score.isfinite().all()) for score in scores):
        raise DataError(
            "the gradients on calibration images hold NaN or infinity; the weights or the images are broken."
        )
    return scores


def _given(layer: nn.Module) -> Tensor:
    """The parameter that is trained; beneath a mask the gradient is zero where the weight is."""
    masked = parametrize.is_parametrized(layer, "weight")
    weight = layer.parametrizations.weight.original if masked else layer.weight  # type: ignore[union-attr]  # untyped
    assert isinstance(weight, Tensor)
    return weight
