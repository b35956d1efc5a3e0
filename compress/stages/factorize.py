"""Factorize: convolutions and linear layers become a few thin ones in a row.

What it does. Each layer is replaced by a product of smaller ones with nothing between them: `tucker`, 1x1 then k x k
then 1x1 convolutions; `svd`, k x k to a few channels, then 1x1; `spatial`, k x 1 then 1 x k; `cp`, 1x1, k x 1, 1 x k
and 1x1, the middle two each channel alone. 1x1 convolutions and linear layers become two by any of them. The start is
orthogonal iteration (tensorly) on the kernel that is best for the activations; then all factors are solved in turn by
least squares against the original layer's output, on what the network as compressed so far gives it. At full rank the
layer is exactly the old one.

When to use it, and when not. It buys weights and multiply-adds. Several thin layers are not always faster than one:
`gate: latency` keeps those that are slower. Small CIFAR networks are nearly of full rank, so at half the weights expect
to fine-tune. Ranks by `vbmf` without `weaken` cut deep. Exclude the first layer and a small classifier.

Knobs. `method`: the form. Exactly one of these says how low the ranks are: `ratio`, the share of each layer's own
weights that may be left; `energy`, the share of squared singular values kept; `vbmf`, what stands out of the noise,
with `weaken` (1: pure; MUSCO's 0.8) and `min_rank`; `ranks`, by name pattern, for tucker [in, out], else [rank], of one
group; or a share of the whole model's cost to come down to: `macs`, `params`, `bytes` (in memory), or `latency` in the
target runtime, for one image (MACs are lowered by tenths until the measured time is reached), shared out by what the
loss of rank in each layer does to the network's logits, to first order, on 96 images. `cp` takes `ratio` or `ranks`.
`multiple`: ranks are multiples of it, or a layer's own channels. `refine: false`: the decomposition of the weights
alone. `rounds`: how often, at most, the factors are solved in turn. `images`, `ridge`: what the fit is made on, and how
much it pulls to zero. `gate`: none, macs, bytes or latency: layers that do not get cheaper are kept.

Measured. Before training, by each way to the ranks: `benchmarks/surgery.py`. ResNet-20 on CIFAR-10 (91.73 %): recipe
`tucker`, half the MACs, 90.92 %, and no faster in onnxruntime (1.07 of the time for one image on 2 cores); with `gate:
latency`, which keeps what is no faster, 0.88 of the MACs in 0.93 of the time at 91.92 %.

Reference. Kim et al., ICLR 2016 (Tucker-2, VBMF); Gusak et al., MUSCO, ICCVW 2019; Jaderberg et al., BMVC 2014;
Lebedev et al., ICLR 2015; Zhang et al., TPAMI 2016 (low rank by regression on responses).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from compress.errors import ConfigError, DataError
from compress.lowrank.budget import RankCosts
from compress.lowrank.factors import MOST_FEATURES, Problem, Ranks, Shape
from compress.lowrank.fit import as_linear, empty, fit
from compress.lowrank.harm import harms
from compress.lowrank.ranks import Basis, allowed, best, by_energy, by_vbmf, costs, kept, rounded
from compress.measure import counted
from compress.reconstruct import Normal, execution_order, plain_images
from compress.stage import Edit, Keep, Site
from compress.substitute import Old, Substitution, as_convolution, check_settings, require_own_weights, substitute
from compress.surgery import by_pattern, layers, left_out
from compress.surgery import replace as put
from compress.task import Task, Work
from compress.time_budget import reached_in_time

METHODS = ("tucker", "svd", "spatial", "cp")
BUDGETS = ("macs", "params", "bytes", "latency")
WAYS = ("ratio", "energy", "vbmf", "ranks", *BUDGETS)
JUDGES = 96  # images on which lower ranks are judged when a budget is shared out
ROWS = 24  # for each weight of an output: more change nothing but the time


@dataclass(frozen=True)
class Factorize(Substitution):
    """Settings of the stage; see the module's card."""

    method: str = "tucker"
    ratio: float | None = None
    energy: float | None = None
    vbmf: bool = False
    weaken: float = 1.0
    min_rank: int = 1
    ranks: dict[str, list[int]] = field(default_factory=dict)
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    multiple: int = 1
    refine: bool = True
    rounds: int = 5
    images: int = field(default=512, kw_only=True)

    kind: ClassVar[str] = "factorize"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)

    def __post_init__(self) -> None:
        check_settings(self, min_rank=1, multiple=1, rounds=0)
        if self.method not in METHODS:
            raise ConfigError(f"`method` (={self.method!r}) must be one of {', '.join(METHODS)}.")
        given = self._ways()
        if len(given) != 1:
            said = " and ".join(f"`{way}`" for way in given) or "none"
            raise ConfigError(f"exactly one of {', '.join(f'`{way}`' for way in WAYS)} must be given, not {said}.")
        if self.method == "cp" and self.way not in ("ratio", "ranks"):
            raise ConfigError(f"`{self.way}` cuts what is nested, which `method: cp` is not; give `ratio` or `ranks`.")
        value = getattr(self, self.way)
        if isinstance(value, float | int) and not isinstance(value, bool) and not 0 < value < 1:
            raise ConfigError(f"`{self.way}` (={value}) must be a share, above 0 and below 1.")
        if self.latency is not None and self.gate != "none":
            raise ConfigError(
                f"`gate` (={self.gate}) would keep layers after the time for `latency` (={self.latency}) was measured "
                "without them; drop one of the two."
            )
        if not 0 < self.weaken <= 1:
            raise ConfigError(f"`weaken` (={self.weaken}) must be above 0, which cuts nothing, and at most 1.")
        if not self.vbmf and (self.weaken != 1 or self.min_rank != 1):
            raise ConfigError("`weaken` and `min_rank` belong to `vbmf`; set `vbmf: true` or leave them out.")

    @property
    def way(self) -> str:
        """Which of the ways to the ranks is given."""
        return self._ways()[0]

    def _ways(self) -> list[str]:
        settings = {way: getattr(self, way) for way in WAYS}
        return [way for way, value in settings.items() if value is not None and value is not False and value != {}]

    def check(self, model: nn.Module) -> None:
        """Raise `ConfigError` for patterns that match nothing, and for ranks of wrong number or that are too high.

        Also for weights that are pruned, clustered or quantized already.
        """
        require_own_weights(model, self, self.kinds)
        found = layers(model, self.kinds)
        reasons = left_out(model, found, self.include, self.exclude)
        for name, pattern in by_pattern("ranks", self.ranks, list(found)).items():
            if not reasons[name]:
                self._given(name, pattern, Shape.of(as_convolution(found[name]), self.method))

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        self.check(model)
        found = layers(model, self.kinds)
        for name, why in left_out(model, found, self.include, self.exclude).items():
            if not why and not all(bool(parameter.isfinite().all()) for parameter in found[name].parameters()):
                raise DataError(f"the weights of `{name}` hold NaN or infinity; they cannot be factorized.")
        example = task.example.to(task.device)
        before = counted(model, example)
        by_name = by_pattern("ranks", self.ranks, list(found))
        shared, reached = self._shared_out(model, task, work) if self.way in BUDGETS else ({}, {})

        def start(old: Old) -> tuple[nn.Module, float]:
            shape = Shape.of(old.layer, self.method)
            if self.ranks and old.name not in by_name:
                raise Keep("no pattern of `ranks` matches it")
            if old.name in shared and shared[old.name] is None:
                raise Keep("within the budget as it is")
            if self.ranks:
                return self._start(old, shape, self._given(old.name, by_name[old.name], shape))
            return self._start(old, shape, shared.get(old.name) or self._by_weights(old, shape))

        edit = substitute(model, task, work, self, start, {"method": self.method}, self.kinds)
        after = counted(edit.model, example)
        made = {site.name: edit.model.get_submodule(site.name) for site in edit.sites if site.after is not None}
        told: dict[str, Any] = {
            "ranks": {name: list(getattr(new, "ranks", ())) or [new.rank] for name, new in made.items()},
            "requested": {self.way: getattr(self, self.way)},
            "achieved": {unit: round(after[unit] / before[unit], 4) for unit in before},
            **reached,
        }
        sites = tuple(self._told(site, found[site.name]) for site in edit.sites)
        return replace(edit, sites=sites, notes={**edit.notes, **told})

    def _told(self, site: Site, layer: nn.Module) -> Site:
        """The site, with a word where the layer was too wide to be fitted to what it sees."""
        features = Shape.of(as_convolution(layer), self.method).features
        if site.after is None or not self.refine or features <= MOST_FEATURES:
            return site
        return replace(site, why=f"fitted to its weights alone: {features} weights for each output are too many")

    def _start(self, old: Old, shape: Shape, ranks: Ranks | None) -> tuple[nn.Module, float]:
        if ranks is not None:
            self._require_smaller(old.layer, shape, ranks)
        solved = self.refine and shape.features <= MOST_FEATURES
        normal = old.normal(ROWS * shape.features) if solved else None
        if ranks is None:
            ranks = self._by_ratio(old.layer, shape, normal)
        new, error = fit(old.layer, normal, self.method, ranks, self.ridge, self.rounds)
        return (new if old.module is old.layer else as_linear(new)), error

    def _given(self, name: str, pattern: str, shape: Shape) -> Ranks:
        """The ranks that `ranks` says for a layer."""
        ranks, wanted = self.ranks[pattern], sum(shape.free)
        if len(ranks) != wanted:
            raise ConfigError(f"`ranks.{pattern}` (={ranks}) must be {wanted} for {name or 'the model itself'}.")
        rest = iter(ranks)
        first, last = (next(rest) if free else most for free, most in zip(shape.free, shape.most, strict=True))
        cp = self.method == "cp" and shape.positions > 1
        for rank, most in ((first, shape.channels), (last, shape.outputs)):
            if rank < 1 or (rank > most and not cp):
                where = name or "the model itself"
                raise ConfigError(f"`ranks.{pattern}` (={ranks}) must be between 1 and {most}, what {where} has.")
        if not cp and not shape.fits((first, last)):
            least = -(-max(first, last) // shape.positions)
            raise ConfigError(f"`ranks.{pattern}` (={ranks}) is of no use: the lower one must be at least {least}.")
        return first, last

    def _by_weights(self, old: Old, shape: Shape) -> Ranks | None:
        """The ranks by energy or noise of the layer's own weights; None: it takes the data to say."""
        found: Ranks | None = None
        if self.energy is not None:
            found = by_energy(shape.kernel(old.layer), shape, self.energy)
        elif self.vbmf:
            found = by_vbmf(shape.kernel(old.layer), shape, self.weaken, self.min_rank)
            if found is None:
                raise Keep("no singular value stands out of the noise")
        return None if found is None else rounded(found, shape, self.multiple)

    def _by_ratio(self, layer: nn.Conv2d, shape: Shape, normal: Normal | None) -> Ranks:
        """The ranks within `ratio` of the layer's weights that keep most of what it gives."""
        assert self.ratio is not None
        if self._is_cp(layer):
            rank = int(self.ratio * shape.weights / _cp_weights(layer, shape, 1))
            rank = rank // self.multiple * self.multiple
            if rank:
                return shape.channels, rank
            raise Keep(f"rank {self.multiple} already holds more than `ratio` (={self.ratio}) of its weights")
        kernels = shape.kernel(layer)
        if normal is None:
            score = torch.stack([Basis.of(kernel, shape).kept for kernel in kernels]).sum(0)
        else:
            score = kept([Problem.of(normal, group, shape, self.ridge) for group in range(shape.groups)])
        cost, may = costs(shape), allowed(shape, self.multiple)
        found = best(shape, score, cost, may, self.ratio * shape.weights)
        if found is None:
            least = f"{int(cost[may].min()):,}" if bool(may.any()) else "no fewer"
            raise Keep(f"the lowest ranks already hold {least} of its {shape.weights:,} weights")
        return found

    def _require_smaller(self, layer: nn.Conv2d, shape: Shape, ranks: Ranks) -> None:
        after = _cp_weights(layer, shape, ranks[1]) if self._is_cp(layer) else sum(shape.parts(ranks))
        if after >= shape.weights:
            free = [rank for rank, may in zip(ranks, shape.free, strict=True) if may]
            raise Keep(f"rank {'+'.join(map(str, free))} has no fewer weights: {shape.weights:,} -> {after:,}")

    def _is_cp(self, layer: nn.Conv2d) -> bool:
        return self.method == "cp" and math.prod(layer.kernel_size) > 1

    def _shared_out(self, model: nn.Module, task: Task, work: Work) -> tuple[dict[str, Ranks | None], dict[str, Any]]:
        """Ranks for each layer (None: as it is) that bring the model down to its budget with the least harm; notes."""
        found = layers(model, self.kinds)
        reasons = left_out(model, found, self.include, self.exclude)
        example = task.example.to(task.device)
        reached = execution_order(model, found, example)
        chosen = {name: layer for name, layer in found.items() if name in reached and not reasons[name]}
        if not chosen:
            return {}, {}
        was_training = model.training
        model.eval()
        unit, share = "macs" if self.way == "latency" else self.way, float(getattr(self, self.way))
        costs = RankCosts.of(model, chosen, self.method, unit, self.multiple, example)
        if self.way != "latency":
            costs.require(self.way, share)
        images = plain_images(task.calibration, JUDGES, task.device)
        harm = harms(model, chosen, self.method, images, work.seed(task.seed, "ranks"))

        def made(share: float) -> tuple[Any, Callable[[], nn.Module]]:
            ranks = costs.shared(harm, share)
            return ranks, lambda: self._unsolved(model, ranks)

        told: dict[str, Any] = {}
        if self.way == "latency":
            limits = f"`multiple` (={self.multiple}) and the lowest ranks"
            share, told = reached_in_time(model, made, costs.least / costs.total, limits, share, task, work)
        model.train(was_training)
        return costs.shared(harm, share), told

    def _unsolved(self, model: nn.Module, ranks: Mapping[str, Ranks | None]) -> nn.Module:
        """The model with layers of these ranks whose weights are any."""
        thin = copy.deepcopy(model)
        for name, each in ranks.items():
            if each is not None:
                old = thin.get_submodule(name)
                with torch.random.fork_rng(devices=[]):
                    new = empty(as_convolution(old), self.method, each)
                layer = new if isinstance(old, nn.Conv2d) else as_linear(new)
                thin = put(thin, old, layer.to(next(old.parameters())).eval())
        return thin


def _cp_weights(layer: nn.Conv2d, shape: Shape, rank: int) -> int:
    return shape.groups * rank * (shape.channels + sum(layer.kernel_size) + shape.outputs)
