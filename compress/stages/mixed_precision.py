"""MixedPrecision: every layer's weights get as many bits as the network's answers need of them, within a budget.

What it does. Each layer's weights are rounded to each of `bits`, with all other layers in float, and the divergence of
the network's answers is measured on calibration images, beside the bytes that the layer then packs into. The budget is
shared out by these figures: the divergences of layers are taken to add up. Then the model is quantized as `Quantize`
does it, activations to `activation_bits`. The report has the table of sensitivities, and a plot.

When to use it, and when not. Where a file has to be smaller than 8 bits everywhere make it, and layers differ in what
they bear: mixed bits at the bytes of uniform 4 are better than uniform 4. Put `AdaRound` behind it, or fine-tune: what
it measures supposes weights that are rounded well (`adaptive: false` measures nearest rounding). It needs as many
evaluations of some hundred images as there are layers times `bits`.

Knobs. Exactly one budget: `like_bits`, as many bytes as uniform weights of so many bits pack into, fractions between
them; `budget_bytes`, for the packed weights of the layers it takes; `changed`, at most so many of a hundred answers to
validation images other than the base model's, before activations are rounded: top-1 cannot fall by more. `bits`: what
a layer may get, 2 to 8. `images`: calibration images that sensitivities are measured on. `activation_bits`, `observer`,
`percentile`, `calibration_images`, `learn`, `include`, `exclude`: as in `Quantize`.

Measured. Beside the same bits everywhere: `benchmarks/low_bits.py`, its table in benchmarks/README.md.

Reference. The sharing is our own; Dong et al., "HAWQ", ICCV 2019, allots bits by second derivatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.allocate import share_out
from compress.calibration import Ranges
from compress.errors import ConfigError
from compress.quantization import KINDS, Plan, WeightGrid, quantize
from compress.reconstruct import plain_images
from compress.rounding import weight_holder
from compress.sensitivity import Option, sensitivities, swapped
from compress.stage import Edit
from compress.task import Task, Work

VALIDATION = 2048  # images on which answers are counted
HALVINGS = 10  # of the budget's range, when it is looked for by changed answers

Table = dict[str, dict[int, Option]]


@dataclass(frozen=True)
class MixedPrecision:
    """Settings of the stage; see the module's card."""

    like_bits: float | None = None
    budget_bytes: int | None = None
    changed: float | None = None
    bits: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6, 8])
    adaptive: bool = True
    images: int = 256
    activation_bits: int | None = 8
    observer: str = "histogram"
    percentile: float = 99.99
    learn: bool = False
    calibration_images: int = 1024
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "quantize"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = KINDS
    ours: ClassVar[bool] = True

    def __post_init__(self) -> None:
        budgets = {name: getattr(self, name) for name in ("like_bits", "budget_bytes", "changed")}
        given = [name for name, value in budgets.items() if value is not None]
        if len(given) != 1:
            said = " and ".join(f"`{name}`" for name in given) or "none"
            raise ConfigError(f"exactly one of `like_bits`, `budget_bytes` and `changed` must be given, not {said}.")
        if not self.bits or len(set(self.bits)) != len(self.bits) or not all(2 <= b <= 8 for b in self.bits):
            raise ConfigError(f"`bits` (={self.bits}) must be different numbers between 2 and 8.")
        low, high = min(self.bits), max(self.bits)
        if self.like_bits is not None and not low <= self.like_bits <= high:
            raise ConfigError(f"`like_bits` (={self.like_bits}) must lie between {low} and {high}, the ends of `bits`.")
        if self.changed is not None and not 0 < self.changed <= 100:
            raise ConfigError(f"`changed` (={self.changed}) must be above 0 and at most 100: answers of a hundred.")
        if self.activation_bits is not None and not 2 <= self.activation_bits <= 8:
            raise ConfigError(f"`activation_bits` (={self.activation_bits}) must be between 2 and 8, or null.")
        self._ranges()  # checks its own settings
        for name in ("budget_bytes", "images"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"`{name}` (={getattr(self, name)}) must be at least 1.")

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        grid = WeightGrid(range="mse", learn=self.learn)
        told: dict[str, Any] = {}

        def weight_bits(names: list[str]) -> Mapping[str, int]:
            # Called once batch norm is folded: `model` is then what will be quantized.
            layers = {name: model.get_submodule(name) for name in names}
            images = plain_images(task.calibration, self.images, task.device)
            table = sensitivities(model, layers, sorted(self.bits), grid, self.adaptive, images, work.progress)
            taken, requested = self._shared_out(model, layers, table, task)
            told["sensitivity"] = {
                name: {str(b): {"bytes": o.cost, "divergence": round(o.harm, 6)} for b, o in options.items()}
                for name, options in table.items()
            }
            told["requested"] = requested
            told["weight_bytes"] = sum(table[name][b].cost for name, b in taken.items())
            return taken

        inputs = self.activation_bits or 8
        plan = Plan(
            grid,
            self._ranges() if self.activation_bits is not None else None,
            weight_bits,
            lambda names: dict.fromkeys(names, inputs),
            inputs,
            self.learn,
            self.include,
            self.exclude,
        )
        edit = quantize(model, task, work, plan)
        return replace(edit, notes={**edit.notes, **told})

    def _ranges(self) -> Ranges:
        return Ranges(self.observer, self.percentile, False, self.calibration_images)

    def _shared_out(
        self, model: nn.Module, layers: Mapping[str, nn.Module], table: Table, task: Task
    ) -> tuple[dict[str, int], dict[str, float]]:
        """Bits by layer, and what was asked for."""
        if self.changed is not None:
            return self._by_answers(model, layers, table, task), {"changed_percent": self.changed}
        if self.budget_bytes is not None:
            least = sum(min(option.cost for option in options.values()) for options in table.values())
            if self.budget_bytes < least:
                raise ConfigError(
                    f"`budget_bytes` (={self.budget_bytes}) must be at least {least}: so much take "
                    f"{min(self.bits)} bits everywhere; raise it, or allow fewer `bits`."
                )
            return _within(table, self.budget_bytes), {"bytes": self.budget_bytes}
        budget = self._uniform(table)
        return _within(table, budget), {"bytes": budget}

    def _uniform(self, table: Table) -> int:
        """How many bytes weights of `like_bits` everywhere pack into; between two of `bits` linearly."""
        assert self.like_bits is not None
        below = max(bits for bits in self.bits if bits <= self.like_bits)
        above = min(bits for bits in self.bits if bits >= self.like_bits)
        low, high = (sum(options[bits].cost for options in table.values()) for bits in (below, above))
        share = (self.like_bits - below) / max(above - below, 1)
        return int(low + share * (high - low))

    def _by_answers(
        self, model: nn.Module, layers: Mapping[str, nn.Module], table: Table, task: Task
    ) -> dict[str, int]:
        """The fewest bytes, found by halving, at which few enough answers to validation images change."""
        assert self.changed is not None
        images = plain_images(task.val, VALIDATION, task.device)
        before = _answers(model, images)
        low, high = (sum(pick(o.cost for o in each.values()) for each in table.values()) for pick in (min, max))
        best = {name: max(options) for name, options in table.items()}
        least = self._changed(model, layers, table, best, images, before)
        if least > self.changed:
            raise ConfigError(
                f"`changed` (={self.changed}) must be at least {least:.3g}: so many of a hundred answers change with "
                f"{max(self.bits)} bits everywhere."
            )
        for _ in range(HALVINGS):
            middle = (low + high) // 2
            tried = _within(table, middle)
            if self._changed(model, layers, table, tried, images, before) <= self.changed:
                best, high = tried, middle
            else:
                low = middle
        return best

    def _changed(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        table: Table,
        taken: Mapping[str, int],
        images: list[Tensor],
        before: Tensor,
    ) -> float:
        """How many of a hundred answers change with these bits."""
        values = {}
        for name, bits in taken.items():
            holder = weight_holder(layers[name])
            assert holder is not None
            values[holder] = (table[name][bits].weight, table[name][bits].bias)
        with swapped(values):
            return 100 * float((_answers(model, images) != before).float().mean())


def _within(table: Table, budget: int) -> dict[str, int]:
    """Bits by layer that fit into so many bytes."""
    numbers = {name: list(options) for name, options in table.items()}
    choices = {name: [option.choice for option in options.values()] for name, options in table.items()}
    return {name: numbers[name][index] for name, index in share_out(choices, budget).items()}


def _answers(model: nn.Module, images: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch).argmax(1) for batch in images])
