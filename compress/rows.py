"""A row of the table: what a model is after a step of a run, and how it answers beside the base."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress import measure
from compress.nn.displace import Shift2d
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight
from compress.nn.shift import ShiftConv2d
from compress.stage import Edit
from compress.store import Done
from compress.surgery import kind
from compress.task import Progress, Task
from compress.train import divergence, logits


@dataclass(frozen=True)
class Answers:
    """Which test images a model gets right (images,), and its logits on val (images, classes)."""

    correct: Tensor
    val: Tensor


def answers(model: nn.Module, task: Task, display: Progress, name: str) -> Answers:
    """Evaluate a model on test and val, in float32."""
    display.start(f"evaluate {name}", 2)
    outputs, labels = logits(model, task.test, task.device)
    display.step("test")
    val, _ = logits(model, task.val, task.device)
    display.step("val")
    display.end()
    return Answers(outputs.argmax(1) == labels, val)


def row(
    name: str, settings: dict[str, Any] | None, done: Done, mine: Answers, base: Answers, task: Task
) -> dict[str, Any]:
    """The row as plain JSON; `settings` are those of the stage that made the model, where one did.

    `base` are the base model's answers: the paired test, the agreement and the divergence are against them. The file's
    bytes and the latency are not known here.
    """
    model = done.edit.model
    profile = measure.profile(model, task.example.to(task.device))
    correct, total = int(mine.correct.sum()), len(mine.correct)
    notes = dict(done.edit.notes)
    history = notes.pop("history", [])
    compared: dict[str, Any] = {"paired": None, "agreement": None, "divergence": None}
    if mine is not base:
        same = mine.val.argmax(1) == base.val.argmax(1)
        compared = {
            "paired": measure.paired(base.correct, mine.correct),
            "agreement": float(same.float().mean()),
            "divergence": divergence(mine.val, base.val),
        }
    settings = dict(settings or {})
    return {
        "name": name,
        "stage": settings.pop("stage", "").rpartition(".")[2] or None,
        "settings": settings,
        "accuracy": {"correct": correct, "total": total, **measure.accuracy(correct, total)},
        **compared,
        "params": profile.params,
        "nonzero": profile.nonzero,
        "macs": profile.macs,
        "uncounted": list(profile.uncounted),
        "activation_bytes": profile.activation_bytes,
        "bytes": None,
        "file": None,
        "latency": None,
        "displacements": displacements(model),
        "energy_uj": measure.energy(profile, *_bits(model)).total_uj,
        "seconds": done.seconds,
        "cached": done.hit,
        "sites": [asdict(site) for site in done.edit.sites],
        "notes": notes,
        "history": history,
    }


def plain(model: nn.Module, seconds: float) -> Done:
    """A step that no stage made: the base with its weights, or the result as it loads."""
    return Done(Edit(model), "", seconds, False)


def displacements(model: nn.Module) -> dict[str, int] | None:
    """How many displacements the shift layers hold (`all`), and how many are `zero`; None without such a layer.

    Counted on the network as it is saved. Where displacements are rounded, a zero is one that rounds to zero on both
    axes, and the copies of a channel that met on one place are the one copy into which they are summed; elsewhere it is
    exactly zero. A copy whose weights are all zero, as those are that were left over when copies met, moves nothing
    wherever it stands: such copies are counted in `zero`, and how many there are is `empty`.
    """
    found = [module for module in model.modules() if kind(module) in (Shift2d, ShiftConv2d)]
    if not found:
        return None
    counts = {"all": 0, "zero": 0, "empty": 0}
    for layer in map(copy.deepcopy, found):
        assert isinstance(layer, Shift2d | ShiftConv2d)
        layer.eval().settle()
        moves = layer.displacement.detach().any(-1)
        empty = ~layer.carrying() if isinstance(layer, ShiftConv2d) else moves.new_zeros(moves.shape)
        counts["all"] += moves.numel()
        counts["zero"] += int((~moves | empty).sum())
        counts["empty"] += int(empty.sum())
    return counts


def _bits(model: nn.Module) -> tuple[int, int]:
    """Bits of the weights and of the activations, the widest of each; 32 as soon as one layer is in float."""
    weights, activations = [], [m.bits for m in model.modules() if isinstance(m, FakeQuantize)]
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            inside = module.modules() if parametrize.is_parametrized(module, "weight") else ()
            weights.append(next((part.bits for part in inside if isinstance(part, FakeQuantizeWeight)), 32))
    return max(weights, default=32), max(activations, default=32)
