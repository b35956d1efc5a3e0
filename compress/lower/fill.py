"""Channels between two convolutions filled up with zeros, for kernels that take a block of channels at once.

Pruned layers have any number of channels. onnxruntime computes convolutions on x86 in blocks of as many channels as a
vector register has floats; where a number is no multiple of that, it puts the tensor back in order between two layers,
which costs more than the zeros do.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compress import machine
from compress.lower.forms import Choice, answer
from compress.lower.neighbours import neighbours
from compress.nn.flow import operator_name
from compress.nn.places import trace
from compress.surgery import kind, leaves, replace

PLAIN, FILLED = "as it is", "filled with zeros"  # the two forms
SECONDS = 0.5  # a form's turn in each round
FASTER = 0.98  # of the time as it is, at least, for zeros to be worth their bytes
BLOCKS = {"avx512f": 16, "avx2": 8}  # a processor's feature -> floats in a register


@dataclass(frozen=True)
class Filling:
    """Convolutions, and who reads each: the outputs of the former go up to a multiple of `multiple`."""

    readers: Mapping[str, str]
    multiple: int

    def __call__(self, plain: nn.Module) -> nn.Module:
        """A copy of `plain`, a model as `lower` gives it, that computes the same."""
        filled = copy.deepcopy(plain)
        for first, reader in self.readers.items():
            ahead, behind = filled.get_submodule(first), filled.get_submodule(reader)
            assert isinstance(ahead, nn.Conv2d) and isinstance(behind, nn.Conv2d)
            more = -ahead.out_channels % self.multiple
            replace(filled, ahead, _wider(ahead, more, 0))
            replace(filled, behind, _wider(behind, 0, more))
        return filled


def block(target: str) -> int:
    """How many channels the kernels of `target` take at once on this machine; 1 where that is not known."""
    features = machine.hardware()["features"] if target == "onnxruntime" else []
    return next((floats for feature, floats in BLOCKS.items() if feature in features), 1)


def fillable(plain: nn.Module, example: Tensor, multiple: int) -> Filling:
    """All of `plain`, a model as `lower` gives it, that can be filled.

    Left as they are: layers in groups, and those that something else than one convolution reads in the end.
    """
    found = {name: layer for name, layer in leaves(plain) if kind(layer) in (nn.Conv2d, nn.Linear)}
    pairs, _ = neighbours(plain, example, {name: _why_not(layer) for name, layer in found.items()})
    if not pairs or _has_slopes(plain):
        return Filling({}, multiple)
    channels = {name: layer.out_channels for name, layer in found.items() if isinstance(layer, nn.Conv2d)}
    return Filling({pair.first: pair.second for pair in pairs if channels[pair.first] % multiple}, multiple)


def _why_not(layer: nn.Module) -> str:
    if kind(layer) is not nn.Conv2d:
        return "it is no convolution"
    return "" if layer.groups == 1 else "it has groups"


def _has_slopes(plain: nn.Module) -> bool:
    """Whether the model calls a PReLU, whose slopes, one for each channel, would have to be filled too."""
    called = any(operator_name(node) == "prelu" for node in trace(plain).nodes)
    return called or any(kind(module) is nn.PReLU for module in plain.modules())


def choose_filling(
    plain: nn.Module, example: Tensor, target: str, store: Path | None = None
) -> tuple[Filling | None, dict[str, Choice]]:
    """What to fill in a file for `target`, if anything, and what was measured, by layer.

    `plain`, which computes in float, and the same filled are measured for one image of the shape of `example`
    (N, C, H, W); the latter is taken where it is at least 2 % faster. `store` is as in `forms.choose`.
    """
    multiple = block(target)
    filling = fillable(plain, example, multiple)
    if not filling.readers:
        return None, {}
    forms = {PLAIN: plain, FILLED: filling(plain)}
    choice = answer(
        forms, tuple(example.shape[1:]), target, store, seconds=SECONDS, wins=lambda time: time.ratio <= FASTER
    )
    return filling if choice.form == FILLED else None, dict.fromkeys(filling.readers, choice)


def _wider(layer: nn.Conv2d, outputs: int, inputs: int) -> nn.Conv2d:
    """The convolution with more output and input channels, zeros all of them."""
    wider = nn.Conv2d(
        layer.in_channels + inputs,
        layer.out_channels + outputs,
        layer.kernel_size,  # type: ignore[arg-type]  # as torch keeps it
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
        device="meta",  # nothing is drawn for weights that are all given
    )
    for name, parameter in wider.named_parameters():
        old = getattr(layer, name).detach()
        value = torch.zeros(parameter.shape)
        value[tuple(slice(size) for size in old.shape)] = old
        setattr(wider, name, nn.Parameter(value, requires_grad=False))
    return wider.eval()
