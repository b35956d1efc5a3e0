"""A recorded training step against the same steps without a recording."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.data import digits, make_task
from compress.graphed import WARM, GraphedStep
from compress.models import small
from compress.nn.masked import MaskedWeight, put_mask
from compress.stages import FineTune, Prune, Quantize
from compress.task import Task, Work
from compress.train import fit

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def the_task() -> Task:
    return make_task(digits(limit=300), device="cuda", batch_size=32, seed=0)


@needs_gpu
@pytest.mark.parametrize(
    "settings", [{}, {"distill": 0.5}, {"clip": 1.0, "average": 0.9}, {"optimizer": "adamw", "lr": 1e-3}], ids=str
)
def test_it_trains_as_steps_do_that_are_not_recorded(
    settings: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = the_task()
    torch.manual_seed(0)
    model = small(10, 1)
    task = Task(**{**vars(task), "teacher": copy.deepcopy(model).cuda()})
    trained = []
    for records in (True, False):
        if not records:
            monkeypatch.setattr("compress.train.GraphedStep", lambda update, model: update)
        work = Work(tmp_path / str(records), "base")
        work.folder.mkdir()
        given = {"epochs": 3, "lr": 0.05, **settings}
        trained.append(fit(copy.deepcopy(model), task, work, FineTune(**given))[0])  # type: ignore[arg-type]
    for (name, a), b in zip(trained[0].state_dict().items(), trained[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


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
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph"):
        loss, _ = step(x, y)
    torch.testing.assert_close(loss, layer(x).sum().cpu())
    assert float(step(x, y)[0]) == float(loss)
    torch.manual_seed(1)
    drawn = torch.rand(3, device="cuda")
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3, device="cuda"))


@needs_gpu
@pytest.mark.parametrize(
    "stages", [[Prune(amount=0.5, schedule="cubic", epochs=1)], [Quantize()]], ids=["mask", "int8"]
)
def test_compressed_layers_train(stages: list[Prune | Quantize], tmp_path: Path) -> None:
    model: nn.Module = small(10, 1).cuda()
    task = the_task()
    for stage in (*stages, FineTune(epochs=2, lr=1e-3)):
        folder = tmp_path / type(stage).__name__
        folder.mkdir()
        model = stage(model, task, Work(folder, "base")).model
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())


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
