"""What every stage that replaces convolutions refuses: weights that somebody has pruned, clustered or quantized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from awkward import noise_task
from torch import nn

from compress.errors import ConfigError, DataError
from compress.models import small
from compress.stages import Cluster, Fire, Group, Invert, Prune, Quantize, Separable, Shift
from compress.substitute import Substitution
from compress.task import Work

SHAPE = (2, 8, 8)
STAGES = [Shift(taps=3, images=16), Fire(images=16), Separable(images=16), Group(images=16), Invert(images=16)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return small(classes=3, channels=2).eval()


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: type(stage).__name__)
def test_weights_that_have_settled_are_not_replaced(stage: Substitution, tmp_path: Path) -> None:
    task, work, name = noise_task(SHAPE), Work(tmp_path), type(stage).__name__
    for settled, said in (
        (
            Prune(amount=0.5, images=16),
            r"pruned weights stay zero, .* in .*layer2.0.conv1.* before `Prune`, or exclude",
        ),
        (Cluster(bits=4), f"the model is clustered already; put `{name}` before `Cluster`"),
        (Quantize(calibration_images=16), f"the model is quantized already; put `{name}` before `Quantize`"),
    ):
        with pytest.raises(ConfigError, match=said):
            stage(settled(net(), task, work).model, task, work)  # type: ignore[operator]  # each is a stage


def test_layers_beside_pruned_ones_are_replaced(tmp_path: Path) -> None:
    task, work = noise_task(SHAPE), Work(tmp_path)
    pruned = Prune(amount=0.5, images=16, include=["layer2.0.conv1"])(net(), task, work).model
    edit = Shift(taps=3, images=16, exclude=["layer2.0.conv1"])(pruned, task, work)
    assert any(site.after for site in edit.sites) and bool((edit.model.layer2[0].conv1.weight == 0).any())  # type: ignore[index, union-attr]


def test_what_is_no_number_is_told_with_the_layer(tmp_path: Path) -> None:
    model = net()
    model.layer2[0].bn1.bias.data[0] = float("nan")  # type: ignore[index, union-attr]
    with pytest.raises(DataError, match=r"calibration met NaN or infinity at `layer2.0.conv2`"):
        Shift(taps=3, images=16)(model, noise_task(SHAPE), Work(tmp_path))
