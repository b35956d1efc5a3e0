"""Prune: single weights become zero and stay zero, anywhere or in a pattern that hardware has kernels for.

What it does. In `Conv2d`, `Linear` and the convolutions inside layers of ours, the weights that matter least get zero,
at once or along a schedule that goes on inside the fine-tuning behind this stage. Zeros stay zero in training, under
`Cluster` and `Quantize`, and the file holds what is left. At once, what is left is solved anew, so that each layer
comes as near as it can to what it gave before. A second `Prune` raises the amount further.

When to use it, and when not. For the size of the file. Scattered zeros save no time in onnxruntime, OpenVINO or
torch, which compute in dense form; 2:4 pays on GPUs that have sparse tensor cores. Half of the weights go without
training; for 80 % take a schedule and fine-tune. A schedule moves only while something trains: a checkpoint written
before it ended has the zeros of that moment, and no more come.

Knobs. `amount`: the share of zeros, half if not given; `scope`: of all weights together (`global`: layers that matter
less lose more) or of each `layer`; `layers`: shares of their own by name pattern, the first that matches counts, and
`amount` is for the others. `by`: `magnitude`; `taylor`, which looks at gradients on `images` calibration images, or
of the training where there is a schedule; `movement`, for schedules only, lets weights come back, and takes each
layer's share from magnitudes. `pattern`: 2:4 leaves 2 of every 4 consecutive input channels at the same place in the
kernel; it says the amount of every layer itself. `schedule`: `one_shot`, `linear` or `cubic` over the first `epochs`
of fine-tuning, with `updates` in each of them, or one `every` so many steps. `floor`: the share that stays in each
layer, and never fewer weights than it has outputs; that need not be one for each (the notes count those that lose all).
`refit`: at once only, on `images` images; `ridge` is the pull towards the old weights. `include`, `exclude`: layers by
name pattern.

Measured. Before training, with refit and without: `benchmarks/surgery.py`. ResNet-20 on CIFAR-10 (91.73 %, 1.09 MB):
recipe `magnitude`, four of five weights, 90.83 % in 212 kB.

Reference. Zhu & Gupta, "To prune, or not to prune", 2017; Sanh et al., "Movement Pruning", NeurIPS 2020; Molchanov et
al., CVPR 2019; Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021; Frantar & Alistarh, NeurIPS 2022.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.errors import ConfigError, DataError
from compress.nn.clustered import ClusteredWeight
from compress.nn.masked import GONE, SCHEDULES, SCORES, MaskedWeight, among_largest, kept, mask_of, parsed, put_mask
from compress.pruning import STAY, Weights, require_multiples, share_evenly, share_out, smallest_allowed, taylor_scores
from compress.pruning import weight_of as weight
from compress.quantization import is_quantized
from compress.reconstruct import Pairs, execution_order, plain_images
from compress.refit import refit, why_not
from compress.stage import Edit, Site
from compress.surgery import by_pattern, describe, layers_and_ours, matching, require_change, tied, weighted, why_shared
from compress.task import Task, Work

SCOPES = ("global", "layer")


@dataclass(frozen=True)
class Prune:
    """Settings of the stage; see the module's card."""

    amount: float | None = None
    scope: str = "global"
    layers: dict[str, float] = field(default_factory=dict)
    by: str = "magnitude"
    pattern: str = ""
    schedule: str = "one_shot"
    epochs: float = 5.0
    updates: int = 10
    every: int | None = None
    floor: float = 0.0
    refit: bool | None = None
    images: int = 1024
    ridge: float = 1e-4
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "prune"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)
    ours: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, known in {"scope": SCOPES, "by": SCORES, "schedule": SCHEDULES}.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"`{name}` (={getattr(self, name)!r}) must be one of {', '.join(known)}.")
        for name, share in {
            "amount": self.amount,
            **{f"layers.{p}": share for p, share in self.layers.items()},
        }.items():
            if share is not None and not 0 < share < 1:
                raise ConfigError(f"`{name}` (={share}) must be above 0 and below 1: the share that becomes zero.")
        if not 0 <= self.floor < 1:
            raise ConfigError(f"`floor` (={self.floor}) must be at least 0 and below 1: the share that stays.")
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ConfigError(f"`epochs` (={self.epochs}) must be above 0; for no schedule take `schedule: one_shot`.")
        for name in ("updates", "every", "images"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"`{name}` (={getattr(self, name)}) must be at least 1.")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ConfigError(f"`ridge` (={self.ridge}) must be a finite number, 0 or more.")
        if self.schedule == "one_shot" and self.by == "movement":
            raise ConfigError(
                "`by` (=movement) is told by training, of which there is none with `schedule: one_shot`; take linear "
                "or cubic, or `by: taylor`."
            )
        if self.schedule != "one_shot" and self.refit:
            raise ConfigError(f"`refit` (=true) solves what is left at once; with `schedule: {self.schedule}` drop it.")
        if self.pattern:
            self._check_pattern()

    def _check_pattern(self) -> None:
        try:
            n, m = parsed(self.pattern)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        if self.amount is not None and not math.isclose(self.amount, 1 - n / m, abs_tol=1e-6):
            raise ConfigError(
                f"`amount` (={self.amount}) must be {1 - n / m:g}, as `pattern` (={self.pattern}) says; drop it."
            )
        for name in ("layers", "floor"):
            if getattr(self, name):
                raise ConfigError(
                    f"`{name}` (={getattr(self, name)}) has no say beside `pattern` (={self.pattern}), which every "
                    "layer keeps; drop one of them, or exclude layers."
                )

    @property
    def training_epochs(self) -> float:
        """How many epochs of training behind this stage its schedule takes."""
        return 0 if self.schedule == "one_shot" else self.epochs

    @property
    def _amount(self) -> float:
        if self.pattern:
            n, m = parsed(self.pattern)
            return 1 - n / m
        return 0.5 if self.amount is None else self.amount

    def check(self, model: nn.Module) -> None:
        """Raise `ConfigError` for patterns that match nothing or do not fit, and where weights have settled already."""
        if is_quantized(model):
            raise ConfigError("the model is quantized already; put `Prune` before `Quantize`.")
        if any(isinstance(module, ClusteredWeight) for module in model.modules()):
            raise ConfigError("the model is clustered already; put `Prune` before `Cluster`.")
        found = self._found(model)
        reasons = matching(list(found), self.include, self.exclude)
        by_pattern("layers", self.layers, list(found))
        if self.pattern:
            taken = {name: weighted(layer) for name, layer in found.items() if not reasons[name]}
            require_multiples(self.pattern, taken)

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        self.check(model)
        found = self._found(model)
        was_training = model.training
        model.eval()
        before = copy.deepcopy(model) if self._refits else None
        described = {name: describe(layer) for name, layer in found.items()}
        left_out = matching(list(found), self.include, self.exclude)
        why = {name: left_out[name] or self._why_kept(layer, tied(model)) for name, layer in found.items()}
        for name, layer in found.items():
            if not why[name] and hasattr(layer, "settle"):  # displacements that may still meet would add up weights
                layer.settle()  # type: ignore[operator]  # a method, by the layers' contract
        parts = self._parts({name: layer for name, layer in found.items() if not why[name]}, model, task)
        self._share(parts, by_pattern("layers", self.layers, list(found)))
        steps = round(self.epochs * len(task.train)) or 1 if self.schedule != "one_shot" else 0
        every = self.every or max(1, round(len(task.train) / self.updates))
        for part in parts:
            if part.wanted > part.zeros:
                self._mask(part, steps, every)
        for name in {part.site for part in parts}:
            if all(part.wanted == part.zeros for part in parts if part.site == name):
                why[name] = "all its weights that are not zero are among those that stay"
        errors: dict[str, tuple[float, float]] = {}
        if before is not None:
            taken = {name: layer for name, layer in found.items() if not why[name]}
            errors = self._refit(taken, model, before, task, work)
        each = {name: [part for part in parts if part.site == name] for name in found}
        sites = tuple(
            Site(name, described[name], None, why[name])
            if why[name]
            else Site(
                name, described[name], self._said(each[name], steps), "" if name in errors else self._not_refit(layer)
            )
            for name, layer in found.items()
        )
        require_change(sites)
        notes: dict[str, Any] = {"requested": _asked(parts), "planned" if steps else "achieved": _share(parts)}
        notes["zeros"] = {name: _share(inner) for name, inner in each.items() if inner}
        emptied = {name: sum(part.emptied for part in inner) for name, inner in each.items()}
        notes |= {"emptied_outputs": {name: n for name, n in emptied.items() if n}} if any(emptied.values()) else {}
        if steps:
            notes |= {"steps": steps, "every": every}
        if errors:
            notes["relative_error"] = {name: float(f"{after:.3g}") for name, (_, after) in errors.items()}
            notes["relative_error_before_refit"] = {name: float(f"{off:.3g}") for name, (off, _) in errors.items()}
        return Edit(model.train(was_training), sites, notes)

    @property
    def _refits(self) -> bool:
        return self.schedule == "one_shot" and self.refit is not False

    def _found(self, model: nn.Module) -> Mapping[str, nn.Module]:
        return layers_and_ours(model, self.kinds)

    def _why_kept(self, layer: nn.Module, shared: Collection[int]) -> str:
        inner = weighted(layer)
        if not inner:
            return "it only displaces its input: there are no weights to prune"
        if why := why_shared(layer, shared):
            return why
        for part in inner:
            if parametrize.is_parametrized(part, "weight") and (
                len(part.parametrizations.weight) > 1 or mask_of(part) is None  # type: ignore[union-attr,arg-type]  # untyped
            ):
                return "its weight is parametrized by something that a mask must not follow"
        if not any(bool(weight(part).any()) for part in inner):
            return "all its weights are zero, and zeros stay zero in training; train it first"
        if not self.pattern and all(smallest_allowed(part, self.floor) >= weight(part).numel() for part in inner):
            return f"its {sum(weight(part).numel() for part in inner)} weights have to stay ({STAY})"
        return ""

    def _parts(self, found: Mapping[str, nn.Module], model: nn.Module, task: Task) -> list[Weights]:
        layers = [(name, inner) for name, layer in found.items() for inner in weighted(layer)]
        for name, layer in layers:
            if not bool(weight(layer).isfinite().all()):
                raise DataError(f"the weights of `{name}` hold NaN or infinity; they cannot be pruned.")
        if self.by == "taylor":
            scores = taylor_scores(model, [layer for _, layer in layers], task.calibration, self.images, task.device)
        else:
            scores = [weight(layer).abs() for _, layer in layers]
        return [
            Weights(name, layer, each.masked_fill(weight(layer) == 0, GONE), smallest_allowed(layer, self.floor))
            for (name, layer), each in zip(layers, scores, strict=True)
        ]

    def _share(self, parts: list[Weights], own: Mapping[str, str]) -> None:
        """Decide how many zeros each gets; `own` has the key in `layers` of each site that has a share of its own."""
        if self.pattern:
            for part in parts:
                part.wanted, part.asked = part.total - int(self._left(part).sum()), self._amount
            return
        others = [part for part in parts if part.site not in own]
        for part in parts:
            if part.site in own:
                share_evenly([part], self.layers[own[part.site]], f"layers.{own[part.site]}")
        if others:
            (share_out if self.scope == "global" else share_evenly)(others, self._amount)

    def _left(self, part: Weights) -> torch.Tensor:
        chosen = (
            among_largest(part.scores, self.pattern) if self.pattern else kept(part.scores, part.total - part.wanted)
        )
        return chosen & (part.scores != GONE)

    def _mask(self, part: Weights, steps: int, every: int) -> None:
        masked, mask = MaskedWeight(), part.scores != GONE
        if steps:
            amounts = part.wanted / part.total, part.zeros / part.total
            masked = MaskedWeight(*amounts, self.schedule, steps, every, self.by, self.pattern)
        else:
            mask = self._left(part)
        put_mask(part.layer, masked, mask)

    def _refit(
        self, found: Mapping[str, nn.Module], model: nn.Module, before: nn.Module, task: Task, work: Work
    ) -> dict[str, tuple[float, float]]:
        """Solve the weights that are left, layer after layer; the output's relative errors before and after."""
        layers = {name: layer for name, layer in found.items() if isinstance(layer, nn.Conv2d | nn.Linear)}
        layers = {name: layer for name, layer in layers.items() if not why_not(layer)}
        calls = execution_order(model, dict(layers), task.example.to(task.device))
        images = plain_images(task.calibration, self.images, task.device)
        pairs, count = Pairs(model, before, images), sum(map(len, images))
        errors = {}
        work.progress.start("solve what is left", len(calls))
        for name, times in calls.items():
            work.progress.step(name)
            seen = pairs.of(layers[name], before.get_submodule(name), times)
            errors[name] = refit(layers[name], seen, times * count, self.ridge, name)
        work.progress.end()
        return errors

    def _not_refit(self, layer: nn.Module) -> str:
        if not self._refits:
            return ""
        return f"not solved anew: {why_not(layer) or 'never reached by the forward pass'}"

    def _said(self, parts: list[Weights], steps: int) -> str:
        total, now = sum(part.total for part in parts), sum(part.zeros for part in parts) / sum(p.total for p in parts)
        if steps:
            return f"from {now:.1%} zeros to {_share(parts):.1%} of {total} weights in {steps} steps, {self.schedule}"
        return f"{_share(parts):.1%} of {total} weights are zero" + (f" ({self.pattern})" if self.pattern else "")


def _share(parts: Collection[Weights]) -> float:
    return sum(part.wanted for part in parts) / max(1, sum(part.total for part in parts))


def _asked(parts: Collection[Weights]) -> float:
    return round(sum(part.asked * part.total for part in parts) / max(1, sum(part.total for part in parts)), 9)
