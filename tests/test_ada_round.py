"""Rounding by what a layer gives: against trying every rounding, over all kinds of layers, inside whole networks."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from awkward import AWKWARD, SHAPE, noise_task
from random_task import quantize, task, warm
from torch import Tensor, nn

from compress import checkpoint
from compress.errors import ConfigError
from compress.models import small
from compress.nn.quantized import FakeQuantizeWeight, nearest_power
from compress.nn.shift import ShiftConv2d
from compress.rounding import Integers, Output, rounded
from compress.stages.ada_round import AdaRound
from compress.stages.cluster import Cluster
from compress.stages.quantize import Quantize
from compress.task import Task, Work


def problem(features: int, outputs: int, rows: int = 60) -> tuple[Tensor, Tensor, Output]:
    """Correlated inputs, float weights, and what rounding errs by on them."""
    torch.manual_seed(0)
    x = torch.randn(rows, features, dtype=torch.double) @ torch.randn(features, features, dtype=torch.double)
    w = torch.randn(features, outputs, dtype=torch.double)
    y = x @ w
    return x, w, Output((x.T @ x)[None], (x.T @ y)[None], w[None], float(y.square().sum()))


def integers(scale: float, limit: int, like: Tensor) -> Integers:
    full = torch.full_like(like[None], scale)
    return Integers(full, torch.full_like(full, -limit), torch.full_like(full, limit), torch.round)


def test_close_to_the_best_of_all_roundings() -> None:
    x, w, output = problem(5, 30)
    grid = integers(0.7, 3, w)
    found = rounded(output, grid, 0.0, 20)[0]
    every = torch.tensor(list(itertools.product(range(-3, 4), repeat=5)), dtype=torch.double)
    best = ((x @ (0.7 * every.T))[:, :, None] - (x @ w)[:, None]).square().sum(0).amin(0)
    mine = (x @ (0.7 * found - w)).square().sum(0)
    nearest = (x @ (0.7 * (w / 0.7).round().clamp(-3, 3) - w)).square().sum(0)
    assert bool((best <= mine + 1e-9).all())
    assert float(mine.sum()) < min(1.3 * float(best.sum()), 0.7 * float(nearest.sum()))


@pytest.mark.parametrize("power", [False, True])
def test_no_single_move_makes_it_better(power: bool) -> None:
    _, w, output = problem(20, 4)
    limit = 4 if power else 3
    grid = integers(0.5, limit, w)
    if power:
        grid = Integers(grid.scale, grid.low, grid.high, nearest_power)
    found = rounded(output, grid, 0.0, 50)
    known = {0, 1, 2, 4} if power else {0, 1, 2, 3}
    assert set(found.abs().flatten().tolist()) <= known
    least = output.error(found * grid.scale)
    values = sorted({s * k for s in (-1, 1) for k in known})
    for i, o in itertools.product(range(20), range(4)):
        for value in values:
            other = found.clone()
            other[0, i, o] = value
            assert output.error(other * grid.scale) >= least - 1e-9


def test_the_error_is_that_of_the_output() -> None:
    x, w, output = problem(8, 2)
    tried = w + 0.1 * torch.randn_like(w)
    wanted = (x @ (tried - w)).square().sum() / (x @ w).square().sum()
    assert output.error(tried[None]) == pytest.approx(float(wanted))


def smooth(shape: tuple[int, ...] = SHAPE) -> Task:
    """Images that are correlated, as real ones are, so that the way of rounding matters."""
    made = noise_task(shape, images=48)
    around = nn.functional.pad(made.calibration.x, (2, 2, 2, 2), mode="replicate")  # type: ignore[attr-defined]
    made.calibration.x = nn.functional.avg_pool2d(around, 5, 1) * 4 + 0.3  # type: ignore[attr-defined]
    return made


def output_error(model: nn.Module, reference: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        wanted = reference(images)
        return float((model(images) - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("name", AWKWARD)
def test_the_awkward_list_is_rounded_better_than_to_nearest(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data, reference = smooth(), AWKWARD[name]().eval()
    images = data.calibration.x  # type: ignore[attr-defined]
    edit = Quantize(weight_bits=3, activation_bits=None)(copy.deepcopy(reference), data, Work(tmp_path))
    before = output_error(edit.model, reference, images)
    edit = AdaRound(images=48, scales=False)(edit.model, data, Work(tmp_path))
    assert output_error(edit.model, reference, images) < before
    assert all(site.after for site in edit.sites)


def test_the_errors_told_are_those_of_the_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data, reference = smooth(), AWKWARD["at the root"]().eval()
    images = data.calibration.x  # type: ignore[attr-defined]
    model = Quantize(weight_bits=3, activation_bits=None)(copy.deepcopy(reference), data, Work(tmp_path)).model
    edit = AdaRound(images=48, scales=False)(copy.deepcopy(model), data, Work(tmp_path))
    # the bias is solved for too: what is left of the wanted output is what varies
    for stage, model_ in (("relative_error_of_nearest", model), ("relative_error", edit.model)):
        with torch.no_grad():
            wanted, off = reference(images), model_(images) - reference(images)
        centred = [part - part.mean((0, 2, 3), keepdim=True) for part in (off, wanted)]
        share = float(centred[0].square().sum() / centred[1].square().sum())
        assert edit.notes[stage][""] == pytest.approx(share, rel=0.02)


def test_shifts_with_groups_and_linear_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = smooth()
    model = nn.Sequential(
        ShiftConv2d(8, 8, 3, 3, padding=1, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    ).eval()
    model[0].displacement.data.copy_(model[0].displacement.data[:, [2, 0, 1]])
    quantized = Quantize(weight_bits=3, activation_bits=None)(copy.deepcopy(model), data, Work(tmp_path)).model
    images = data.calibration.x  # type: ignore[attr-defined]
    before = output_error(quantized, model, images)
    edit = AdaRound(images=48)(quantized, data, Work(tmp_path))
    assert output_error(edit.model, model, images) < before
    assert {site.name: bool(site.after) for site in edit.sites} == {"0": True, "4": True}


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_bits": 3},
        {"weight_bits": 3, "symmetric": False},
        {"weight_bits": 3, "grid": "power_of_two"},
        {"weight_bits": 2, "weight_range": "mse", "learn": True},
        {"weight_bits": 3, "granularity": "tensor"},
        {"weight_bits": 3, "granularity": "group", "group_size": 3},
    ],
    ids=str,
)
def test_a_whole_network_comes_nearer_and_keeps_its_integers(settings: dict[str, object], tmp_path: Path) -> None:
    model = warm(small(channels=3))
    images = task().calibration.x  # type: ignore[attr-defined]
    edit = quantize(copy.deepcopy(model), tmp_path, **settings)
    before = output_error(edit.model, model, images)
    edit = AdaRound(images=48)(edit.model, task(), Work(tmp_path))
    assert output_error(edit.model, model, images) < before
    built = ("compress.models.small", {"classes": 10, "channels": 3})
    path = tmp_path / "model.safetensors"
    checkpoint.save(edit.model.eval(), path, build=built, input=task().input, provenance={}, results={})
    assert torch.equal(checkpoint.load(path)(images), edit.model(images))
    if "learn" not in settings:  # the first step of a training leaves what was chosen in its place
        layers = [module for module in edit.model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        chosen = [layer.weight.detach() for layer in layers]
        edit.model.train()(images)
        for layer, weight in zip(layers, chosen, strict=True):
            torch.testing.assert_close(layer.weight.detach(), weight)


def test_what_cannot_be_rounded_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"weights are not quantized; put `AdaRound` behind `Quantize`"):
        AdaRound()(small(channels=3), task(), Work(tmp_path))
    model = Cluster(bits=3, include=["layer1*"])(warm(small(channels=3)), task(), Work(tmp_path)).model
    edit = AdaRound(images=16, exclude=["linear"])(quantize(model, tmp_path).model, task(), Work(tmp_path))
    why = {site.name: site.why for site in edit.sites if site.after is None}
    assert why["linear"] == "excluded by 'linear'"
    assert why["layer1.0.conv1"] == "its weights are clustered, so that none can be rounded by itself"
    tied = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(432, 10))
    tied[1].weight = tied[0].weight
    with pytest.raises(ConfigError, match="`images`"):
        AdaRound(images=0)
    with pytest.raises(ConfigError, match="`ridge`"):
        AdaRound(ridge=-1.0)


def test_grids_stay_where_they_were_put() -> None:
    model = quantize(warm(small(channels=3)), Path(), weight_bits=4).model
    AdaRound(images=48)(model, task(), Work(Path()))
    grids = [module for module in model.modules() if isinstance(module, FakeQuantizeWeight)]
    assert {grid.step for grid in grids} == {"fixed"}
