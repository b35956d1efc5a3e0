"""Equalize: channels of neighbouring layers come to have the same range of weights, without a change of the output.

What it does. Batch norm is folded. Where only one layer reads another one's output, through nothing but ReLU and what
keeps channels apart (pooling, padding, dropout, flattening), each channel between them can be scaled by a positive
number on one side and its inverse on the other. The number is chosen such that the channel's largest weight is the same
on both sides. This is repeated over all pairs of layers, since most layers are in two, until the scales stand still.
`Conv2d` (dense, grouped, depthwise) and `Linear` take part. Dead channels, which one side makes or reads with weights
next to zero, are scaled until the other side's weights are no larger than those of living channels: folding leaves
channels in depthwise networks that never give anything and are read with the largest weights of all. A `ReLU6` between
the two layers stays: channels that it clips on calibration images keep their scale, and the others get none that would
have them clipped there.

When to use it, and when not. In front of `Quantize`, for chains of depthwise and pointwise convolutions such as
MobileNet's, whose channels differ in range by orders of magnitude: indispensable where a whole layer has one scale,
together with `CorrectBias` behind `Quantize`. At 8 bits and one scale for each output channel it is not needed.
Networks of residual blocks have a pair within each block only. Do not train long afterwards: the gains stay only as
long as the weights.

Knobs. `iterations`: the most sweeps over all pairs. `relu6`: `keep`, or `replace` each `ReLU6` between two layers by a
`ReLU`, as the paper does, so that every channel can be scaled; that changes the output where an activation exceeds 6,
and cost 13 points on the network below. `images`: how many calibration images tell which channels are clipped, and
which give nothing. `absorb`: move the part of a bias that is always active behind a ReLU, max(0, beta - 3 gamma) by the
statistics of the folded batch norm, into the next layer's bias, so that activations have a smaller range. It holds for
99.9 % of the activations, if they are normally distributed, and only where the next layer pads no zeros: pairs with
padding are left alone. Off, since it is not exact. `include`, `exclude`: layers by name pattern; both of a pair have to
be chosen.

Measured. MobileNet-V1 0.75 with its published weights, 500 validation images of imagenette-mini among 1000 classes
(`benchmarks/mobilenet.py`): 68.4 % in float, and the same, answer by answer, behind this stage. In int8 with one scale
for each layer 1.0 %, with `CorrectBias` 54.4, with this stage 50.0, with both 69.0: +0.6 points against float (95 %
interval -1.5 to +2.7). `AdaRound` in place of `CorrectBias`: 68.8. `replace` gives 55.4 % in float already, and 55.0 in
int8 with `CorrectBias`. One scale for each output channel needs neither: 69.2 %.

Reference. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.errors import ConfigError, DataError
from compress.lower.fold import fold_batch_norm
from compress.lower.neighbours import Pair, neighbours
from compress.reconstruct import plain_images
from compress.stage import Edit, Site
from compress.surgery import describe, layers, layers_and_ours, matching, replace, require_change
from compress.task import Task, Work

CEILING = 6.0  # of a ReLU6
TOLERANCE = 1e-4  # scales this close to 1 stand still
RELU6 = ("keep", "replace")
DEAD = 1e-6  # channels below this share of their layer's largest weight carry nothing


@dataclass(frozen=True)
class Equalize:
    """Settings of the stage; see the module's card."""

    iterations: int = 100
    relu6: str = "keep"
    images: int = 256
    absorb: bool = False
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "equalize"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)
    ours: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("iterations", "images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` (={getattr(self, name)}) must be at least 1.")
        if self.relu6 not in RELU6:
            raise ConfigError(f"`relu6` (={self.relu6!r}) must be one of {', '.join(RELU6)}.")

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        found = layers_and_ours(model, self.kinds)
        before = {name: describe(layer) for name, layer in found.items()}
        left_out = matching(list(found), self.include, self.exclude)
        was_training = model.training
        model.eval()
        normal = {name: _normal(norm) for name, norm in layers(model, (nn.BatchNorm2d,)).items()}
        folded = fold_batch_norm(model)
        pairs, kept = neighbours(model, task.example.to(task.device), left_out)
        images = plain_images(task.calibration, self.images, task.device) if pairs else []
        clipped = [pair for pair in pairs if pair.clips] if self.relu6 == "keep" else []
        ranges = _Ranges(found, pairs, _reached(model, found, pairs, images), clipped)
        ratio = ranges.ratio()
        sweeps, change = self._equalize(ranges, work)
        moved = [pair for pair in pairs if float((ranges.scales[pair] - 1).abs().amax()) > TOLERANCE]
        kept |= {pair.first: ranges.why_kept(pair) for pair in pairs if pair not in moved}
        clips = layers(model, (nn.ReLU6,))
        fixed = {pair.clips[0]: f"{int(ranges.fixed[pair].sum())} of {len(ranges.fixed[pair])}" for pair in clipped}
        replaced = [name for pair in moved for name in pair.clips if pair not in clipped]
        sites = (*_sites(before, kept, moved), *_clip_sites(clips, replaced, fixed))
        require_change(sites)
        for name in replaced:
            replace(model, clips[name], nn.ReLU(bool(clips[name].inplace)).eval())
        for pair in moved:
            _scale(found[pair.first], found[pair.second], pair.positions, ranges.scales[pair])
        notes: dict[str, Any] = {
            "pairs": [f"{pair.first} -> {pair.second}" for pair in moved],
            "range_ratio_before": round(ratio, 3),
            "range_ratio_after": round(ranges.ratio(), 3),
            "sweeps": sweeps,
            "last_change": change,
            "relu6_replaced": replaced,
            "channels_clipped": fixed,
            "dead_channels": sum(int((~alive).sum()) for alive in ranges.alive.values()),
            "batch_norms_folded": len(folded),
        }
        if self.absorb:
            known = {convolution: normal[norm] for convolution, norm in folded}
            notes["absorbed"] = {pair.first: _absorb(pair, found, known.get(pair.first), ranges) for pair in moved}
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
    with. `reached` is the largest value that images gave each channel between the layers of a pair. Where a ReLU6
    between them stays (`clipped`), channels that it clips keep 1, and no scale may make it clip another one. A dead
    channel that gives something all the same, its bias, keeps 1 too.
    """

    def __init__(
        self,
        found: Mapping[str, nn.Module],
        pairs: Sequence[Pair],
        reached: Mapping[Pair, Tensor],
        clipped: Sequence[Pair],
    ) -> None:
        positions = {pair.second: pair.positions for pair in pairs}
        names = dict.fromkeys(name for pair in pairs for name in (pair.first, pair.second))
        # (groups, outputs of a group, inputs of a group)
        self.largest = {name: _by_channel(found[name], positions.get(name, 1)).abs().amax(3).double() for name in names}
        self.scales = {pair: torch.ones_like(self.of(pair)[0]) for pair in pairs}
        self.least = {pair: reached[pair].clamp(min=0) / CEILING * (pair in clipped) for pair in pairs}
        self.fixed = {pair: least > 1 for pair, least in self.least.items()}
        dead = {pair: tuple(side <= DEAD * side.amax() for side in self.of(pair)) for pair in pairs}
        self.alive = {pair: ~(unmade | unread) for pair, (unmade, unread) in dead.items()}
        self.silent = {pair: unmade & (reached[pair] <= 0) for pair, (unmade, _) in dead.items()}
        self.unread = {pair: unread & ~unmade for pair, (unmade, unread) in dead.items()}

    def of(self, pair: Pair) -> tuple[Tensor, Tensor]:
        """By channel, the range of the first layer's weights that make it, and of the second's that read it."""
        return self.largest[pair.first].amax(2).flatten(), self.largest[pair.second].amax(1).flatten()

    def equalize(self, pair: Pair) -> float:
        """Give each channel the same range on both sides; gives back how far the furthest scale is from 1."""
        makes, reads = self.of(pair)
        before = self.scales[pair]
        equal = (before * (makes / reads).sqrt()).maximum(self.least[pair]) / before
        free = ~self.fixed[pair]
        scale = torch.where(self.alive[pair] & free, equal, 1.0)
        if self.alive[pair].any():  # a dead channel must not be what sets the range of a layer
            made, read = (side[self.alive[pair]].amax() for side in (makes / scale, reads * scale))
            scale = torch.where(self.silent[pair] & free, (read / reads).clamp(max=1), scale)
            scale = torch.where(self.unread[pair] & free, (makes / made).clamp(min=1), scale)
        first, second = self.largest[pair.first], self.largest[pair.second]
        first /= scale.view(len(first), -1, 1)
        second *= scale.view(len(second), 1, -1)
        self.scales[pair] *= scale
        return float((scale - 1).abs().amax())

    def why_kept(self, pair: Pair) -> str:
        """Why the pair's scales are all 1."""
        if bool(self.fixed[pair].all()):
            return f"{pair.clips[0]} clips each of its channels"
        but = f", where {pair.clips[0]} does not clip" if bool(self.fixed[pair].any()) else ""
        return f"its ranges are those of {pair.second} already{but}"

    def ratio(self) -> float:
        """The largest range of a channel over the smallest one, in the worst layer on either side of a pair."""
        sides = [side[self.alive[pair]] for pair in self.scales for side in self.of(pair) if self.alive[pair].any()]
        return max((float(side.amax() / side.amin()) for side in sides), default=1.0)


