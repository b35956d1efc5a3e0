"""Displacements that learned stop, and the layer computes what it did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from awkward import noise_task
from torch import nn

from compress.errors import ConfigError
from compress.nn.displace import Shift2d
from compress.nn.shift import ShiftConv2d
from compress.stages import FineTune, FreezeShifts
from compress.task import Work


@pytest.mark.parametrize("quantize", [True, False])
def test_frozen_layers_compute_the_same_and_move_no_more(quantize: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        ShiftConv2d(8, 8, 3, 3, padding=1, learn=True, quantize=quantize, lr_scale=1.0),
        Shift2d(8, 5, start="random", learn=True, quantize=quantize, lr_scale=1.0),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    ).eval()
    with torch.no_grad():
        model[0].displacement.add_(0.6 * torch.rand(8, 3, 2) - 0.3)
        model[1].displacement.add_(0.6 * torch.rand(8, 2) - 0.3)
    task = noise_task()
    expected = model(task.example)
    edit = FreezeShifts()(model, task, Work(tmp_path))
    assert [site.after is not None for site in edit.sites] == [True, True]
    torch.testing.assert_close(edit.model(task.example), expected)
    before = [edit.model[i].displacement.clone() for i in (0, 1)]
    trained = FineTune(epochs=1, lr=0.05)(edit.model, task, Work(tmp_path, lineage="k")).model
    assert all(torch.equal(trained[i].displacement, old) for i, old in enumerate(before))


def test_nothing_to_freeze_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="its displacements do not learn"):
        FreezeShifts()(nn.Sequential(Shift2d(8, 3)), noise_task(), Work(tmp_path))
