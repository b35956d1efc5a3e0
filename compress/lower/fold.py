"""Batch norm becomes part of the convolution in front of it."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from compress.nn.places import trace
from compress.surgery import kind, output_layers, replace


def fold_batch_norm(model: nn.Module) -> list[tuple[str, str]]:
    """Fold each batch norm into the convolution whose output only it reads; gives back the (convolution, norm) pairs.

    The model is edited in place: the convolution gets the norm's scale and a bias, the norm becomes `nn.Identity`.
    It computes what it computed in evaluation mode. A model that cannot be traced keeps its norms: who reads what is
    not known then. So do convolutions or norms that are called twice, and norms without running statistics.
    """
    try:
        graph = trace(model)
    except ValueError:
        return []
    calls = Counter(id(model.get_submodule(str(n.target))) for n in graph.nodes if n.op == "call_module")
    folded = []
    for node in graph.nodes:
        pair = _pair(node, model, calls)
        if pair is None:
            continue
        source, norm = pair
        if _fold(_convolutions(model.get_submodule(source)), model.get_submodule(norm)):
            old = model.get_submodule(norm)
            replace(model, old, nn.Identity().train(old.training))
            folded.append(pair)
    return folded


def _pair(node: fx.Node, model: nn.Module, calls: Counter[int]) -> tuple[str, str] | None:
    if node.op != "call_module" or len(node.all_input_nodes) != 1:
        return None
    norm, source = model.get_submodule(str(node.target)), node.all_input_nodes[0]
    if kind(norm) is not nn.BatchNorm2d or source.op != "call_module" or len(source.users) != 1:
        return None
    layer = model.get_submodule(str(source.target))
    if calls[id(norm)] > 1 or calls[id(layer)] > 1 or not _convolutions(layer):
        return None
    return str(source.target), str(node.target)


def _convolutions(layer: nn.Module) -> tuple[nn.Conv2d, ...]:
    return tuple(output for output in output_layers(layer) if isinstance(output, nn.Conv2d))


@torch.no_grad()
def _fold(convolutions: tuple[nn.Conv2d, ...], norm: nn.Module) -> bool:
    assert isinstance(norm, nn.BatchNorm2d)
    if norm.running_mean is None or norm.running_var is None:
        return False
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean * factor
    if norm.bias is not None:
        shift = shift + norm.bias
    start = 0
    scales = []
    for convolution in convolutions:
        scales.append(slice(start, start + convolution.out_channels))
        start += convolution.out_channels
    if start != norm.num_features:
        return False
    before = [convolution.weight.clone() for convolution in convolutions]
    for convolution, weight, part in zip(convolutions, before, scales, strict=True):
        if not _set_weight(convolution, weight * factor[part].view(-1, 1, 1, 1)):
            for changed, old in zip(convolutions, before, strict=True):
                _set_weight(changed, old)
            return False
    for convolution, part in zip(convolutions, scales, strict=True):
        old = torch.zeros_like(shift[part]) if convolution.bias is None else convolution.bias
        convolution.bias = nn.Parameter(old * factor[part] + shift[part])
    return True


def _set_weight(convolution: nn.Conv2d, weight: Tensor) -> bool:
    """Whether the weight is `weight` now: a parametrization (a codebook) may not be able to express it."""
    if not parametrize.is_parametrized(convolution, "weight"):
        convolution.weight.copy_(weight)
        return True
    try:
        convolution.weight = weight
    except (NotImplementedError, RuntimeError):
        return False
    return torch.allclose(convolution.weight, weight, rtol=1e-5, atol=1e-8)
