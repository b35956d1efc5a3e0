"""FineTune: train the model as it stands, between stages or after them.

What it does. Trains on the task's augmented images, with cross-entropy and, with `distill`, the base model's answers.
Rounding, displacements, masks and the like live in the layers, so that after `Quantize` this is quantization-aware
training.

When to use it, and when not. After every stage that costs accuracy. With 1,000 images and no labels to trust, use
`distill: 1`.

Knobs. `epochs`; `lr` (peak, after a linear warm-up over `warmup_epochs`); `schedule`: cosine (down to zero) or step (a
tenth after half of the epochs, a hundredth after three quarters: what papers before 2018 train with); `optimizer`: sgd
(Nesterov) or adamw; `weight_decay` (weights only); `label_smoothing`; `distill`: share of the loss that is the
divergence from the base's answers at `temperature`; `clip`: bound on the gradient's norm, 0 is off; `average`: decay of
a moving average of the weights, which is then what is kept, 0 is off; `keep`: last or best (on val); `batch_norm`:
train, or frozen, which computes with the stored statistics: for small batches, and for networks whose file has the
statistics merged into scale and bias (the published Active Shift networks). After `Quantize` batch norm is folded away,
and nothing holds the weights' scale any more: take `lr: 1e-3` or less, and `clip: 1`.

Measured. Throughput: `benchmarks/throughput.py`.

Reference. Distillation: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from compress.errors import ConfigError
from compress.lower.tensors import round_biases
from compress.stage import Edit
from compress.task import Task, Work
from compress.train import SCHEDULES, fit


@dataclass(frozen=True)
class FineTune:
    """Settings of the stage; see the module's card."""

    epochs: int = 10
    lr: float = 0.05
    optimizer: str = "sgd"
    schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: float = 0.25
    label_smoothing: float = 0.0
    distill: float = 0.0
    temperature: float = 4.0
    clip: float = 0.0
    average: float = 0.0
    keep: str = "last"
    batch_norm: str = "train"

    kind: ClassVar[str] = "finetune"

    def __post_init__(self) -> None:
        problems = []
        if self.epochs < 1:
            problems.append(f"`epochs` (={self.epochs}) must be at least 1; to train nothing, leave the stage out.")
        for name, low, high in (
            ("lr", 0.0, math.inf),
            ("momentum", 0.0, 1.0),
            ("weight_decay", 0.0, math.inf),
            ("warmup_epochs", 0.0, float(max(self.epochs, 1))),
            ("label_smoothing", 0.0, 1.0),
            ("distill", 0.0, 1.0),
            ("temperature", 0.0, math.inf),
            ("clip", 0.0, math.inf),
            ("average", 0.0, 1.0),
        ):
            value = getattr(self, name)
            above_zero = name in ("lr", "temperature")
            if not (math.isfinite(value) and low <= value <= high) or (above_zero and value == 0):
                rule = "above 0" if above_zero else f"between {low:g} and {high:g}" if high < math.inf else "0 or more"
                problems.append(f"`{name}` (={value}) must be {rule}.")
        choices = {
            "optimizer": ("sgd", "adamw"),
            "keep": ("last", "best"),
            "schedule": SCHEDULES,
            "batch_norm": ("train", "frozen"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                problems.append(f"`{name}` (={getattr(self, name)}) must be one of {', '.join(known)}.")
        if problems:
            raise ConfigError("\n".join(problems))

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        model, history = fit(model, task, work, self)
        round_biases(model)
        return Edit(model, notes={"history": list(history)})
