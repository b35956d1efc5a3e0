"""ReestimateBatchNorm: batch norms measure again what they normalise by.

What it does. The running mean and variance of each batch norm are replaced by the average over batches of plain
training images, without training: no weight changes, dropout stays off, and nothing is augmented. All norms are
measured in the same passes and normalise by their batch meanwhile, as in training, so a later one sees what the batch
statistics of the earlier ones make.

When to use it, and when not. After a change of weights or structure that no training follows: the activations of the
changed network have another mean and variance than those that were stored, and putting this right is often most of what
a short fine-tuning does. `FineTune` keeps them up to date by itself. Put it before `FoldBatchNorm`, `Equalize` and
`Quantize`, which fold the norms away. Networks whose file has the statistics merged into scale and bias (the published
Active Shift networks: mean 0, variance 1) must do without it: their weights were not trained with anything else.

Knobs. `images`: over how many calibration images; `data.calibration_images` has to allow for them. `include`,
`exclude`: norms by name pattern; those left out normalise by what they have.

Measured. Not yet measured.

Reference. Sun et al., "Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks", NeurIPS
2019 (re-tuning the statistics); Wu & Johnson, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576 (precise statistics).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from compress.errors import ConfigError, DataError
from compress.reconstruct import execution_order, plain_images
from compress.stage import Edit, Site
from compress.surgery import describe, layers, matching, require_change
from compress.task import Task, Work


@dataclass(frozen=True)
class ReestimateBatchNorm:
    """Settings of the stage; see the module's card."""

    images: int = 1024
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "correct"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.BatchNorm2d, nn.BatchNorm1d)

    def __post_init__(self) -> None:
        if self.images < 2:
            raise ConfigError(f"`images` (={self.images}) must be at least 2: one has no variance.")

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        found = layers(model, self.kinds)
        kept = matching(list(found), self.include, self.exclude)
        if not found:
            raise ConfigError(
                "the model has no batch norm; put `ReestimateBatchNorm` before `FoldBatchNorm`, `Equalize` and "
                "`Quantize`, which fold it into the convolutions."
            )
        was_training = model.training
        model.eval()
        reached = execution_order(model, found, task.example.to(task.device))
        for name, norm in found.items():
            kept[name] = (
                kept[name] or _why_kept(norm) or ("" if name in reached else "never reached by the forward pass")
            )
        taken = {name: norm for name, norm in found.items() if not kept[name]}
        sites = tuple(
            Site(name, describe(norm), None if kept[name] else "statistics measured again", kept[name])
            for name, norm in found.items()
        )
        require_change(sites)
        before = {name: _statistics(norm) for name, norm in taken.items()}
        images = self._measure(model, taken, task, work)
        notes: dict[str, Any] = {"images": images, "moved": _moved(before, taken)}
        return Edit(model.train(was_training), sites, notes)

    def _measure(self, model: nn.Module, norms: dict[str, nn.Module], task: Task, work: Work) -> int:
        """Average over batches of about the same size, which all count alike; gives back the number of images."""
        batches = plain_images(task.calibration, self.images, task.device)
        images = torch.cat(batches)
        momenta = {name: norm.momentum for name, norm in norms.items()}
        for norm in norms.values():
            norm.reset_running_stats()  # type: ignore[operator]  # a method of batch norms
            norm.momentum = None  # type: ignore[assignment]  # the plain average, by torch's contract
            norm.train()
        work.progress.start("batch norm", len(batches))
        with torch.no_grad():
            for part in images.tensor_split(len(batches)):
                model(part)
                work.progress.step()
        work.progress.end()
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            norm.eval()
            if not all(bool(torch.isfinite(values).all()) for values in _statistics(norm)):
                raise DataError(f"{name} met NaN or infinity; the model's weights or the images are broken.")
        return len(images)


def _why_kept(norm: nn.Module) -> str:
    assert isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d)
    if norm.running_mean is None:
        return "it has no running statistics: it normalises every batch by its own"
    if any(not parameter.requires_grad for parameter in norm.parameters()):
        return "it is frozen: its scale or bias does not train"
    return ""


def _statistics(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(norm.running_mean, torch.Tensor) and isinstance(norm.running_var, torch.Tensor)
    return norm.running_mean.clone(), norm.running_var.clone()


def _moved(before: dict[str, tuple[torch.Tensor, torch.Tensor]], norms: dict[str, nn.Module]) -> dict[str, Any]:
    """By norm, the mean over channels: how far the mean moved, in old standard deviations; new over old deviation."""
    told = {}
    for name, (mean, variance) in before.items():
        new_mean, new_variance = _statistics(norms[name])
        eps = float(norms[name].eps)  # type: ignore[arg-type]  # a number, in batch norms
        shift = (new_mean - mean).abs() * (variance + eps).rsqrt()
        ratio = ((new_variance + eps) / (variance + eps)).sqrt()
        told[name] = {"mean_shift": round(float(shift.mean()), 4), "deviation_ratio": round(float(ratio.mean()), 4)}
    return told
