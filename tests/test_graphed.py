"""A recorded training step against the same steps without a recording."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress import train
from compress.data import digits, make_task
from compress.graphed import WARM, GraphedStep
from compress.models import small
from compress.nn.masked import MaskedWeight, put_mask
from compress.stage import Stage
from compress.stages import Cluster, FineTune, Prune, Quantize, Shift
from compress.task import Task, Work
from compress.train import fit

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def the_task() -> Task:
    return make_task(digits(limit=300), device="cuda", batch_size=32, seed=0)


def both_ways(
    model: nn.Module, task: Task, settings: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[nn.Module, nn.Module]:
    """The model after the same training by recorded steps, and by steps that are not."""
    trained = []
    for records in (True, False):
        work = Work(folder / f"recorded {records}", "base")
        work.folder.mkdir()
        with monkeypatch.context() as patch:
            if not records:
                patch.setattr("compress.train.GraphedStep", lambda update, _: update)
            trained.append(fit(copy.deepcopy(model), task, work, FineTune(**settings))[0])
    return trained[0], trained[1]


@needs_gpu
@pytest.mark.parametrize(
    "settings", [{}, {"distill": 0.5}, {"clip": 1.0, "average": 0.9}, {"optimizer": "adamw", "lr": 1e-3}], ids=str
)
def test_it_trains_as_steps_do_that_are_not_recorded(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = small(10, 1)
    task = replace(the_task(), teacher=copy.deepcopy(model).cuda())
    a, b = both_ways(model, task, {"epochs": 3, "lr": 0.05, **settings}, tmp_path, monkeypatch)
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, b.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


@needs_gpu
def test_the_same_bytes_come_out_each_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, states = small(10, 1), []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        states.append(fit(copy.deepcopy(model), the_task(), Work(folder, "base"), FineTune(epochs=3))[0].state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))


@needs_gpu
def test_it_records_once_and_computes_other_shapes_step_by_step() -> None:
    layer = nn.Linear(3, 2).cuda()
    calls = []

    def update(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(x))
        return layer(x).sum().detach(), (y == 0).sum()

    step = GraphedStep(update, layer)
    for images in [8] * (WARM + 3) + [5, 8]:
        x, y = torch.randn(images, 3).cuda(), torch.arange(images).cuda()
        loss, right = step(x, y)
        torch.testing.assert_close(loss, layer(x).sum())
        assert int(right) == 1
    assert calls == [8] * (WARM + 1) + [5]


@needs_gpu
def test_what_cannot_be_recorded_is_computed_and_said() -> None:
    layer = nn.Linear(3, 2).cuda()

    def update(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor(float(layer(x).sum().item())), y.sum()

    step = GraphedStep(update, layer)
    x, y = torch.randn(8, 3).cuda(), torch.arange(8).cuda()
    for _ in range(WARM):
        step(x, y)
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph.*capturing"):
        loss, _ = step(x, y)
    assert torch.cuda.current_stream() == stream
    torch.testing.assert_close(loss, layer(x).sum().cpu())
    assert float(step(x, y)[0]) == float(loss)
    torch.manual_seed(1)
    drawn = torch.rand(3, device="cuda")
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3, device="cuda"))


WAYS: dict[str, list[Stage]] = {
    "mask": [Prune(amount=0.5, images=64)],
    "mask, rising": [Prune(amount=0.5, schedule="cubic", epochs=1)],
    "shared": [Prune(amount=0.3, images=64), Cluster(bits=3)],
    "int8": [Quantize()],
    "learned steps": [Quantize(weight_bits=4, learn=True)],
    "shift": [Shift(taps=2, learn=True, l1=1e-3, images=64)],
}


@needs_gpu
@pytest.mark.filterwarnings("error:training steps are not recorded")
@pytest.mark.parametrize("way", WAYS)
def test_compressed_layers_train_as_they_do_step_by_step(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = the_task()
    model: nn.Module = small(10, 1).cuda()
    for number, stage in enumerate(WAYS[way]):
        (tmp_path / str(number)).mkdir()
        model = stage(model, task, Work(tmp_path / str(number), "base")).model
    a, b = both_ways(model, task, {"epochs": 2, "lr": 1e-3}, tmp_path, monkeypatch)
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(tensor, b.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)


@needs_gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_that_was_killed_ends_in_the_same_bytes(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, settings = the_task(), FineTune(epochs=3, lr=1e-3, optimizer=optimizer)
    torch.manual_seed(0)
    model = small(10, 1)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = fit(copy.deepcopy(model), task, Work(tmp_path / "whole", "base"), settings)[0].state_dict()
    store = train._Run.store

    def dies(run: train._Run, path: Path, epochs: int) -> None:
        store(run, path, epochs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train._Run, "store", dies)
        fit(copy.deepcopy(model), task, Work(tmp_path / "killed", "base"), settings)
    resumed = fit(copy.deepcopy(model), task, Work(tmp_path / "killed", "base"), settings)[0].state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_mask_waits_until_its_schedule_has_ended() -> None:
    layer = nn.Linear(4, 4)
    put_mask(layer, MaskedWeight(amount=0.5, schedule="linear", steps=2), torch.ones(4, 4, dtype=torch.bool))
    mask = layer.parametrizations.weight[0]
    seen = []
    for _ in range(4):
        seen.append(mask.waits)
        layer(torch.ones(1, 4)).sum().backward()
    assert seen == [True, True, True, False]
    assert float((layer.weight == 0).float().mean()) == 0.5


def test_a_layer_that_waits_is_never_recorded() -> None:
    class Waits(nn.Module):
        waits = True

    step = GraphedStep(lambda x, y: (x.sum(), y.sum()), nn.Sequential(Waits()))
    for _ in range(WARM + 2):
        assert float(step(torch.ones(4), torch.ones(4))[0]) == 4
    assert step.graph is None
