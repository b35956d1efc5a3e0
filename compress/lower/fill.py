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
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from compress import machine
from compress.lower.forms import Choice, answer, question
from compress.lower.neighbours import neighbours
from compress.nn.flow import operator_name
from compress.nn.places import trace
from compress.surgery import kind, leaves

if TYPE_CHECKING:
    from compress.measure import Latency

PLAIN, FILLED = "as they are", "filled with zeros"  # channels: the two forms of a network
SECONDS = 0.5  # a form's turn in each round
FASTER = 0.98  # of the time as it is, at most: less would not be worth the bytes of the zeros
BLOCKS = {"avx512f": 16, "avx2": 8}  # a processor's feature -> floats in a register
LEAST_MACS = 10_000_000  # of a network: a smaller one takes no time worth the measuring
NOISE = 1e-4  # of the largest answer: by so much two orders of the same additions may differ


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
            _widen(ahead, more, 0)
            _widen(behind, 0, more)
        return filled


def block(target: str) -> int:
    """How many channels the kernels of `target` take at once on this machine; 1 where that is not known."""
    features = machine.hardware()["features"] if target == "onnxruntime" else []
    return next((floats for feature, floats in BLOCKS.items() if feature in features), 1)


def fillable(plain: nn.Module, example: Tensor, multiple: int) -> Filling:
    """All of `plain`, a model as `lower` gives it, that can be filled.

    Left as they are: layers in groups, those that something else than one convolution reads in the end, and all of a
    model with a PReLU, which may have a slope for each channel.
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
    called = any(operator_name(node) == "prelu" for node in trace(plain).nodes)
    return called or any(kind(module) is nn.PReLU for module in plain.modules())


def choose_filling(
    plain: nn.Module, example: Tensor, target: str, store: Path | None = None
) -> tuple[Filling, Choice] | None:
    """What can be filled in a file for `target`, and what was measured; None where nothing can.

    `plain`, which computes in float32, and the same filled are measured for one image of the shape of `example`
    (N, C, H, W); the choice is the latter where its median time is at least 2 % less. Both compute the same, so a
    choice that noise has made costs bytes and no more. `store` is as in `forms.choose`.
    """
    from compress.measure import profile

    multiple = block(target)
    if multiple == 1 or example.dtype != torch.float32:
        return None
    try:
        if profile(plain, example).macs < LEAST_MACS:
            return None
        filling = fillable(plain, example, multiple)
        filled = filling(plain) if filling.readers else plain
        same = _same(plain(example), filled(example))
    except Exception:  # the forward pass may do anything with the number of channels
        return None
    if not filling.readers or not same:
        return None
    forms = {PLAIN: plain, FILLED: filled}
    shape = tuple(example.shape[1:])
    asked = question(forms, shape, target, str(trace(plain)))
    return filling, answer(asked, forms, shape, target, store, seconds=SECONDS, wins=_faster)


def _same(expected: Tensor, given: Tensor) -> bool:
    return bool(torch.allclose(given, expected, rtol=0, atol=NOISE * float(expected.abs().max())))


def _faster(time: Latency) -> bool:
    return time.ratio <= FASTER


def _widen(layer: nn.Conv2d, outputs: int, inputs: int) -> None:
    """Give the convolution more output and input channels, zeros all of them."""
    layer.out_channels += outputs
    layer.in_channels += inputs
    weight = functional.pad(layer.weight.detach(), (0, 0, 0, 0, 0, inputs, 0, outputs))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(functional.pad(layer.bias.detach(), (0, outputs)), requires_grad=False)
