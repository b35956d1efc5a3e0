"""torch-pruning's dependency graph of a network, built on a copy in which layers of ours are plain convolutions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.errors import ConfigError
from compress.lower.plain import bake
from compress.nn.displace import Shift2d
from compress.nn.shift import ShiftConv2d
from compress.surgery import kind, replace


def dependency_graph(model: nn.Module, image: nn.Parameter) -> tuple[Any, Any, dict[int, str]]:
    """The graph, the library it is from, and the names of the modules in it, by `id`.

    The network is shown `image`, a parameter that belongs to no layer, so that the graph tells who reads it.

    Raises:
        ConfigError: the network's forward pass cannot be followed.
    """
    import torch_pruning

    standing = _stand_in(model, image)
    graph = torch_pruning.DependencyGraph()
    with torch.enable_grad(), _under_way(standing) as modules:
        given = (image.clone(),)  # a network may change it in place, which no parameter allows
        try:
            # A forward of our own, because the library's tries another call where the first one fails.
            graph.build_dependency(
                standing, given, lambda net, x: net(*x), unwrapped_parameters=[(image, 1)], verbose=False
            )
        except Exception as error:  # the library runs and follows foreign code
            raise unfollowed(model, error, modules[-1] if modules else "") from error
    return graph, torch_pruning, {id(module): name for name, module in standing.named_modules()}


def unfollowed(model: nn.Module, error: Exception, where: str = "") -> ConfigError:
    """What to raise where the forward pass of `model` cannot be followed; `where` is the module that it failed in."""
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    place = f", in `{where}`" if where else ""
    return ConfigError(
        f"the channels of {type(model).__name__} cannot be followed through its forward pass ({type(error).__name__}: "
        f"{reason}{place}); what works without: `Prune` (single weights), `Factorize` and the stages that replace "
        "layers."
    )


@contextmanager
def _under_way(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose forward pass has begun and not ended, the innermost last."""
    names: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: names.append(name)

    def leave(*_: object) -> None:
        names.pop()

    hooks = [module.register_forward_pre_hook(enter(name)) for name, module in model.named_modules()]
    hooks += [module.register_forward_hook(leave) for module in model.modules()]
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def _stand_in(model: nn.Module, image: Tensor) -> nn.Module:
    """A copy in which layers of ours are plain convolutions of the same channels, where and of what `image` is."""
    standing = copy.deepcopy(model)
    for module in list(standing.modules()):
        if parametrize.is_parametrized(module):
            bake(module)
    for module in list(standing.modules()):
        if kind(module) in (ShiftConv2d, Shift2d):
            standing = replace(standing, module, _plain(module).to(image.device, image.dtype))
    standing.requires_grad_(True)
    return standing


def _plain(layer: nn.Module) -> nn.Conv2d:
    if isinstance(layer, Shift2d):
        return nn.Conv2d(layer.channels, layer.channels, 1, layer.stride, groups=layer.channels)
    assert isinstance(layer, ShiftConv2d)
    return nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.groups,
        layer.pointwise.bias is not None,
        layer.padding_mode,  # type: ignore[arg-type]  # any text here, checked when the layer was made
    )