@torch.no_grad()
def _reached(
    model: nn.Module, found: Mapping[str, nn.Module], pairs: Sequence[Pair], images: Sequence[Tensor]
) -> dict[Pair, Tensor]:
    """By channel, the largest value that the `ReLU6` of a pair reads; without one, the largest magnitude in between."""
    largest: dict[Pair, Tensor] = {}

    def watch(pair: Pair) -> RemovableHandle:
        channels = len(found[pair.first].weight)  # type: ignore[arg-type]  # a tensor

        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].reshape(len(inputs[0]), channels, -1)
            most = (x if pair.clips else x.abs()).amax((0, 2)).double()
            largest[pair] = largest[pair].maximum(most) if pair in largest else most

        reader = model.get_submodule(pair.clips[0] if pair.clips else pair.second)
        return reader.register_forward_pre_hook(look)

    hooks = [watch(pair) for pair in pairs]
    try:
        for batch in images:
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for pair in pairs:
        if pair not in largest:
            raise DataError("calibration has no images, which tell what channels reach; give the task some.")
        if not bool(torch.isfinite(largest[pair]).all()):
            raise DataError(
                f"calibration met NaN or infinity behind {pair.first}; the weights or the images are broken."
            )
    return largest


def _by_channel(layer: nn.Module, positions: int) -> Tensor:
    """The weights as (groups, outputs of a group, inputs of a group, positions)."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    return weight.detach().reshape(groups, len(weight) // groups, weight.shape[1] // positions, -1)


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
def _absorb(pair: Pair, found: Mapping[str, nn.Module], normal: tuple[Tensor, Tensor] | None, ranges: _Ranges) -> str:
    """Move what is always active of the first layer's bias into the second's; gives back what was done, in words."""
    first, second = found[pair.first], found[pair.second]
    if normal is None:
        return "kept: no batch norm was folded into it, so its distribution is not known"
    if pair.padded:
        return f"kept: zeros are padded in front of {pair.second}, to which it would not apply"
    if second.bias is None:
        return f"kept: {pair.second} has no bias to take it"
    mean, deviation = normal
    always = (mean - 3 * deviation).clamp(min=0).double() / ranges.scales[pair]
    always[ranges.fixed[pair]] = 0  # less would be clipped
    assert isinstance(first.bias, Tensor) and isinstance(second.bias, Tensor)
    first.bias.copy_(first.bias.double() - always)
    reads = _by_channel(second, pair.positions).double().sum(3)
    moved = (reads @ always.view(len(reads), -1, 1)).flatten()
    second.bias.copy_(second.bias.double() + moved)
    return f"{int((always > 0).sum())} of {len(always)} channels, up to {float(always.amax()):.3g}"


def _normal(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what a batch norm gives."""
    assert isinstance(norm, nn.BatchNorm2d)
    known = norm.running_mean
    zeros = torch.zeros(norm.num_features, device=None if known is None else known.device)
    mean = zeros if norm.bias is None else norm.bias.detach().clone()
    return mean, zeros + 1 if norm.weight is None else norm.weight.detach().abs()


def _sites(before: Mapping[str, str], kept: Mapping[str, str], moved: Sequence[Pair]) -> Iterator[Site]:
    above = {pair.second: f"inputs equalized with {pair.first}" for pair in moved}
    below = {pair.first: f"outputs equalized with {pair.second}" for pair in moved}
    for name, text in before.items():
        after = ", ".join(side[name] for side in (above, below) if name in side)
        why = kept.get(name, "")
        yield Site(name, text, after or None, f"its outputs stay: {why}" if after and why else why)


def _clip_sites(clips: Mapping[str, nn.Module], replaced: Sequence[str], fixed: Mapping[str, str]) -> Iterator[Site]:
    for name, module in clips.items():
        text = describe(module)
        if name in replaced:
            yield Site(name, text, "ReLU()", "changes the output where an activation exceeds 6")
        elif name in fixed:
            yield Site(name, text, None, f"it clips {fixed[name]} channels, which keep their scale")
        else:
            yield Site(name, text, None, "it does not stand between two equalized layers")
