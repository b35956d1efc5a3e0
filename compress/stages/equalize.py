"""Equalize: channels of neighbouring layers come to have the same range of weights, without a change of the output.

What it does. Batch norm is folded. Where only one layer reads another one's output, through nothing but ReLU and what
keeps channels apart (pooling, padding, dropout, flattening), each channel between them can be scaled by a positive
number on one side and its inverse on the other. The number is chosen such that the channel's largest weight is the same
on both sides. This is repeated over all pairs of layers, since most layers are in two, until the scales stand still.
`Conv2d` (dense, grouped, depthwise) and `Linear` take part. A `ReLU6` between the two layers of a pair would clip at
another value, so it becomes a `ReLU` first: that alone changes the output, where an activation exceeds 6.

When to use it, and when not. In front of `Quantize`, for chains of depthwise and pointwise convolutions such as
MobileNet's, whose channels differ in range by orders of magnitude: indispensable where a whole layer has one scale, and
of use with one scale for each output channel too, since activations and input channels get closer to each other.
Networks of residual blocks have a pair within each block only. A network that was trained with `ReLU6` may lose much by
the `ReLU` alone: compare its row with the base's, and fine-tune, or leave the stage out. Do not train long afterwards:
the gains stay only as long as the weights.

Knobs. `iterations`: the most sweeps over all pairs. `replace_relu6`: false keeps each `ReLU6`, and with it the layers
on both sides as they are. `absorb`: move the part of a bias that is always active behind a
ReLU, max(0, beta - 3 gamma) by the statistics of the folded batch norm, into the next layer's bias, so that activations
have a smaller range. It holds for 99.9 % of the activations, if they are normally distributed, and only where the next
layer pads no zeros: pairs with padding are left alone (the paper and AIMET absorb there too, and are wrong along the
borders). Off, since it is not exact, and since calibrated ranges gain little from it. `include`, `exclude`: layers by
name pattern; both of a pair have to be chosen.

Measured. Not yet measured.

Reference. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.lower.fold import fold_batch_norm
from compress.lower.neighbours import Pair, neighbours
from compress.stage import Edit, Site
from compress.surgery import describe, is_ours, kind, layers, leaves, matching, replace, require_change
from compress.task import Task, Work

TOLERANCE = 1e-4  # scales this close to 1 stand still
DEAD = 1e-6  # channels below this share of their layer's largest weight carry nothing: a scale would blow up the bias


@dataclass(frozen=True)
class Equalize:
    """Settings of the stage; see the module's card."""

    iterations: int = 100
    replace_relu6: bool = True
    absorb: bool = False
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "equalize"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ConfigError(f"`iterations` (={self.iterations}) must be at least 1.")

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        found = {name: layer for name, layer in leaves(model) if kind(layer) in self.kinds or is_ours(layer)}
        before = {name: describe(layer) for name, layer in found.items()}
        left_out = matching(list(found), self.include, self.exclude)
        was_training = model.training
        model.eval()
        normal = {name: _normal(norm) for name, norm in layers(model, (nn.BatchNorm2d,)).items()}
        folded = fold_batch_norm(model)
        pairs, kept = neighbours(model, task.example.to(task.device), left_out, self.replace_relu6)
        ranges = _Ranges(found, pairs)
        ratio = ranges.ratio()
        sweeps, change = self._equalize(ranges, work)
        moved = [pair for pair in pairs if float((ranges.scales[pair] - 1).abs().amax()) > TOLERANCE]
        kept |= {pair.first: f"its ranges are those of {pair.second} already" for pair in pairs if pair not in moved}
        clips = layers(model, (nn.ReLU6,))
        sites = (*_sites(before, kept, moved), *_clip_sites(clips, moved))
        require_change(sites)
        for pair in moved:
            for name in pair.clips:
                replace(model, clips[name], nn.ReLU(bool(clips[name].inplace)).eval())
            _scale(found[pair.first], found[pair.second], pair.positions, ranges.scales[pair])
        notes: dict[str, Any] = {
            "pairs": [f"{pair.first} -> {pair.second}" for pair in moved],
            "range_ratio_before": round(ratio, 3),
            "range_ratio_after": round(ranges.ratio(), 3),
            "sweeps": sweeps,
            "last_change": change,
            "relu6_replaced": [name for pair in moved for name in pair.clips],
            "batch_norms_folded": len(folded),
        }
        if self.absorb:
            known = {convolution: normal[norm] for convolution, norm in folded}
            notes["absorbed"] = {
                pair.first: _absorb(pair, found, known.get(pair.first), ranges.scales[pair]) for pair in moved
            }
        return Edit(model.train(was_training), sites, notes)

    def _equalize(self, ranges: _Ranges, work: Work) -> tuple[int, float]:
        """Sweep over the pairs until no scale changes; gives back the sweeps, and the last one's largest change."""
        work.progress.start("equalize", self.iterations)
        changes: list[float] = []
        while len(changes) < self.iterations and (not changes or changes[-1] > TOLERANCE):
            changes.append(max((ranges.equalize(pair) for pair in ranges.scales), default=0.0))
            work.progress.step()
        work.progress.end()
        return len(changes), round(changes[-1], 6)


