"""The weights that pruning leaves, solved anew: by least squares, each output channel with the weights it still has.

What a layer gave before is the target; what the network as pruned so far gives it is the input, so that errors of
earlier layers are made good too. Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022, state the problem.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from compress.nn.masked import mask_of
from compress.reconstruct import Equations, Normal

MOST_FEATURES = 4096  # above this the equations of a layer take gigabytes


def why_not(layer: nn.Module) -> str:
    """Why a layer's weights are not solved anew; "" where they can be."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        return "no single convolution"
    features = layer.weight[0].numel()
    return f"{features} weights for each output are too many" if features > MOST_FEATURES else ""


@torch.no_grad()
def refit(
    layer: nn.Conv2d | nn.Linear, pairs: Iterable[tuple[Tensor, Tensor]], images: int, ridge: float, name: str = ""
) -> tuple[float, float]:
    """Solve a masked layer's weights, and its bias, for (input, wanted output) pairs over `images` images.

    `ridge` pulls the weights to what they were, by that share of the gram matrix's mean diagonal. Gives back the
    squared error before and after, as shares of the wanted outputs' sum of squares.
    """
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    equations = Equations(_convolution(layer), images, layer.bias is not None)
    for x, y in pairs:
        if isinstance(layer, nn.Linear):  # a pointwise convolution over whatever lies between
            x, y = (z.reshape(len(z), -1, z.shape[-1]).mT.unsqueeze(-1) for z in (x, y))
        equations.add(x, y)
    normal = equations.normal(name)
    masked = mask_of(layer)
    assert masked is not None
    start, support = _columns(layer.weight, groups), _columns(masked.mask, groups).bool()
    if layer.bias is not None:
        bias = layer.bias.detach().cpu().double().view(groups, 1, -1)
        start = torch.cat((start, bias), 1)
        support = torch.cat((support, torch.ones_like(bias, dtype=torch.bool)), 1)
    solved = on_supports(normal, start, support, ridge)
    before, after = (_error(normal, weights) for weights in (start, solved))
    if layer.bias is not None:
        layer.bias.copy_(solved[:, -1].flatten())
        solved = solved[:, :-1]
    layer.parametrizations.weight.original.copy_(solved.mT.reshape(layer.weight.shape))  # type: ignore[operator,union-attr]  # there, as it is masked
    return before, after


def on_supports(normal: Normal, start: Tensor, support: Tensor, ridge: float) -> Tensor:
    """The least-squares weights (G, F, O / G) that are zero outside `support` (the same shape), pulled to `start`."""
    result = torch.zeros_like(start)
    for group, gram in enumerate(normal.gram):
        pull = (ridge + 1e-12) * float(gram.diagonal().mean().clamp(min=1e-30))
        pulled = gram + pull * torch.eye(len(gram), dtype=gram.dtype)
        wanted = normal.cross[group] + pull * start[group]
        for output in range(wanted.shape[1]):
            (kept,) = torch.nonzero(support[group, :, output], as_tuple=True)
            result[group, kept, output] = torch.linalg.solve(pulled[kept][:, kept], wanted[kept, output])
    return result


def _error(normal: Normal, weights: Tensor) -> float:
    explained = (weights * (2 * normal.cross - normal.gram @ weights)).sum()
    return float((normal.power.sum() - explained).clamp(min=0) / normal.power.sum().clamp(min=1e-30))


def _columns(weight: Tensor, groups: int) -> Tensor:
    """(O, F, ...) -> (groups, F, O / groups), in float64 on the CPU, where the equations are."""
    return weight.detach().cpu().double().reshape(groups, len(weight) // groups, -1).mT


def _convolution(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d:
    if isinstance(layer, nn.Conv2d):
        return layer
    with torch.device("meta"):
        return nn.Conv2d(layer.in_features, layer.out_features, 1)
