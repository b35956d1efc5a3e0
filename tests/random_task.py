"""A task of random images, and models whose batch norms have seen something, for tests that need no accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from compress.stage import Edit
from compress.stages.quantize import Quantize
from compress.task import Task, Work


class Images:
    """Random images in batches of 16."""

    def __init__(self, shape: tuple[int, ...], images: int = 48, broken: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(images, *shape, generator=generator)
        if broken:
            self.x[-1, 0, 0, 0] = float("nan")
        self.images = images

    def __len__(self) -> int:
        return -(-self.images // 16)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self.x.split(16):
            yield part, torch.zeros(len(part), dtype=torch.long)

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self)


def task(shape: tuple[int, ...] = (3, 16, 16), broken: bool = False) -> Task:
    data = Images(shape, broken=broken)
    return Task(data, data, data, data, data.x[:2], 10, {}, "random")


def warm(model: nn.Module, shape: tuple[int, ...] = (3, 16, 16)) -> nn.Module:
    """The model with batch norm statistics and affine parameters that are not the initial ones."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.2)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, *shape))
    return model.eval()


def quantize(model: nn.Module, tmp_path: Path, shape: tuple[int, ...] = (3, 16, 16), **settings: object) -> Edit:
    return Quantize(**settings)(model, task(shape), Work(tmp_path))
