"""What a stage is, what it hands back, and in which order stages may stand.

A stage takes a model and gives back a model that does the same job with less. It is a frozen dataclass whose fields
are its settings; calling it does the work. Stages know nothing of each other: what must hold between them is the
order table below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import nn

    from compress.task import Task, Work

Json = None | bool | int | float | str | list[Any] | dict[str, Any]


class Keep(Exception):
    """Raised by a surgery rule to leave a module as it was; the text is the reason that the report shows."""


@dataclass(frozen=True)
class Site:
    """A module that a stage looked at: changed (`after` is set), or kept as it was for the reason `why`."""

    name: str
    before: str
    after: str | None
    why: str = ""


@dataclass(frozen=True)
class Edit:
    """What a stage hands back: the model to go on with, every module it looked at, what else it decided."""

    model: nn.Module
    sites: tuple[Site, ...] = ()
    notes: Mapping[str, Json] = field(default_factory=dict)


@runtime_checkable
class Stage(Protocol):
    """A frozen dataclass of settings; calling it compresses (or trains) `model` for `task`.

    `kind` is its row in the order table. A stage may also say which it `needs`: names of stages of which one has to
    stand before it; that it `trains`, for so many `epochs`; and how many `training_epochs` have to follow it. The given
    model may be edited in place; the returned one is the one to use.
    """

    kind: ClassVar[str]

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit: ...


LEGAL = ""
_QUANTIZED = "a quantized layer's integers belong to the weights it was calibrated with; move it before `{later}`"
_CLUSTERED = (
    "clustered weights share one table of values in a layer, which it would tear apart; move it before `{later}`"
)
_PRUNED = "pruned weights stay zero, which what it computes anew would not; move it before `{later}`"
_TWICE = "the model is quantized already; keep one of the two"
_TWICE_CLUSTERED = "the weights are clustered already; keep one of the two"

KINDS = (
    *("substitute", "factorize", "channels", "prune", "fold", "equalize", "cluster", "quantize", "correct", "finetune"),
)
_REFUSED = {
    "prune": dict.fromkeys(("substitute", "factorize"), _PRUNED),
    "cluster": {
        **dict.fromkeys(("substitute", "factorize", "channels", "prune", "equalize"), _CLUSTERED),
        "cluster": _TWICE_CLUSTERED,
    },
    "quantize": {
        **dict.fromkeys(KINDS[: KINDS.index("quantize")], _QUANTIZED),
        "quantize": _TWICE,
    },
}
# ORDER[earlier][later]: LEGAL, or why `later` may not come at any time after `earlier`.
ORDER: dict[str, dict[str, str]] = {
    earlier: {later: _REFUSED.get(earlier, {}).get(later, LEGAL) for later in KINDS} for earlier in KINDS
}


RESERVED = ("base", "result")


def order_problems(stages: Mapping[str, Stage]) -> list[str]:
    """Every pair of stages that stands in an order which makes no sense, and every schedule without the training that
    it needs, as sentences. Empty when all is well."""
    names = list(stages)
    problems = [
        f"`stages.{name}` needs another name: the table has a row of its own called {name}."
        for name in RESERVED
        if name in stages
    ]
    for i, earlier in enumerate(names):
        for later in names[i + 1 :]:
            reason = ORDER[stages[earlier].kind][stages[later].kind]
            if reason:
                problems.append(
                    f"`stages.{later}` ({type(stages[later]).__name__}) cannot come after `stages.{earlier}` "
                    f"({type(stages[earlier]).__name__}): {reason.format(later=earlier)}."
                )
        needed = getattr(stages[earlier], "training_epochs", 0)
        behind = [stages[name] for name in names[i + 1 :]]
        trained = sum(getattr(later, "epochs", 0) for later in behind if getattr(later, "trains", False))
        if needed > trained:
            problems.append(
                f"`stages.{earlier}.epochs` (={needed}) is the length of a schedule that training carries out, and the "
                f"stages behind it train {trained} epochs; lower it, train longer, or take `schedule: one_shot`."
            )
    return problems


def missing_problems(stages: Mapping[str, Stage]) -> list[str]:
    """Every stage before which none of those stands that it needs, as sentences. Empty when all is well."""
    problems = []
    before: set[str] = set()
    for name, stage in stages.items():
        needs = getattr(stage, "needs", ())
        if needs and not before.intersection(needs):
            wanted = " or ".join(f"`{each}`" for each in needs)
            problems.append(f"`stages.{name}` ({type(stage).__name__}) needs {wanted} before it; put one there.")
        before.add(type(stage).__name__)
    return problems
