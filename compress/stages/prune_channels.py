"""PruneChannels: whole channels are taken out, and the layers that read the others are solved anew.

What it does. Channels that depend on each other, across residual connections, concatenations, grouped and depthwise
convolutions, are found by torch-pruning's dependency graph and really removed: every layer gets smaller, in any
runtime. How many stay in each group is decided by what the network's answers suffer, measured group by group; which
ones, by what the layer that reads them loses although its other weights are solved anew. Then, in the order of the
forward pass, the weights that are left are fitted by least squares to what the original network gave, to the whole sum
where a residual connection ends.

When to use it, and when not. Before everything that treats single weights (a schedule of `Prune` has to have ended
first), and whenever time counts: it is the one structure that is faster everywhere. Short fine-tuning afterwards gives
most of the rest back. Narrow networks lose more than wide ones; where padded shortcuts tie all channels of the residual
stream together, only those inside the blocks can go. Networks whose forward pass cannot be traced are refused.

Knobs. One amount, the share of the whole network to come down to: `macs`, `params`, `bytes` (in memory), or `latency`
in the target runtime, for one image: MACs are lowered by tenths until the measured time is reached. `by`: which
channels go: reconstruction (as above), or the scores l1, l2, bn (scales of batch norms), fpgm (distance to the other
filters), taylor (weight times gradient). `allocation`: `sensitivity` as above, or `uniform`, the same share everywhere.
`multiple`: channel counts that are changed become multiples of it (8 suits most kernels). `floor`: what stays in each
group at least, a share below 1 or a number of channels; with 0, and by sensitivity, whole residual branches may go, so
that the shortcut stays alone. `refit`: solve the weights that are left; false sets those of removed channels to nothing
and leaves the others. `images`: over how many calibration images. `ridge`: pull to the trained weights, as a share of
the equations' diagonal. `include`, `exclude`: layers whose outputs may be removed.

Measured. Before training: `benchmarks/surgery.py`; with it, beside torch-pruning alone: `benchmarks/channels.py`.
ResNet-56 on CIFAR-10 (93.39 %), recipe `channels`, 2.13 times fewer MACs: 92.62 %, in 0.62 of the time. Where channels
go one by one only, time falls less, since onnxruntime's kernels for AVX-512 take 16 channels at once: see torch-pruning
alone there.

Reference. Fang et al., "DepGraph", CVPR 2023; He, Zhang and Sun, "Channel Pruning for Accelerating Very Deep Neural
Networks", ICCV 2017; Luo, Wu and Lin, "ThiNet", ICCV 2017.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.channels.branches import Branches, removable_branches
from compress.channels.budget import allowed, by_harm, levels, uniform
from compress.channels.costs import MEASURES, Costs
from compress.channels.groups import ANSWERS, MAKERS, ChannelGroup, removable
from compress.channels.on_demand import MOST_BYTES, OnDemand, bytes_an_image
from compress.channels.scores import SCORES, taylor_scores, unit_scores
from compress.channels.slices import bake_masks, finite_answers, put_masks, remove, remove_unread
from compress.channels.thinning import Thinning
from compress.errors import ConfigError
from compress.measure import counted
from compress.reconstruct import plain_images
from compress.stage import Edit, Site
from compress.surgery import describe, layers, matching, require_change
from compress.task import Task, Work
from compress.time_budget import reached_in_time

AMOUNTS = (*MEASURES, "latency")
ALLOCATIONS = ("sensitivity", "uniform")
JUDGES = 256  # images on which the groups' harm is measured
MOST_SAID = 8  # layers that a message names


@dataclass(frozen=True)
class PruneChannels:
    """Settings of the stage; see the module's card."""

    macs: float = 0.0
    params: float = 0.0
    bytes: float = 0.0
    latency: float = 0.0
    by: str = "reconstruction"
    allocation: str = "sensitivity"
    multiple: int = 1
    floor: float = 0.1
    refit: bool = True
    images: int = 1024
    ridge: float = 1e-4
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "channels"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = MAKERS

    def __post_init__(self) -> None:
        given = [name for name in AMOUNTS if getattr(self, name) != 0]
        if len(given) != 1:
            raise ConfigError(f"exactly one of {', '.join(f'`{a}`' for a in AMOUNTS)} must be given, not {len(given)}.")
        if not 0 < getattr(self, given[0]) < 1:
            raise ConfigError(
                f"`{given[0]}` (={getattr(self, given[0])}) must be the share to come down to, between 0 and 1."
            )
        for name, known in (("by", ("reconstruction", *SCORES)), ("allocation", ALLOCATIONS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"`{name}` (={getattr(self, name)!r}) must be one of {', '.join(known)}.")
        for name in ("multiple", "images"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` (={getattr(self, name)}) must be at least 1.")
        for name in ("floor", "ridge"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ConfigError(f"`{name}` (={getattr(self, name)}) must be a finite number, 0 or more.")

    @property
    def amount(self) -> str:
        """What the amount is a share of."""
        return next(name for name in AMOUNTS if getattr(self, name) != 0)

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        found = layers(model, self.kinds)
        left_out = matching(list(found), self.include, self.exclude)
        was_training = model.training
        model.eval()
        before = {name: describe(layer) for name, layer in found.items()}
        masks = bake_masks(model)
        example = task.example.to(task.device)
        free, reasons = removable(model, found, left_out, example)
        require_change([Site(n, before[n], None if reasons[n] else "", reasons[n]) for n in found])
        costs = counted(model, example)
        plan = self._thinning(model, free, task, masks)
        branches: Branches = {}
        if self.floor == 0 and self.allocation == "sensitivity":  # a share that is the same everywhere empties none
            branches = removable_branches(model, free, left_out, example)
        counts = {group.name: allowed(group, self.multiple, self.floor, group.name in branches) for group in free}
        original = copy.deepcopy(model)
        order, left, told = self._decided(plan, counts, branches, reasons, task, work, example)
        work.progress.start("channels", len(plan.readers))
        gone = plan.thin(original, order, left, self.by == "reconstruction", work.progress.step)
        work.progress.end()
        remove_unread(model, free, gone, example, branches)
        for name, cost in counted(model, example).items():
            told.setdefault(name, {})["achieved"] = round(cost / costs[name], 4)
        put_masks(model, masks, free, gone)
        after = {name: describe(model.get_submodule(name)) for name in found}
        sites = tuple(_site(name, before[name], after[name], reasons[name]) for name in found)
        require_change(sites)
        notes: dict[str, Any] = {"by": self.by, "images": sum(map(len, plan.images)), **told}
        notes["channels"] = {group.name: [left[group.name] * group.width // group.units, group.width] for group in free}
        if plan.errors:
            notes["relative_error"] = plan.errors
        if self.refit and plan.too_wide:
            notes["not_solved"] = plan.too_wide
        return Edit(model.train(was_training), sites, notes)

    def _thinning(
        self, model: nn.Module, free: Sequence[ChannelGroup], task: Task, masks: Mapping[str, Tensor]
    ) -> Thinning:
        batches = plain_images(task.calibration, self.images, task.device)
        try:
            most = max(1, MOST_BYTES // bytes_an_image(model, batches[0][:1]))
            images = plain_images(task.calibration, min(self.images, most), task.device)
            return Thinning(model, free, images, masks, self.ridge, self.refit)
        except ValueError as error:
            raise ConfigError(
                f"{error}; `PruneChannels` follows single tensors through the network. `Prune` takes single weights "
                "and works without."
            ) from error

    def _decided(
        self,
        plan: Thinning,
        counts: Mapping[str, Sequence[int]],
        branches: Branches,
        reasons: Mapping[str, str],
        task: Task,
        work: Work,
        example: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, int], dict[str, Any]]:
        """The order in which units go, how many stay in each group, and notes on what was asked and reached."""
        measure = "macs" if self.amount == "latency" else self.amount
        costs = Costs(plan.model, plan.groups, example, measure, branches)
        whole, least = costs.total({}), costs.total({name: each[0] for name, each in counts.items()})
        requested = float(getattr(self, self.amount))
        if self.amount != "latency" and least > requested * whole:
            raise ConfigError(
                f"`{self.amount}` (={requested}) cannot be reached: with the fewest channels that `floor` "
                f"(={self.floor}) and `multiple` (={self.multiple}) allow, {math.ceil(1000 * least / whole) / 1000} "
                f"is left; that is the closest{_said(reasons)}."
            )
        order, harms = self._measured(plan, counts, task, work)

        def shared(share: float) -> dict[str, int]:
            budget = int(share * whole)
            return costs.emptied(by_harm(counts, harms, costs, budget) if harms else uniform(counts, costs, budget))

        told: dict[str, Any] = {}
        share = requested
        if self.amount == "latency":
            limits = f"`floor` (={self.floor}) and `multiple` (={self.multiple})"

            def made(share: float) -> tuple[Any, Callable[[], nn.Module]]:
                left = shared(share)
                return left, lambda: _without(plan, order, left, branches)

            share, told = reached_in_time(plan.model, made, least / whole, limits, requested, task, work)
        left = shared(share)
        told[self.amount] = {"requested": requested, **told.get(self.amount, {})}
        return order, left, told

    def _measured(
        self, plan: Thinning, counts: Mapping[str, Sequence[int]], task: Task, work: Work
    ) -> tuple[dict[str, Tensor], dict[str, dict[int, float]]]:
        """For every group the order in which its units go and, by sensitivity, the harm of some counts."""
        work.progress.start("what reads which channels", len(plan.readers))
        needed = self.by == "reconstruction" or (self.refit and self.allocation == "sensitivity")
        equations = plan.equations(work.progress.step) if needed else {}
        work.progress.end()
        taylor: dict[Tensor, Tensor] = {}
        if self.by == "taylor":
            labels = (y for _, y in task.calibration)
            taylor = taylor_scores(
                plan.model, [(x, y[: len(x)].to(x.device)) for x, y in zip(plan.images, labels, strict=False)]
            )
        order, harms = {}, {}
        judges = plain_images(task.calibration, JUDGES, task.device)
        with torch.no_grad():
            wanted = [finite_answers(plan.model, x) for x in judges]
        walk = OnDemand(plan.model, judges)
        work.progress.start("how much each group of channels matters", len(plan.groups))
        for group in plan.groups:
            work.progress.step(group.name)
            if self.by == "reconstruction":
                order[group.name] = plan.order(group, equations)
            else:
                order[group.name] = unit_scores(plan.model, group, self.by, taylor).argsort(stable=True)
            if self.allocation == "sensitivity":
                some = levels(counts[group.name])
                harms[group.name] = plan.harms(group, order[group.name], some, equations, walk, wanted)
        work.progress.end()
        return order, harms


def _said(reasons: Mapping[str, str]) -> str:
    """Which layers keep all their channels, and why; that the last one does goes without saying."""
    kept = [f"{name} ({why})" for name, why in reasons.items() if why not in ("", ANSWERS)]
    more = f", and {len(kept) - MOST_SAID} more" if len(kept) > MOST_SAID else ""
    return f". These keep all their channels: {', '.join(kept[:MOST_SAID])}{more}" if kept else ""


def _without(plan: Thinning, order: Mapping[str, Tensor], left: Mapping[str, int], branches: Branches) -> nn.Module:
    """The network with so many units left in each group, no weight solved anew."""
    thin = copy.deepcopy(plan.model)
    gone = {g.name: order[g.name][: g.units - left[g.name]] for g in plan.groups if left[g.name] < g.units}
    remove(thin, plan.groups, gone, branches)
    return thin


def _site(name: str, before: str, after: str, why: str) -> Site:
    if before != after:
        return Site(name, before, after)
    return Site(name, before, None, why or "all its channels stay within the budget")
