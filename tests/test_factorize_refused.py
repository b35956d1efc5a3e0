"""What `Factorize` refuses: settings, ranks, weights that a later stage has made, and what is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import SHAPE, noise_task
from random_task import quantize
from test_factorize import Net
from torch import nn

from compress.errors import ConfigError, DataError
from compress.stages import Cluster, Factorize, Prune
from compress.task import Work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of `ratio`, `energy`, .* must be given, not none"),
        ({"ratio": 0.5, "macs": 0.5}, "not `ratio` and `macs`"),
        ({"latency": 0.5, "gate": "latency"}, r"`gate` \(=latency\) would keep layers after the time for `latency`"),
        ({"ratio": 1.5}, r"`ratio` \(=1.5\) must be a share, above 0 and below 1"),
        ({"ratio": 0.0}, r"`ratio` \(=0.0\) must be a share"),
        ({"ratio": 0.5, "method": "tt"}, r"`method` \(='tt'\) must be one of tucker, svd, spatial, cp"),
        ({"macs": 0.5, "method": "cp"}, "`macs` cuts what is nested, which `method: cp` is not"),
        ({"vbmf": True, "weaken": 0.0}, r"`weaken` \(=0.0\) must be above 0"),
        ({"ratio": 0.5, "weaken": 0.8}, "`weaken` and `min_rank` belong to `vbmf`"),
        ({"ratio": 0.5, "multiple": 0}, r"`multiple` \(=0\) must be at least 1"),
        ({"ratio": 0.5, "gate": "size"}, r"`gate` \(='size'\) must be one of"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Factorize(**settings)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"nowhere*": [1, 1]}, r"`ranks` has the pattern 'nowhere\*', which matches no layer"),
        ({"stem": [9, 4]}, r"`ranks.stem` \(=\[9, 4\]\) must be between 1 and 8, what stem has"),
        ({"mid": [2, 17]}, r"`ranks.mid` \(=\[2, 17\]\) must be between 1 and 16, what mid has"),
        ({"stem": [4]}, r"`ranks.stem` \(=\[4\]\) must be 2 for stem"),
        ({"head": [2, 2]}, r"`ranks.head` \(=\[2, 2\]\) must be 1 for head"),
        ({"stem": [1, 10]}, r"`ranks.stem` \(=\[1, 10\]\) is of no use: the lower one must be at least 2"),
    ],
)
def test_ranks_that_cannot_be(ranks: dict[str, list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Factorize(ranks=ranks).check(Net())


def test_a_rank_of_a_layer_with_two_parts_by_any_method_is_at_most_what_it_has() -> None:
    for rank in (3, 4):
        stage = Factorize(method="cp", ranks={"head": [rank], "stem": [40]})
        if rank == 3:
            stage.check(Net())
            continue
        with pytest.raises(ConfigError, match=r"`ranks.head` \(=\[4\]\) must be between 1 and 3, what head has"):
            stage.check(Net())


def test_what_was_pruned_clustered_or_quantized_is_not_taken_apart(tmp_path: Path) -> None:
    task, work, stage = noise_task(), Work(tmp_path), Factorize(ratio=0.5, images=16)
    pruned = Prune(amount=0.5, images=16, include=["mid"])(Net().eval(), task, work).model
    with pytest.raises(ConfigError, match=r"would not, in mid; put `Factorize` before `Prune`, or exclude these"):
        stage(pruned, task, work)
    edit = Factorize(ratio=0.5, images=16, exclude=["mid"])(pruned, task, work)
    assert edit.sites[0].after is not None and bool((edit.model.mid.weight == 0).any())  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="the model is clustered already; put `Factorize` before `Cluster`"):
        stage(Cluster(bits=4)(Net().eval(), task, work).model, task, work)
    with pytest.raises(ConfigError, match="the model is quantized already; put `Factorize` before `Quantize`"):
        stage(quantize(Net().eval(), tmp_path, SHAPE, calibration_images=16).model, task, work)


@pytest.mark.parametrize("settings", [{"ratio": 0.5}, {"macs": 0.7}, {"energy": 0.8, "refine": False}])
def test_weights_and_images_that_are_not_finite(settings: dict[str, Any], tmp_path: Path) -> None:
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            nn.Linear(16, 3),
        ).eval()

    stage, task = Factorize(**settings, images=32), noise_task()
    model: Any = net()
    model[2].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="the weights of `2` hold NaN or infinity; they cannot be factorized"):
        stage(model, task, Work(tmp_path))
    if "refine" in settings:
        return
    model = net()
    model[0].bias.data[1] = float("inf")
    with pytest.raises(DataError, match=r"calibration met NaN or infinity at `2`; the model's weights or the images"):
        Factorize(**settings, images=32, exclude=["0"])(model, task, Work(tmp_path))
    task.calibration.x[3, 0, 4, 4] = float("nan")  # type: ignore[attr-defined]  # of the noise
    with pytest.raises(DataError, match="calibration met NaN or infinity at `"):
        stage(net(), task, Work(tmp_path))
