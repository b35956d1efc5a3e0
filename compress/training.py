"""How a network is trained: the settings of every stage that trains, their checks, and who is learned from."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress import checkpoint
from compress.errors import ConfigError
from compress.lower.fold import fold_batch_norm
from compress.surgery import kind
from compress.task import Task

SCHEDULES = ("cosine", "step")
AUTOCAST = (nn.Conv2d, nn.Linear)  # what autocast computes in bfloat16, casting its weights each time


@dataclass(frozen=True)
class Training:
    """Settings of `train.fit`; the card of `FineTune` explains them."""

    epochs: int = 10
    lr: float = 0.05
    optimizer: str = "sgd"
    schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: float = 0.25
    label_smoothing: float = 0.0
    mixup: float = 0.0
    distill: float = 0.0
    temperature: float = 4.0
    clip: float = 0.0
    average: float = 0.0
    keep: str = "last"
    batch_norm: str = "train"
    teacher: str = ""
    compile: bool = False

    files: ClassVar[tuple[str, ...]] = ("teacher",)  # settings that name files, whose content counts
    trains: ClassVar[bool] = True


def training_problems(settings: Training) -> list[str]:
    """What makes no sense in these settings, as sentences. Empty when all is well."""
    problems = []
    if settings.epochs < 1:
        problems.append(f"`epochs` (={settings.epochs}) must be at least 1; to train nothing, leave the stage out.")
    for name, low, high in (
        ("lr", 0.0, math.inf),
        ("momentum", 0.0, 1.0),
        ("weight_decay", 0.0, math.inf),
        ("warmup_epochs", 0.0, float(max(settings.epochs, 1))),
        ("label_smoothing", 0.0, 1.0),
        ("mixup", 0.0, math.inf),
        ("distill", 0.0, 1.0),
        ("temperature", 0.0, math.inf),
        ("clip", 0.0, math.inf),
        ("average", 0.0, 1.0),
    ):
        value = getattr(settings, name)
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
        if getattr(settings, name) not in known:
            problems.append(f"`{name}` (={getattr(settings, name)}) must be one of {', '.join(known)}.")
    if settings.teacher and not settings.distill:
        problems.append(f"`teacher` (={settings.teacher}) has no say with `distill: 0`; raise it, or drop `teacher`.")
    if settings.teacher and not Path(settings.teacher).is_file():
        problems.append(f"`teacher` (={settings.teacher}) must be a checkpoint, and there is no such file.")
    return problems


def mixed(x: Tensor, y: Tensor, classes: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Each image laid over another of the batch, its share drawn once from Beta(alpha, alpha); labels (N, classes).

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018.
    """
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    labels = F.one_hot(y, classes).float()
    return x.lerp(x.flip(0), 1 - share), labels.lerp(labels.flip(0), 1 - share)


def teacher_of(settings: Training, task: Task) -> nn.Module | None:
    """Who is learned from: the network of the checkpoint `teacher`, else the base (None: there is none).

    Raises:
        ConfigError: the checkpoint's network wants other images, or tells other classes apart.
    """
    if not settings.teacher:
        return task.teacher
    teacher = checkpoint.load(settings.teacher).requires_grad_(False)
    given = f"`teacher` (={settings.teacher})"
    if teacher.input != task.input:
        raise ConfigError(
            f"{given} must take its images as this network does; it takes {teacher.input}, this one {dict(task.input)}."
        )
    with torch.no_grad():
        classes = teacher(task.example[:1].cpu()).shape[1]
    if classes != task.classes:
        raise ConfigError(f"{given} must tell {task.classes} classes apart, as the data does; it has {classes}.")
    return teacher


def answering(teacher: nn.Module, task: Task) -> nn.Module:
    """The teacher on the task's device. On a GPU, where each kernel counts, norms are folded and weights cast once."""
    if task.device.type == "cpu" or task.precision == "float32":
        return teacher.to(task.device)
    teacher = copy.deepcopy(teacher).to(task.device).eval()
    fold_batch_norm(teacher)
    plain = all(kind(module) in AUTOCAST for module in teacher.modules() if _holds(module))
    return teacher.bfloat16() if plain else teacher


def _holds(module: nn.Module) -> bool:
    """Whether a module has numbers of its own."""
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
