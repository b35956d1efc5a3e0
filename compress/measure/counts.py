"""Weights and work of a model, counted while one image passes through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress import surgery
from compress.errors import UserError
from compress.nn.quantized import FakeQuantize

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Their arithmetic folds into the layer before them, so by the usual convention it is not counted.
FOLDING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, FakeQuantize)


@dataclass(frozen=True)
class Profile:
    """What one image costs, and what the weights are.

    params: elements of the parameters as the forward pass sees them. A masked or quantized weight counts once, by its
        effective tensor; the masks, codebooks and scales that make it up say how it is stored and show in the bytes of
        a file, not here. Nor do the scales of activations, trained or not, nor buffers (batch norm statistics) count.
    nonzero: those of them that are not exactly zero.
    macs: multiply-adds for one image; padding positions count, biases, normalisation and activations do not.
    uncounted: modules that hold parameters but whose work is not in `macs`: of a kind not known here, or never called
        as a module. A name is that of `named_modules`.
    bytes_fp32: 4 x params; no file's size.
    activation_bytes: outputs, for one image in float32, of the layers that hold weights (what follows them is fused).
    shift_elements: elements that the spatial displacements of shift layers move, for one image; a copy whose weights
        are all zero moves none.
    """

    params: int
    nonzero: int
    macs: int
    uncounted: tuple[str, ...]
    bytes_fp32: int
    activation_bytes: int
    shift_elements: int


def profile(model: nn.Module, example: Tensor) -> Profile:
    """Count the weights and the work of `model` for one image of the shape of `example` (N, C, H, W).

    Runs the model once in eval mode, on its own device; modes are put back, and no tensor of it changes. A module used
    twice counts its weights once and its work twice.

    Raises:
        UserError: `example` is not a batch.
    """
    if example.dim() < 2 or len(example) < 1:
        raise UserError(f"`example` (shape {tuple(example.shape)}) must be a batch: (N, C, H, W) with N at least 1.")
    layers = dict(surgery.leaves(model))
    work = _Work({}, {}, {})
    hooks = [module.register_forward_hook(work.record) for module in layers.values() if _is_counted(module)]
    first = next(iter(model.parameters()), example)
    try:
        with torch.no_grad(), _evaluating(model):
            model(example[:1].to(first.device, first.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    weights = list(effective_parameters(model))
    params = sum(weight.numel() for _, weight in weights)
    return Profile(
        params=params,
        nonzero=sum(int(torch.count_nonzero(weight)) for _, weight in weights),
        macs=sum(work.macs.values()),
        uncounted=tuple(name for name, module in layers.items() if _is_uncounted(module, work)),
        bytes_fp32=4 * params,
        activation_bytes=4 * sum(work.outputs.values()),
        shift_elements=sum(work.shifted.values()),
    )


def counted(model: nn.Module, example: Tensor) -> dict[str, int]:
    """MACs, parameters, and bytes of parameters and buffers as they are in memory: what budgets are shares of."""
    numbers = profile(model, example)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    return {"macs": numbers.macs, "params": numbers.params, "bytes": size}


def effective_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, once, as the forward pass sees it: parametrizations applied, their insides left out."""
    seen: set[int] = set()
    inside = {
        id(part)
        for module in model.modules()
        for lists in _parametrizations(module).values()
        for part in lists.modules()
    }
    for prefix, module in model.named_modules():
        if id(module) in inside or isinstance(module, FakeQuantize):  # whose scale may be trained
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name, parameter
        for name in _parametrizations(module):
            with torch.no_grad(), _evaluating(module):
                value = getattr(module, name)
            yield f"{prefix}.{name}" if prefix else name, value


def _parametrizations(module: nn.Module) -> dict[str, nn.Module]:
    """The lists of parametrizations of a module by the tensor they make; {} where there are none."""
    lists = module.parametrizations if parametrize.is_parametrized(module) else None
    return dict(lists.items()) if isinstance(lists, nn.ModuleDict) else {}


@dataclass(frozen=True)
class _Work:
    """Multiply-adds, output elements and shifted elements by `id` of the module, added up over its calls."""

    macs: dict[int, int]
    outputs: dict[int, int]
    shifted: dict[int, int]

    def record(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        key, shape = id(module), tuple(inputs[0].shape)
        self.macs[key] = self.macs.get(key, 0) + _macs(module, shape, output)
        self.outputs[key] = self.outputs.get(key, 0) + output.numel()
        moves = getattr(module, "displacement", None)
        if isinstance(moves, Tensor):
            moved = (moves.detach().abs() >= (0.5 if _integer(module) else 0)).any(dim=-1)
            if hasattr(module, "carrying"):
                moved &= module.carrying()  # type: ignore[operator]  # a method, by the layers' contract
            self.shifted[key] = self.shifted.get(key, 0) + int(moved.sum()) * output.shape[-2] * output.shape[-1]


def _integer(module: nn.Module) -> bool:
    return bool(getattr(module, "integer", False))


def _macs(module: nn.Module, shape: tuple[int, ...], output: Tensor) -> int:
    if surgery.is_ours(module):
        return int(module.macs(shape))  # type: ignore[operator]  # what `is_ours` promises
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    weight: Tensor = module.weight  # type: ignore[assignment]  # of a convolution
    # A kernel position meets every output element, or, transposed, every input element.
    positions = shape[-(weight.dim() - 2) :] if isinstance(module, TRANSPOSED) else output.shape[2:]
    return weight.numel() * int(torch.Size(positions).numel())


def _is_counted(module: nn.Module) -> bool:
    """Layers of ours, torch's, and those that are torch's but for how their weights are made."""
    known = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
    return surgery.is_ours(module) or any(
        isinstance(module, each) and surgery.kind(module).forward is each.forward for each in known
    )


def _is_uncounted(module: nn.Module, work: _Work) -> bool:
    if _is_counted(module):
        return id(module) not in work.macs
    return surgery.kind(module) not in FOLDING and _holds_parameters(module)


def _holds_parameters(module: nn.Module) -> bool:
    return bool(_parametrizations(module)) or any(p is not None for p in module._parameters.values())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
