"""PruneShifts: displaced copies that carry little go, small displacements become zero, unread channels go with them.

What it does. In every `ShiftConv2d` the copies of input channels are weighed on real activations: what its output loses
without one although the weights of the others are solved anew. The cheapest go, one after the other. Of what is left,
displacements become zero, with `zero`, where reading the channel in place serves as well. A layer then has as many taps
as the channel with the most copies; what other channels have beyond theirs is masked, and stays zero in training and in
the file. What is left is solved anew against what the network gave before, layer after layer. In `Shift2d`
displacements become zero where the map hardly changes. At last, channels that nothing reads are taken out of the layers
that make them. Learned displacements are rounded and stop learning.

When to use it, and when not. After training with `l1`, which pulls displacements to zero, or straight behind `Shift`;
before `Prune`, `Cluster` and `Quantize`; behind `Prune` only once its schedule has ended. It saves bytes, and
multiply-adds where all channels of a layer lose copies. Where one copy is left everywhere, layers run as a depthwise
and a pointwise convolution, and where nothing moves as the pointwise one alone. Layers that interpolate are kept:
`ConvertShift`, or `quantize: true` in `Shift`, comes first.

Knobs. `harm`: the squared error of a layer's output, as a share of its sum of squares, up to which its copies may go;
0.01 if not given, and 0 takes only those without weight. Or `amount`: the share of all copies that goes, the cheapest
of all layers first. `zero`: so much more error may come from displacements that become zero; 0 leaves them. `channels`:
take out channels that nothing reads. `images`: how many calibration images; `ridge`: the pull to the old weights.
`include`, `exclude`: layers by name pattern.

Measured. ResNet-20 on CIFAR-10 (91.73 %, 1.09 MB), recipe `sparse_shift`: after five epochs with `l1` 85.99 %, behind
this stage 84.85, after five epochs more 87.46, in 205 kB.

Reference. Chen et al., "All You Need is a Few Shifts", CVPR 2019, for displacements sparse by L1; Hassibi & Stork,
"Optimal Brain Surgeon", NeurIPS 1993.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.channels.groups import MAKERS
from compress.channels.slices import require_ended
from compress.channels.unread import without_unread
from compress.errors import ConfigError, DataError
from compress.nn.clustered import ClusteredWeight
from compress.nn.displace import Shift2d
from compress.nn.shift import ShiftConv2d
from compress.nn.taps import round_half_away
from compress.quantization import is_quantized
from compress.reconstruct import Pairs, execution_order, plain_images
from compress.shift_pruning import (
    Copies,
    alive_copies,
    changes_by_staying,
    drop_while,
    equations,
    places_with_zero,
    refit,
    why_kept,
)
from compress.stage import Edit, Site
from compress.surgery import describe, layers, matching, replace, require_change, tied
from compress.task import Task, Work

HARM = 0.01  # where neither `harm` nor `amount` is given


@dataclass(frozen=True)
class PruneShifts:
    """Settings of the stage; see the module's card."""

    harm: float | None = None
    amount: float | None = None
    zero: float = 0.0
    channels: bool = True
    images: int = 1024
    ridge: float = 1e-4
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "channels"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (ShiftConv2d, Shift2d)

    def __post_init__(self) -> None:
        if self.harm is not None and self.amount is not None:
            raise ConfigError(
                f"`harm` (={self.harm}) and `amount` (={self.amount}) both say how many copies go; give one of them."
            )
        for name in ("harm", "zero"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"`{name}` (={value}) must be at least 0 and below 1: a share of a layer's output.")
        if self.amount is not None and not 0 < self.amount < 1:
            raise ConfigError(f"`amount` (={self.amount}) must be above 0 and below 1: the share of copies that goes.")
        if self.images < 1:
            raise ConfigError(f"`images` (={self.images}) must be at least 1.")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ConfigError(f"`ridge` (={self.ridge}) must be a finite number, 0 or more.")

    def check(self, model: nn.Module) -> None:
        """Raise `ConfigError` for patterns that match nothing, no shift layers, and weights that are fixed already.

        Where channels go, also for schedules of `Prune` that are still running.
        """
        found = layers(model, self.kinds)
        matching(list(found), self.include, self.exclude)
        if not found:
            raise ConfigError(
                "the model has no shift layers; put the stage `Shift`, which makes them, before `PruneShifts`."
            )
        if is_quantized(model):
            raise ConfigError("the model is quantized already; put `PruneShifts` before `Quantize`.")
        if any(isinstance(module, ClusteredWeight) for module in model.modules()):
            raise ConfigError("the model is clustered already; put `PruneShifts` before `Cluster`.")
        if self.channels:
            require_ended(model)

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        self.check(model)
        found, shared = layers(model, self.kinds), tied(model)
        left_out = matching(list(found), self.include, self.exclude)
        was_training = model.training
        model.eval()
        before = {name: describe(layer) for name, layer in _shown(model).items()}
        calls = execution_order(model, found, task.example.to(task.device))
        never = {name: "" if name in calls else "never reached by the forward pass" for name in found}
        why = {name: left_out[name] or never[name] or why_kept(layer, shared) for name, layer in found.items()}
        taken = {name: found[name] for name in calls if not why[name]}
        images = plain_images(task.calibration, self.images, task.device)
        copies, still = self._weighed(model, taken, calls, images, work)
        self._choose(copies)
        fixed = {name: ", displacements fixed" for name, layer in taken.items() if not _settled(layer)}
        model, errors = self._apply(model, taken, calls, copies, still, images, work)
        notes: dict[str, Any] = {"images": sum(map(len, images)), **_counts(copies, still), "relative_error": errors}
        if self.amount is not None:
            every, left = notes["total"]["copies"]
            notes |= {"requested": self.amount, "achieved": round(1 - left / every, 4)}
        if self.channels:
            model, told = _without_unread(model, taken, left_out, task.example.to(task.device))
            notes["channels"] = told
            notes["total"]["channels"] = sum(every - left for left, every in told["left"].values())
        now = {name: describe(layer) for name, layer in _shown(model).items()}
        sites = tuple(
            self._site(name, text, now[name], why.get(name, ""), copies.get(name), still.get(name), fixed.get(name, ""))
            for name, text in before.items()
            if name in found or now[name] != text
        )
        require_change(sites)
        return Edit(model.train(was_training), sites, notes)

    def _weighed(
        self,
        model: nn.Module,
        taken: Mapping[str, nn.Module],
        calls: Mapping[str, int],
        images: list[Tensor],
        work: Work,
    ) -> tuple[dict[str, Copies], dict[str, Tensor]]:
        """The copies of each `ShiftConv2d`, and for each `Shift2d` which of its channels need not move."""
        copies, still = {}, {}
        pairs, count = Pairs(model, model, images), sum(map(len, images))
        work.progress.start("what each copy carries", len(taken))
        for name, layer in taken.items():
            work.progress.step(name)
            seen = pairs.of(layer, layer, calls[name])
            if isinstance(layer, Shift2d):
                still[name] = _still(layer, changes_by_staying(layer, seen), self.zero)
                continue
            settled = copy.deepcopy(layer)
            assert isinstance(settled, ShiftConv2d)
            settled.settle()
            if not bool(settled.pointwise.weight.isfinite().all()):
                raise DataError(f"the weights of `{name}` hold NaN or infinity; they cannot be weighed.")
            normal = equations(settled, places_with_zero(settled), seen, calls[name] * count, name)
            copies[name] = Copies(settled, alive_copies(settled), normal, self.ridge)
        work.progress.end()
        return copies, still

    def _choose(self, copies: Mapping[str, Copies]) -> None:
        """Let copies go, and move others to zero displacement."""
        if self.amount is not None:
            gone = self._reachable(copies)
            drop_while(copies.values(), lambda _: sum(each.gone for each in copies.values()) < gone)
        else:
            for each in copies.values():
                drop_while([each], lambda layer: layer.error + layer.rise() <= self._harm)
        for each in copies.values() if self.zero else ():
            each.move_to_zero(self.zero)

    @property
    def _harm(self) -> float:
        return HARM if self.harm is None else self.harm

    def _reachable(self, copies: Mapping[str, Copies]) -> int:
        """How many copies go for `amount`; as many have to stay as layers have groups of outputs."""
        total, least = sum(each.before for each in copies.values()), sum(each.groups for each in copies.values())
        if not total:
            raise ConfigError(
                f"`amount` (={self.amount}) is a share of the copies in `ShiftConv2d` layers, of which none is taken; "
                "drop it, or see that `Shift` makes some."
            )
        assert self.amount is not None
        wanted = round(self.amount * total)
        if wanted > total - least:
            raise ConfigError(
                f"`amount` (={self.amount}) must be at most {math.floor(1e4 * (1 - least / total)) / 1e4:.4g}, the "
                f"closest: of {total} copies {least} have to stay, one for each group of outputs of each layer."
            )
        return wanted

    def _apply(
        self,
        model: nn.Module,
        taken: Mapping[str, nn.Module],
        calls: Mapping[str, int],
        copies: Mapping[str, Copies],
        still: Mapping[str, Tensor],
        images: list[Tensor],
        work: Work,
    ) -> tuple[nn.Module, dict[str, float]]:
        """The model with its new layers, and how far the outputs of those with fewer copies are off."""
        original = copy.deepcopy(model)
        pairs, count = Pairs(model, original, images), sum(map(len, images))
        errors = {}
        work.progress.start("solve what is left", len(taken))
        for name, layer in taken.items():
            work.progress.step(name)
            layer.settle()  # type: ignore[operator]  # both kinds have it
            if isinstance(layer, Shift2d):
                layer.displacement[still[name]] = 0
            elif copies[name].gone or copies[name].moved:
                new, stays = copies[name].rebuilt()
                seen = pairs.of(layer, original.get_submodule(name), calls[name])
                errors[name] = float(f"{refit(new, stays, seen, calls[name] * count, self.ridge):.3g}")
                model = replace(model, layer, new.eval())
        work.progress.end()
        return model, errors

    def _site(
        self, name: str, before: str, now: str, why: str, copies: Copies | None, still: Tensor | None, fixed: str
    ) -> Site:
        if copies is not None and (copies.gone or copies.moved):
            moved = f", {copies.moved} moved to zero" if copies.moved else ""
            return Site(name, before, f"{now}, {copies.left} of {copies.before} copies{moved}{fixed}")
        if still is not None and bool(still.any()):
            return Site(name, before, f"{now}, {int(still.sum())} displacements to zero{fixed}")
        if copies is not None:
            told = f"each costs more than `harm` (={self._harm})" if self.amount is None else "others cost less"
            why = f"all its copies stay: {told}"
        elif still is not None:
            why = "`zero` (=0) leaves displacements as they are; try 0.01, say"
            if self.zero:
                why = f"no displacement that is not zero becomes zero within `zero` (={self.zero})"
        if before != now or fixed:
            return Site(name, before, now + fixed, why if fixed else "")
        return Site(name, before, None, why)


