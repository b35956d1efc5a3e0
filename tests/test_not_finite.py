"""NaN or infinity in images or weights: stages that solve for weights say where, and make nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import noise_task
from test_prune_shifts import shift
from torch import nn

from compress.errors import DataError
from compress.reconstruct import normal_equations, own_equations
from compress.stages import Prune, PruneChannels, PruneShifts
from compress.task import Task, Work


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(16, 3),
    ).eval()


def broken_image() -> Task:
    """With one pixel that is NaN, in an image that is not the example."""
    task: Any = noise_task()
    task.calibration.x[20, 0, 4, 4] = float("nan")
    return task  # type: ignore[no-any-return]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_equations_name_their_layer(value: float) -> None:
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)
    x[1, 2, 3, 3] = value
    pairs = [(x, layer(x).detach())]
    with pytest.raises(
        DataError, match=r"calibration met NaN or infinity at `Conv2d\(4, 6, 3x3\)`; the model's weights"
    ):
        normal_equations(layer, pairs, 2, bias=True)
    with pytest.raises(DataError, match="calibration met NaN or infinity at `stem`; the model's weights or the images"):
        normal_equations(layer, pairs, 2, bias=True, name="stem")
    with pytest.raises(DataError, match="calibration met NaN or infinity at `0`"):
        own_equations(nn.Sequential(layer), {"0": layer}, {"0": 1}, [x])


def test_prune(tmp_path: Path) -> None:
    model, work = net(), Work(tmp_path)
    with pytest.raises(DataError, match="calibration met NaN or infinity at `0`"):
        Prune(amount=0.5, images=32)(model, broken_image(), work)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    with pytest.raises(DataError, match="the gradients on calibration images hold NaN or infinity"):
        Prune(amount=0.5, by="taylor", refit=False, images=32)(net(), broken_image(), work)
    model = net()
    model[2].bias.data[0] = float("inf")
    with pytest.raises(DataError, match="calibration met NaN or infinity at `2`"):
        Prune(amount=0.5, images=32)(model, noise_task(), work)


def test_prune_channels(tmp_path: Path) -> None:
    work, plain = Work(tmp_path), {"by": "l1", "refit": False}
    with pytest.raises(DataError, match="calibration met NaN or infinity at `2`"):
        PruneChannels(macs=0.7, images=32)(net(), broken_image(), work)
    with pytest.raises(
        DataError, match="the network answers with NaN or infinity; its weights or the images are broken"
    ):
        PruneChannels(macs=0.7, images=32, **plain)(net(), broken_image(), work)  # type: ignore[arg-type]
    model = net()
    model[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="the network answers with NaN or infinity"):
        PruneChannels(macs=0.7, images=32, allocation="uniform", **plain)(model, noise_task(), work)  # type: ignore[arg-type]


def test_prune_shifts(tmp_path: Path) -> None:
    def shifted() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(shift([[(0, 1), (1, 0)]] * 8), nn.Flatten(), nn.LazyLinear(3)).eval()

    task = broken_image()
    model = shifted()
    model(task.example)
    with pytest.raises(DataError, match="calibration met NaN or infinity at `0`"):
        PruneShifts(amount=0.3, images=32)(model, task, Work(tmp_path))
    model[0].pointwise.weight.data[0] = float("nan")
    with pytest.raises(DataError, match="the weights of `0` hold NaN or infinity; they cannot be weighed"):
        PruneShifts(amount=0.3, images=32)(model, noise_task(), Work(tmp_path))
