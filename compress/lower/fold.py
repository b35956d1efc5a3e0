"""Batch norm becomes part of the convolution in front of it."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from compress.nn.places import trace
from compress.stage import Keep
from compress.surgery import kind, layers, output_layers, replace


def fold_batch_norm(model: nn.Module) -> list[tuple[str, str]]:
    """Fold each batch norm into the convolution whose output only it reads; gives back the (convolution, norm) pairs.

    The model is edited in place: the convolution gets the norm's scale and a bias, the norm becomes `nn.Identity`.
    It computes what it computed in evaluation mode. A model that cannot be traced keeps its norms: who reads what is
    not known then. So do convolutions or norms that are called twice, and norms without running statistics.
    """
    return fold_or_keep(model)[0]


def fold_or_keep(model: nn.Module) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """As `fold_batch_norm`; gives back the pairs, and for each `BatchNorm2d` that is left the reason."""
    names = {id(norm): name for name, norm in layers(model, (nn.BatchNorm2d,)).items()}
    try:
        graph = trace(model)
    except ValueError as error:
        return [], dict.fromkeys(names.values(), f"who reads what is not known: {error}")
    calls = Counter(id(model.get_submodule(str(n.target))) for n in graph.nodes if n.op == "call_module")
    kept = dict.fromkeys(names.values(), "never reached by the forward pass")
    folded = []
    for node in graph.nodes:
        norm = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if norm is None or id(norm) not in names:
            continue
        try:
            source = _source(node, model, calls)
            _fold(source, model, norm)
        except Keep as reason:
            kept[names[id(norm)]] = str(reason)
            continue
        replace(model, norm, nn.Identity().train(norm.training))
        folded.append((source, str(node.target)))
        del kept[names[id(norm)]]
    return folded, kept


def shown(node: fx.Node) -> str:
    """A traced node for people: "layer1.0.conv1", "`add` in layer1.0", "the model's input"."""
    if node.op == "placeholder":
        return "the model's input"
    if node.op == "output":
        return "the model's output"
    path, operator, _ = str(node.meta["place"]).split(":")
    return path if node.op == "call_module" else f"`{operator}`" + (f" in {path}" if path else "")


def _source(node: fx.Node, model: nn.Module, calls: Counter[int]) -> str:
    """The name of the layer whose output only this norm reads."""
    if calls[id(model.get_submodule(str(node.target)))] > 1:
        raise Keep("called several times, behind different tensors")
    source = node.all_input_nodes[0]
    name = _made_by(source, model)
    layer = model.get_submodule(name) if name else None
    if layer is None or not _convolutions(layer):
        raise Keep(f"it reads {shown(source)}, which is no convolution")
    told = shown(source) if source.op == "call_module" else name
    if any(calls[id(part)] > 1 for part in layer.modules()):
        raise Keep(f"{told} in front of it is called several times")
    if len(source.users) != 1:
        others = ", ".join(shown(reader) for reader in source.users if reader is not node)
        raise Keep(f"{others} reads {told} in front of it too")
    return name


def _made_by(source: fx.Node, model: nn.Module) -> str:
    """The name of the layer that a norm reads: the one called, or the one of ours that is traced in its parts."""
    if source.op == "call_module":
        return str(source.target)
    within = "" if source.op == "placeholder" else str(source.meta["place"]).partition(":")[0]
    return within if within and _has_places(model.get_submodule(within)) else ""


def _has_places(layer: nn.Module) -> bool:
    return kind(layer).__module__.startswith("compress.nn.") and hasattr(layer, "output_places")


def _convolutions(layer: nn.Module) -> list[tuple[nn.Conv2d, Tensor]]:
    """The convolutions whose outputs are this layer's, and which of its channels each one's are."""
    if _has_places(layer):
        return list(layer.output_places())  # type: ignore[operator]  # a method, by the layers' contract
    outputs = [output for output in output_layers(layer) if isinstance(output, nn.Conv2d)]
    sizes = [output.out_channels for output in outputs]
    return list(zip(outputs, torch.split(torch.arange(sum(sizes)), sizes), strict=True))


@torch.no_grad()
def _fold(source: str, model: nn.Module, norm: nn.Module) -> None:
    assert isinstance(norm, nn.BatchNorm2d)
    convolutions = _convolutions(model.get_submodule(source))
    if norm.running_mean is None or norm.running_var is None:
        raise Keep("it has no running statistics")
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = -norm.running_mean * factor
    if norm.bias is not None:
        shift = shift + norm.bias
    given = sum(len(places) for _, places in convolutions)
    if given != norm.num_features:
        raise Keep(f"{source} in front of it gives {given} channels, it normalises {norm.num_features}")
    before = [convolution.weight.clone() for convolution, _ in convolutions]
    for (convolution, places), weight in zip(convolutions, before, strict=True):
        if not _set_weight(convolution, weight * factor[places].view(-1, 1, 1, 1)):
            for (changed, _), old in zip(convolutions, before, strict=True):
                _set_weight(changed, old)
            raise Keep(f"the parametrized weights of {source} in front of it cannot take up its scale")
    for convolution, places in convolutions:
        old = torch.zeros_like(shift[places]) if convolution.bias is None else convolution.bias
        convolution.bias = nn.Parameter(old * factor[places] + shift[places])


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