def _shown(model: nn.Module) -> dict[str, nn.Module]:
    return layers(model, (*MAKERS, Shift2d))


def _settled(layer: nn.Module) -> bool:
    assert isinstance(layer, ShiftConv2d | Shift2d)
    return not layer.learn and torch.equal(layer.displacement, round_half_away(layer.displacement))


def _still(layer: Shift2d, changes: Tensor, zero: float) -> Tensor:
    """Which displaced channels need not be, as far as their maps change by no more than `zero`."""
    settled = copy.deepcopy(layer)
    settled.settle()
    moves = settled.displacement.any(-1)
    return moves & (changes <= zero).to(moves.device) if zero else torch.zeros_like(moves)


def _counts(copies: Mapping[str, Copies], still: Mapping[str, Tensor]) -> dict[str, Any]:
    zeroed = {name: each.moved for name, each in copies.items()} | {n: int(each.sum()) for n, each in still.items()}
    return {
        "copies": {name: [each.before, each.left] for name, each in copies.items()},
        "zeroed": zeroed,
        "total": {
            "copies": [sum(each.before for each in copies.values()), sum(each.left for each in copies.values())],
            "zeroed": sum(zeroed.values()),
        },
    }


def _without_unread(
    model: nn.Module, taken: Mapping[str, nn.Module], left_out: Mapping[str, str], example: Tensor
) -> tuple[nn.Module, dict[str, Any]]:
    """The model without the channels around the layers `taken` that nothing reads, and what there is to say of them."""
    try:
        model, widths, kept = without_unread(model, taken.keys(), left_out, example)
    except ConfigError as error:
        what, _, _ = str(error).rpartition("; ")  # what is the matter; what other stages can do about it
        told = f"{what or error}; nothing has to be done about it, and `channels: false` does not look for them"
        return model, {"left": {}, "kept": {"the model itself": told}}
    return model, {"left": widths, "kept": kept}
