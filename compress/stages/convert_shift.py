"""ConvertShift: a network of learned, bilinear shifts becomes one that moves by whole pixels only.

What it does. Every bilinear `Shift2d` gets whole displacements. One without stride is rounded, halves away from zero.
One with a stride is not: trained ones sit on half pixels there, which average four neighbours before the rest is thrown
away. It becomes a shift by the whole part and a 2x2 average pool with that stride, which is the same thing exactly
where the displacements are halves. Then the convolution that reads each new shift is solved for again, by least squares
against what it gave in the original network, layer by layer. A bilinear `ShiftConv2d`, which the stage `Shift` makes
of a convolution, is rounded and solved for likewise; copies that meet are parted.

When to use it, and when not. For active-shift networks (Jeon & Kim) that are to run on integers or where moving is free
but interpolating is not. Layers that round already (Chen et al.) are kept as they are. Rounding costs accuracy:
fine-tune afterwards.

Knobs. `strided`: `pool` as above, or `keep` bilinear. `others`: `round`, or `keep` bilinear. `refit`: solve for the
convolution behind each shift. `images`: how many calibration images it is solved on. `ridge`: pulls its weights towards
zero, as a share of the activations' mean power. `include`, `exclude`: layers by name pattern.

Measured. AS-ResNet-w32 (published weights), no training, top-1 among 1000 classes on 500 images of ten of them
(`benchmarks/as_resnet.py`; float 62.4): strided layers pooled and the others bilinear 60.6, all converted 49.4, plainly
rounded 0.0. Solved for again on 256 images: 61.8 and 67.6; more than float, since those images are of the ten classes
and the network comes to prefer them. On two photographs of other classes the logits of the second come out further from
the original's by it (cosine 0.79 to 0.75): choose images that look like all that the network is for.

Reference. Jeon & Kim, NeurIPS 2018; Chen et al., CVPR 2019, whose blocks pool where the map gets smaller.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from compress.errors import ConfigError
from compress.nn.displace import Shift2d, ShiftPool2d
from compress.nn.places import trace
from compress.nn.shift import ShiftConv2d
from compress.nn.taps import round_half_away
from compress.reconstruct import Pairs, execution_order, fit_convolution, plain_images, seen_by, set_solution
from compress.shift_pruning import equations
from compress.stage import Edit, Keep
from compress.surgery import kind, layers, swap
from compress.task import Task, Work

STRIDED, OTHERS = ("pool", "keep"), ("round", "keep")
# What may stand between a shift and the convolution that is solved for.
_BETWEEN = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Identity)


@dataclass(frozen=True)
class ConvertShift:
    """Settings of the stage; see the module's card."""

    strided: str = "pool"
    others: str = "round"
    refit: bool = True
    images: int = 1024
    ridge: float = 1e-4
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "substitute"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (Shift2d, ShiftConv2d)

    def __post_init__(self) -> None:
        for name, choices in (("strided", STRIDED), ("others", OTHERS)):
            if getattr(self, name) not in choices:
                raise ConfigError(f"`{name}` (={getattr(self, name)!r}) must be one of {', '.join(choices)}.")
        if self.images < 1:
            raise ConfigError(f"`images` (={self.images}) must be at least 1.")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ConfigError(f"`ridge` (={self.ridge}) must be a finite number, 0 or more.")

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        was_training = model.training
        model.eval()
        original = copy.deepcopy(model)
        old, example = layers(original, self.kinds), task.example.to(task.device)
        calls = execution_order(original, old, example)

        def rule(name: str, layer: nn.Module) -> nn.Module:
            assert isinstance(layer, Shift2d | ShiftConv2d)
            if layer.integer:
                raise Keep("it moves by whole pixels already")
            if isinstance(layer, ShiftConv2d):
                return self._parted(layer)
            if (self.strided if layer.stride > 1 else self.others) == "keep":
                raise Keep(f"`{'strided' if layer.stride > 1 else 'others'}` is keep")
            if layer.stride == 1:
                return _rounded(layer)
            seen = seen_by(original, old[name], calls[name], example)
            return _pooled(layer, {tuple(x.shape[-2:]) for x, _ in seen})

        model, sites = swap(model, rule, self.kinds, self.include, self.exclude, order=list(calls))
        notes: dict[str, Any] = {}
        if self.refit:
            changed = {site.name for site in sites if site.after is not None}
            notes["relative_error"] = self._refit(model, original, changed, task, work)
            if len(notes["relative_error"]) < len(changed):
                notes["refit"] = "only where one plain convolution reads the shift, in a model that can be traced"
        return Edit(model.train(was_training), sites, notes)

    def _parted(self, layer: ShiftConv2d) -> ShiftConv2d:
        """The layer with its copies on grid points, each on one of its own."""
        if self.others == "keep":
            raise Keep("`others` is keep")
        new = copy.deepcopy(layer)
        new.quantize = True
        new.settle()
        return new

    def _refit(
        self, model: nn.Module, original: nn.Module, changed: Collection[str], task: Task, work: Work
    ) -> dict[str, float]:
        """Solve for the convolutions that read the changed layers; gives back their relative squared errors."""
        own = {name for name in changed if _solvable(original.get_submodule(name))}
        then = {name: original.get_submodule(name) for name in own | _readers(original, changed)}
        calls = execution_order(original, then, task.example.to(task.device))
        pairs = Pairs(model, original, plain_images(task.calibration, self.images, task.device))
        images = sum(len(batch) for batch in pairs.images)
        work.progress.start("convertshift", len(calls))
        errors: dict[str, float] = {}
        for name, times in calls.items():
            work.progress.step(name)
            now, before = model.get_submodule(name), then[name]
            seen, count = pairs.of(now, before, times), times * images
            if isinstance(now, ShiftConv2d):
                error = set_solution(now.pointwise, equations(now, now.displacement, seen, count), self.ridge)
            else:
                assert isinstance(now, nn.Conv2d)
                error = fit_convolution(now, seen, count, self.ridge)
            errors[name] = round(error, 4)
        work.progress.end()
        return errors


