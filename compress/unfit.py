"""What keeps every stage from working on a network, whatever the network computes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from compress.errors import ConfigError

# The hooks of torch that put a new weight into a module before each call, and what takes each of them off again.
_HOOKS = {
    "BasePruningMethod": "torch.nn.utils.prune.remove",
    "WeightNorm": "torch.nn.utils.remove_weight_norm",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm",
}


def require_fit(model: nn.Module) -> None:
    """Raise `ConfigError` for weights of another type than float32, and for those that a hook makes anew each time."""
    if problems := [*_other_types(model), *_hooked(model)]:
        raise ConfigError("\n".join(problems))


def _other_types(model: nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            yield (
                f"the model's `{name}` is of type {str(parameter.dtype).removeprefix('torch.')}, but images are "
                "float32, and so must be all parameters; call `.float()` on the model (to train in bfloat16 there is "
                "`precision`)."
            )
            return  # the others will be of the same type


def _hooked(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        kinds = {base.__name__ for hook in module._forward_pre_hooks.values() for base in type(hook).__mro__}
        for remedy in [_HOOKS[kind] for kind in sorted(kinds & _HOOKS.keys())]:
            yield (
                f"a hook makes the weight of `{name}` anew before each call, so nothing can be put in its place; call "
                f"{remedy} on that module first."
            )
