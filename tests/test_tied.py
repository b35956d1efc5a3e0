"""Two layers that share a weight: stages that would part them leave them alone, and say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from awkward import noise_task
from torch import nn

from compress.measure import profile
from compress.stage import Stage
from compress.stages import Factorize, Prune, PruneChannels, Separable, Shift
from compress.surgery import tied
from compress.task import Work

TASK = noise_task((3, 8, 8))
WHY = "it has a parameter that is another layer's too"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 16), (16, 16), (16, 16), (16, 16))]
    layers[2].weight = layers[1].weight
    each = [part for layer in layers for part in (layer, nn.ReLU())]
    return nn.Sequential(*each, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)).eval()


@pytest.mark.parametrize(
    "stage",
    [
        Factorize(ratio=0.5, images=16),
        Factorize(params=0.8, images=16),
        Shift(taps=3, images=16),
        Separable(images=16),
        Prune(amount=0.5, images=16),
    ],
    ids=lambda stage: type(stage).__name__,
)
def test_layers_that_share_a_weight_stay_as_they_are(stage: Stage, tmp_path: Path) -> None:
    model = net()
    edit = stage(model, TASK, Work(tmp_path))
    why = {site.name: site.why for site in edit.sites}
    assert why["2"] == why["4"] == WHY and {site.name for site in edit.sites if site.after} >= {"6"}
    assert len(tied(edit.model)) == 1


@pytest.mark.parametrize("share", [0.8, 0.9])
def test_channels_come_down_to_the_amount_beside_layers_that_share(share: float, tmp_path: Path) -> None:
    before = profile(net(), TASK.example).params
    edit = PruneChannels(params=share, images=16)(net(), TASK, Work(tmp_path))
    why = {site.name: site.why for site in edit.sites}
    assert why["2"] == "2 has a parameter that is another layer's too"
    assert len(tied(edit.model)) == 1 and edit.model[2].weight is edit.model[4].weight  # type: ignore[index]
    assert profile(edit.model, TASK.example).params <= share * before
