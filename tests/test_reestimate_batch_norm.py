"""Batch norm statistics measured again, against statistics by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import AWKWARD, SHAPE, Noise, noise_task
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.stage import Edit
from compress.stages import ReestimateBatchNorm
from compress.task import Work


def two() -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 1))
    norms = (nn.BatchNorm2d(6), nn.BatchNorm2d(4, momentum=0.3))
    dropped = (nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 7 * 9, 3))
    return nn.Sequential(convolutions[0], norms[0], nn.ReLU(), convolutions[1], norms[1], *dropped).eval()


def reestimate(model: nn.Module, images: int = 32, **settings: Any) -> Edit:
    return ReestimateBatchNorm(images, **settings)(model, noise_task(), Work(Path()))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.movedim(1, -1).flatten(0, -2).double()
    mean = rows.mean(0)
    return mean, (rows - mean).square().sum(0) / (len(rows) - 1)


@torch.no_grad()
def test_statistics_are_those_by_hand_and_the_second_sees_the_first_ones_batches() -> None:
    model = two()
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
        model[1].bias.normal_()
    before = copy.deepcopy(model)
    first, second = [], []
    for images in Noise().x.split(16):
        y = before[0](images)
        mean, variance = moments(y)
        first.append((mean, variance))
        biased = y.double().var((0, 2, 3), unbiased=False)  # what a batch is normalised by
        scale = before[1].weight / (biased + before[1].eps).sqrt()
        z = (y - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + before[1].bias.view(-1, 1, 1)
        second.append(moments(before[3](z.float().relu())))
    edit = reestimate(model)
    for norm, batches in ((model[1], first), (model[4], second)):
        for now, values in zip((norm.running_mean, norm.running_var), zip(*batches, strict=True), strict=True):
            torch.testing.assert_close(now.double(), torch.stack(values).mean(0), rtol=1e-4, atol=1e-5)
    assert [site.after for site in edit.sites] == ["statistics measured again"] * 2
    assert (model[1].momentum, model[4].momentum) == (0.1, 0.3)
    assert not any(module.training for module in model.modules())
    assert edit.notes["images"] == 32 and set(edit.notes["moved"]) == {"1", "4"}
    for (name, now), (_, then) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert torch.equal(now, then), name


def test_statistics_do_not_depend_on_what_they_were_and_all_batches_count_alike() -> None:
    model, other = two(), two()
    other[1].running_mean.fill_(7)
    reestimate(model, 24)
    reestimate(other, 24)
    assert torch.equal(model[1].running_mean, other[1].running_mean)
    halves = [moments(model[0](part))[0] for part in Noise().x[:24].split(12)]
    torch.testing.assert_close(model[1].running_mean.double(), torch.stack(halves).mean(0), rtol=1e-4, atol=1e-5)


def test_norms_that_are_left_alone() -> None:
    model = two()
    model[1] = nn.BatchNorm2d(6, track_running_stats=False)
    model[4].requires_grad_(False)
    with pytest.raises(ConfigError, match=r"it has no running statistics.*; it is frozen: its scale or bias does not"):
        reestimate(model)
    model = two()
    edit = reestimate(model, exclude=["4"])
    assert edit.sites[1].why == "excluded by '4'" and not model[4].running_mean.any() and model[1].running_mean.any()
    model = two()
    model.add_module("spare", nn.BatchNorm1d(3))
    model.forward = lambda x: model[:8](x)  # type: ignore[method-assign]
    assert reestimate(model).sites[2].why == "never reached by the forward pass"


def test_a_model_without_batch_norm_and_settings() -> None:
    with pytest.raises(
        ConfigError, match=r"no batch norm; put `ReestimateBatchNorm` before `FoldBatchNorm`, `Equalize`"
    ):
        reestimate(AWKWARD["plain"]())
    with pytest.raises(ConfigError, match=r"`images` \(=1\) must be at least 2"):
        ReestimateBatchNorm(images=1)
    with pytest.raises(ConfigError, match="which matches no layer"):
        reestimate(two(), include=["bn*"])


def test_shapes_of_the_awkward_list() -> None:
    for name, make in AWKWARD.items():
        layer = make()
        width = layer(torch.zeros(2, *SHAPE)).shape[1]
        model = nn.Sequential(layer, nn.BatchNorm2d(width)).eval()
        reestimate(model)
        outputs = [moments(layer(part))[0] for part in Noise().x.split(16)]
        found = model[1].running_mean.double()
        torch.testing.assert_close(found, torch.stack(outputs).mean(0), rtol=1e-4, atol=1e-5, msg=name)