def _rounded(layer: Shift2d) -> Shift2d:
    new = Shift2d(layer.channels, layer.kernel_size, dilation=layer.dilation)
    new.displacement.copy_(round_half_away(layer.displacement.detach()))
    return new.to(layer.displacement.device)


def _pooled(layer: Shift2d, sizes: set[tuple[int, ...]]) -> ShiftPool2d:
    # Position h of the output averages rows stride * h and the next: the last one needs a row that may not be there.
    pads = {(int((h - 1) % layer.stride == 0), int((w - 1) % layer.stride == 0)) for h, w in sizes}
    if len(pads) > 1:
        raise Keep("it is used on maps of sizes that need different padding")
    new = ShiftPool2d(layer.channels, layer.kernel_size, layer.stride, layer.dilation, pads.pop())
    new.shift.displacement.copy_(torch.floor(layer.displacement.detach()))
    return new.to(layer.displacement.device)


def _solvable(layer: nn.Module) -> bool:
    return isinstance(layer, ShiftConv2d) and not parametrize.is_parametrized(layer.pointwise, "weight")


def _readers(model: nn.Module, shifts: Collection[str]) -> set[str]:
    """The convolutions that alone read one of the shifts, behind a norm or a ReLU or not; none without a trace."""
    try:
        graph = trace(model)
    except ValueError:
        return set()
    found = {_reader(node, model) for node in graph.nodes if node.op == "call_module" and node.target in shifts}
    return {name for name in found if name}


def _reader(node: fx.Node, model: nn.Module) -> str:
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op == "call_module":
            layer = model.get_submodule(str(node.target))
            if kind(layer) is nn.Conv2d:
                return "" if parametrize.is_parametrized(layer, "weight") else str(node.target)
            if kind(layer) not in _BETWEEN:
                return ""
        elif node.target not in (F.relu, torch.relu):
            return ""
    return ""
