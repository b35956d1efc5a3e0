"""A model with dynamic layers as a GPU runs it: their products in torchao's kernels.

`compress.load` gives layers that compute in float on the grids of int8 or float8. Here they get torchao's tensors,
made by its `quantize_`, and in them the very numbers of our grids.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.lower.plain import lower, weight_parts
from compress.nn.dynamic import DynamicLinear, DynamicPointwise, Float8Weight
from compress.nn.quantized import FakeQuantizeWeight
from compress.stage import Stage

Dynamic = DynamicLinear | DynamicPointwise
LEAST_CAPABILITY = (8, 9)  # of a GPU that multiplies float8


def is_dynamic(model: nn.Module) -> bool:
    """Whether a layer of the model is one that `to_torchao` would change."""
    return any(isinstance(module, Dynamic) for module in model.modules())


def torchao_problems(stages: Mapping[str, Stage]) -> list[str]:
    """Why the latency of a model that nobody can build again cannot be measured in torchao's kernels, as sentences."""
    return [
        f"`stages.{name}` ({type(stage).__name__}) is measured from a checkpoint, which needs `build` in place of "
        "`model`; give it, or set `measure` to none."
        for name, stage in stages.items()
        if getattr(stage, "runs_in", "") == "torchao"
    ]


@torch.no_grad()
def to_torchao(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, on the same device, whose dynamic layers multiply in int8 or float8.

    All other layers are plain torch ones, as in `lower`. It computes what the model computes, but for the order of
    sums. `torch.compile` makes one kernel of what stands around each product. int8 runs on a CPU too.

    torchao multiplies int8 in float where a product has 16 rows or fewer: a linear layer at a small batch.

    Raises:
        ConfigError: no layer is dynamic; the device has no float8 products; torchao's tensors have another form.
    """
    model = copy.deepcopy(model).eval()
    found = {name: module for name, module in model.named_modules() if isinstance(module, Dynamic)}
    if not found:
        raise ConfigError("`model` has no dynamic layer; put a `QuantizeDynamic` stage into the recipe.")
    plain = lower(model, "torch")
    for dtype in sorted({layer.dtype for layer in found.values()}):
        chosen = {name: layer for name, layer in found.items() if layer.dtype == dtype}
        if dtype == "float8":
            _require_float8(next(plain.parameters()).device)
        products = {id(plain.get_submodule(name).linear) for name in chosen}
        _quantize(plain, dtype, products)
        for name, layer in chosen.items():
            place = plain.get_submodule(name)
            place.round = nn.Identity()  # torchao's tensors round what they are multiplied with
            _write(name, place.linear, layer.linear)  # type: ignore[arg-type]  # modules, by their class
    return plain


def _quantize(plain: nn.Module, dtype: str, products: set[int]) -> None:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao reports each GPU kernel that it cannot load on this machine
    try:
        from torchao import quantization
    finally:
        logging.disable(before)
    # Without `set_inductor_config`, which would change how the whole process compiles.
    configs: dict[str, Any] = {
        "int8": quantization.Int8DynamicActivationInt8WeightConfig,
        "float8": quantization.Float8DynamicActivationFloat8WeightConfig,
    }
    grains = {"int8": quantization.PerRow(), "float8": quantization.PerTensor()}
    config = configs[dtype](granularity=grains[dtype], set_inductor_config=False)
    quantization.quantize_(plain, config, filter_fn=lambda module, _: id(module) in products)


def _write(name: str, place: nn.Module, linear: nn.Module) -> None:
    """Put the numbers of `linear`'s grid into the torchao weight at `place`, which has rounded them once more."""
    weight: Any = place.weight
    if not (hasattr(weight, "qdata") and hasattr(weight, "scale")):
        raise ConfigError(
            f"`{name}`: torchao left it in float, or keeps it in a {type(weight).__name__} that has no `qdata` and "
            "`scale`; use torchao 0.18."
        )
    grid = next(reversed(weight_parts(linear)), None)
    if isinstance(grid, FakeQuantizeWeight | Float8Weight):
        rounded = linear.weight
        assert isinstance(rounded, Tensor)
        weight.qdata.copy_(grid.integers(rounded))
        weight.scale.copy_(grid.scale.reshape(weight.scale.shape))


def _require_float8(device: torch.device) -> None:
    needs = "float8 products need a GPU of compute capability 8.9 or later (Ada, Hopper)"
    if device.type != "cuda":
        raise ConfigError(f"`model` is on the {device.type}, and {needs}: move it to one, or quantize to int8.")
    if torch.version.hip is None and (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        raise ConfigError(f"`model` is on a GPU of compute capability {found[0]}.{found[1]}, and {needs}: use int8.")
