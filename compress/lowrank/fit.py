"""Layers in factors, made from trained ones: which form a layer takes, and what goes where in it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compress.lowrank.factors import Problem, Ranks, Shape, factorize, factorize_cp, truncated
from compress.nn.geometry import spatial_config
from compress.nn.lowrank import LowRankConv2d, LowRankLinear
from compress.reconstruct import Normal, relative_error


@torch.no_grad()
def fit(
    layer: nn.Conv2d, normal: Normal | None, method: str, ranks: Ranks, ridge: float, rounds: int
) -> tuple[LowRankConv2d, float]:
    """The layer in factors, and the relative squared error of its output (of its weights, without `normal`).

    For CP the second of the ranks counts.
    """
    shape = Shape.of(layer, method)
    new = empty(layer, method, ranks)
    end = new.output
    if end.bias is not None and layer.bias is not None:
        end.bias.copy_(layer.bias)
    left = power = 0.0
    for group, kernel in enumerate(shape.kernel(layer)):
        problem = None if normal is None else Problem.of(normal, group, shape, ridge)
        weights = _solve(new, group, problem, kernel, ranks, rounds)
        if normal is None:
            left += float((weights - kernel.flatten(0, 1)).square().sum())
            power += float(kernel.square().sum())
            continue
        if normal.bias and end.bias is not None:
            sums, rows = normal.gram[group][-1, :-1], normal.gram[group][-1, -1]
            bias = (normal.cross[group][-1] - sums @ weights) / rows
            end.bias.view(shape.groups, -1)[group].copy_(bias)
            weights = torch.cat((weights, bias.unsqueeze(0)))
        power += float(normal.power[group])
        left += relative_error(normal, group, torch.arange(len(weights)), weights) * float(normal.power[group])
    return new, left / max(power, 1e-30)


def _solve(
    new: LowRankConv2d, group: int, problem: Problem | None, kernel: Tensor, ranks: Ranks, rounds: int
) -> Tensor:
    """Set one group's weights; gives back the dense kernel (channels * positions, outputs) that they make."""
    if new.form == "cp":
        inputs, tall, wide, outputs = factorize_cp(problem, kernel, new.kernel_size, ranks[1])
        _place(new, group, {"reduce": inputs.mT, "tall": tall.mT, "wide": wide.mT, "expand": outputs})
        return torch.einsum("cr,yr,xr,tr->cyxt", inputs, tall, wide, outputs).reshape(-1, len(outputs))
    factors = truncated(kernel, ranks) if problem is None else factorize(problem, ranks, rounds)
    names = ("tall", "wide", "") if new.form == "spatial" else ("reduce", "core", "expand")
    parts = (factors.first.mT, factors.core.permute(2, 0, 1), factors.last)
    _place(new, group, dict(zip(names, parts, strict=True)))
    return factors.kernel().flatten(0, 1)


def _place(new: LowRankConv2d, group: int, weights: dict[str, Tensor]) -> None:
    """Set one group's share of the parts that there are."""
    for name, part in new.parts.named_children():
        share = part.weight.view(new.groups, -1)[group]  # type: ignore[operator]  # a convolution's weight
        share.copy_(weights[name].reshape(-1))


def empty(layer: nn.Conv2d, method: str, ranks: Ranks) -> LowRankConv2d:
    """A layer in factors of the convolution's geometry, not yet fitted. A 1x1 kernel has but one form: tucker's."""
    form = method if method in ("spatial", "cp") and math.prod(layer.kernel_size) > 1 else "tucker"
    return LowRankConv2d(
        layer.in_channels,
        layer.out_channels,
        ranks={"tucker": ranks, "spatial": ranks[:1], "cp": ranks[1:]}[form],
        form=form,
        groups=layer.groups,
        bias=layer.bias is not None,
        **spatial_config(layer),
    )


@torch.no_grad()
def as_linear(layer: LowRankConv2d) -> LowRankLinear:
    """Two 1x1 convolutions on maps of one pixel as what they are."""
    core, expand = layer.parts.core, layer.parts.expand
    assert isinstance(core, nn.Conv2d) and isinstance(expand, nn.Conv2d)
    new = LowRankLinear(core.in_channels, expand.out_channels, core.out_channels, expand.bias is not None)
    new.reduce.weight.copy_(core.weight.flatten(1))
    new.expand.weight.copy_(expand.weight.flatten(1))
    if expand.bias is not None:
        new.expand.bias.copy_(expand.bias)
    return new
