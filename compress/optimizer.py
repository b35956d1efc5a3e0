"""The optimizer of a training run: how parameters are grouped, and how the learning rate goes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from compress.training import Training


def schedule(epoch: float, settings: Training) -> float:
    """Factor on the learning rate: linear warm-up, then half a cosine down to zero, or two steps down."""
    if epoch < settings.warmup_epochs:
        return (epoch + 1e-2) / settings.warmup_epochs
    if settings.schedule == "step":
        return 0.1 ** sum(epoch >= share * settings.epochs for share in (0.5, 0.75))
    left = max(settings.epochs - settings.warmup_epochs, 1e-9)
    return (1 + math.cos(math.pi * (epoch - settings.warmup_epochs) / left)) / 2


def make(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum or AdamW; weights decay, vectors (biases, norms) do not, modules' own rules win."""
    rules: dict[int, dict[str, float]] = {}
    for module in model.modules():
        if hasattr(module, "parameter_rules"):
            for name, rule in module.parameter_rules().items():  # type: ignore[operator]  # ours
                rules[id(getattr(module, name))] = rule
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            rule = rules.get(id(parameter), {})
            decay = rule.get("weight_decay", settings.weight_decay if parameter.dim() > 1 else 0.0)
            groups.setdefault((rule.get("lr_scale", 1.0), decay), []).append(parameter)
    cuda = any(parameter.is_cuda for parameter in model.parameters())
    listed: list[dict[str, Any]] = []
    for (scale, decay), parameters in groups.items():
        # On a GPU a step may be recorded and replayed, so the rate has to be a number that lies there.
        lr: float | Tensor = settings.lr * scale
        lr = torch.tensor(lr, device=parameters[0].device) if cuda else lr
        listed.append({"params": parameters, "lr_scale": scale, "weight_decay": decay, "lr": lr})
    if settings.optimizer == "adamw":
        adamw: Any = torch.optim.AdamW(listed, fused=True, capturable=cuda)
        adamw._warned_capturable_if_run_uncaptured = True  # some steps are not recorded, and torch need not say so
        return adamw  # type: ignore[no-any-return]  # its flag is private
    momentum = settings.momentum
    return torch.optim.SGD(listed, lr=settings.lr, momentum=momentum, nesterov=momentum > 0, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own `lr_scale`."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * group["lr_scale"])
        else:
            group["lr"] = lr * group["lr_scale"]


def blend(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average a little towards the model; whole-number buffers are copied."""
    with torch.no_grad():
        for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs.to(mine.dtype), 1 - decay)
            else:
                mine.copy_(theirs)