class _Ranges:
    """The largest magnitude of the weights from each input channel to each output channel, and the pairs' scales.

    The scale of a channel is what the first layer's output is divided by and the second layer's weights are multiplied
    with. Dead channels keep 1.
    """

    def __init__(self, found: Mapping[str, nn.Module], pairs: Sequence[Pair]) -> None:
        positions = {pair.second: pair.positions for pair in pairs}
        names = dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second))
        # (groups, outputs of a group, inputs of a group)
        self.largest = {name: _by_channel(found[name], positions.get(name, 1)).abs().amax(3).double() for name in names}
        self.scales = {pair: torch.ones_like(self.of(pair)[0]) for pair in pairs}
        self.alive = {pair: _alive(*self.of(pair)) for pair in pairs}

    def of(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """By channel, the range of the first layer's weights that make it, and of the second's that read it."""
        return self.largest[pair.first].amax(2).flatten(), self.largest[pair.second].amax(1).flatten()

    def equalize(self, pair: Pair) -> float:
        """Give each channel the same range on both sides; gives back how far the furthest scale is from 1."""
        makes, reads = self.of(pair)
        scale = torch.where(self.alive[pair], (makes / reads).sqrt(), 1.0)
        first, second = self.largest[pair.first], self.largest[pair.second]
        first /= scale.view(len(first), -1, 1)
        second *= scale.view(len(second), 1, -1)
        self.scales[pair] *= scale
        return float((scale - 1).abs().amax())

    def ratio(self) -> float:
        """The largest range of a channel over the smallest one, in the worst layer on either side of a pair."""
        sides = [side[self.alive[pair]] for pair in self.scales for side in self.of(pair) if self.alive[pair].any()]
        return max((float(side.amax() / side.amin()) for side in sides), default=1.0)


def _by_channel(layer: nn.Module, positions: int) -> Tensor:
    """The weights as (groups, outputs of a group, inputs of a group, positions)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return weight.detach().reshape(groups, len(weight) // groups, weight.shape[1] // positions, -1)


def _alive(makes: Tensor, reads: Tensor) -> Tensor:
    return (makes > DEAD * makes.amax()) & (reads > DEAD * reads.amax())


@torch.no_grad()
def _scale(first: nn.Module, second: nn.Module, positions: int, scale: Tensor) -> None:
    makes, reads = _by_channel(first, 1).double(), _by_channel(second, positions).double()
    _set(first.weight, makes / scale.view(len(makes), -1, 1, 1))
    _set(second.weight, reads * scale.view(len(reads), 1, -1, 1))
    if isinstance(first.bias, Tensor):
        first.bias.copy_(first.bias.double() / scale)


def _set(weight: Tensor | nn.Module, values: Tensor) -> None:
    assert isinstance(weight, Tensor)
    weight.copy_(values.reshape(weight.shape))


@torch.no_grad()
def _absorb(pair: Pair, found: Mapping[str, nn.Module], normal: tuple[Tensor, Tensor] | None, scale: Tensor) -> str:
    """Move what is always active of the first layer's bias into the second's; gives back what was done, in words."""
    first, second = found[pair.first], found[pair.second]
    if normal is None:
        return "kept: no batch norm was folded into it, so its distribution is not known"
    if pair.padded:
        return f"kept: zeros are padded in front of {pair.second}, to which it would not apply"
    if second.bias is None:
        return f"kept: {pair.second} has no bias to take it"
    mean, deviation = normal
    always = (mean - 3 * deviation).clamp(min=0).double() / scale
    assert isinstance(first.bias, Tensor) and isinstance(second.bias, Tensor)
    first.bias.copy_(first.bias.double() - always)
    reads = _by_channel(second, pair.positions).double().sum(3)
    moved = (reads @ always.view(len(reads), -1, 1)).flatten()
    second.bias.copy_(second.bias.double() + moved)
    return f"{int((always > 0).sum())} of {len(always)} channels, up to {float(always.amax()):.3g}"


def _normal(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what a batch norm gives."""
    assert isinstance(norm, nn.BatchNorm2d)
    zeros = torch.zeros(norm.num_features)
    mean = zeros if norm.bias is None else norm.bias.detach().clone()
    return mean, zeros + 1 if norm.weight is None else norm.weight.detach().abs()


def _sites(before: Mapping[str, str], kept: Mapping[str, str], moved: Sequence[Pair]) -> Iterator[Site]:
    above = {pair.second: f"inputs equalized with {pair.first}" for pair in moved}
    below = {pair.first: f"outputs equalized with {pair.second}" for pair in moved}
    for name, text in before.items():
        after = ", ".join(side[name] for side in (above, below) if name in side)
        why = kept.get(name, "")
        yield Site(name, text, after or None, f"its outputs stay: {why}" if after and why else why)


def _clip_sites(clips: Mapping[str, nn.Module], moved: Sequence[Pair]) -> Iterator[Site]:
    replaced = {name for pair in moved for name in pair.clips}
    for name, module in clips.items():
        text = describe(module)
        if name in replaced:
            yield Site(name, text, "ReLU()", "changes the output where an activation exceeds 6")
        else:
            yield Site(name, text, None, "it does not stand between two equalized layers")
