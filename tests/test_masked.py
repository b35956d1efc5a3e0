"""`MaskedWeight`: exact zeros, schedules by the papers' formulas, scores by hand, and resuming in the middle."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import noise_task
from test_train import Breaks, Killed, state
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.nn.masked import MaskedWeight, among_largest, kept, parsed, put_mask
from compress.stages import FineTune, Prune
from compress.task import Work
from compress.train import fit


def masked(layer: nn.Module, mask: Tensor | None = None, **settings: Any) -> MaskedWeight:
    part = MaskedWeight(**settings)
    put_mask(layer, part, torch.ones_like(layer.weight, dtype=torch.bool) if mask is None else mask)  # type: ignore[call-overload]
    return part


def zeros(layer: nn.Module) -> int:
    return int((layer.weight == 0).sum())  # type: ignore[arg-type,union-attr]


def test_zeros_are_plus_zero_get_no_gradient_and_stay() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    mask = torch.rand_like(layer.weight) < 0.4
    before = layer.weight.detach().clone()
    masked(layer, mask)
    expected = torch.where(mask, before, torch.zeros(()))
    assert torch.equal(layer.weight.view(torch.int32), expected.view(torch.int32))  # no minus zero
    layer.weight = -before
    assert torch.equal(layer.weight[mask], -before[mask]) and not layer.weight[~mask].any()
    assert not torch.signbit(layer.weight[~mask]).any()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
        gradient = layer.parametrizations.weight.original.grad
        assert not gradient[~mask].any() and gradient[mask].all()
        optimizer.step()
    assert torch.equal(layer.weight != 0, mask)


@pytest.mark.parametrize(("schedule", "power"), [("linear", 1), ("cubic", 3)])
def test_amounts_rise_as_zhu_and_gupta_say(schedule: str, power: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(50, 20)
    first = torch.rand(20, 50) >= 0.1
    start, end, n, every = int((~first).sum()) / 1000, 0.8, 4, 3
    masked(layer, first, amount=end, start=start, schedule=schedule, steps=n * every, every=every)
    optimizer = torch.optim.SGD(layer.parameters(), 1e-3)
    seen = []
    for step in range(n * every + 4):
        layer.train()
        seen.append(zeros(layer))  # a look without a gradient counts no step
        with torch.no_grad():
            layer(torch.randn(2, 50))
        F.mse_loss(layer(torch.randn(8, 50)), torch.randn(8, 20)).backward()
        optimizer.step()
        t = min(step // every, n)
        assert seen[-1] == round(1000 * (end + (start - end) * (1 - t / n) ** power))
    assert seen[0] == round(1000 * start) and seen[-1] == 800
    layer.eval()
    assert not layer.weight[~first].any()


def test_steps_that_updates_do_not_divide_end_at_the_last() -> None:
    part = MaskedWeight(0.5, schedule="linear", steps=10, every=4)
    assert [part.amount_at(step) for step in range(12)] == pytest.approx([0] * 4 + [0.2] * 4 + [0.4] * 2 + [0.5] * 2)


def test_the_smallest_go_and_none_comes_back_by_magnitude() -> None:
    layer = nn.Linear(10, 1, bias=False)
    layer.weight.data = torch.arange(1.0, 11.0).view(1, 10)
    masked(layer, amount=0.5, schedule="linear", steps=5)
    for step in range(1, 6):
        layer(torch.zeros(1, 10)).sum().backward()
        assert zeros(layer) == step and not layer.weight[0, :step].any()
        layer.parametrizations.weight.original.data[0, :step] = 100.0  # what is gone is not looked at again


@pytest.mark.parametrize("by", ["movement", "taylor"])
def test_scores_are_those_of_the_papers(by: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    free = copy_of(layer)
    part = masked(layer, amount=0.5, schedule="linear", steps=100, every=50, by=by)
    expected = torch.zeros(4, 6)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(3):
        x, y = torch.randn(5, 6), torch.randn(5, 4)
        free.data.copy_(layer.parametrizations.weight.original.detach())
        (gradient,) = torch.autograd.grad(F.mse_loss(x @ free.mT, y), free)
        expected += -free.detach() * gradient if by == "movement" else (free.detach() * gradient).square()
        optimizer.zero_grad()
        F.mse_loss(layer(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(part.scores, expected)


def copy_of(layer: nn.Linear) -> Tensor:
    return layer.weight.detach().clone().requires_grad_()


def test_by_movement_weights_come_back_but_not_those_that_were_gone_before() -> None:
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    movement = {"amount": 0.5, "start": 0.25, "schedule": "linear", "steps": 2, "by": "movement"}
    part = masked(layer, torch.tensor([[False, True, True, True]]), **movement)

    def step(gradient: list[float]) -> list[bool]:
        layer(torch.tensor([gradient])).sum().backward()
        layer.weight  # noqa: B018 - a look, in training mode, brings the mask up to date
        return part.mask.flatten().tolist()

    assert step([-9.0, 3.0, 2.0, 1.0]) == [False, False, True, True]  # round(0.375 * 4) of them go
    assert step([-9.0, -9.0, 0.0, 0.0]) == [False, True, False, True]
    assert part.scores[0, 0] < -1e29


def test_a_layer_used_twice_counts_a_step_once() -> None:
    layer = nn.Linear(8, 8)
    part = masked(layer, amount=0.5, schedule="linear", steps=10)
    for step in range(1, 4):
        layer(layer(torch.randn(2, 8))).sum().backward()
        assert int(part.step) == step
    layer.eval()
    layer(torch.randn(2, 8)).sum().backward()
    assert int(part.step) == 3


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(378, 3)
    )


@pytest.mark.parametrize(
    ("by", "more"),
    [("magnitude", {}), ("movement", {"average": 0.5}), ("taylor", {"keep": "best"})],
)
def test_killed_in_mid_schedule_and_resumed_ends_in_the_same_bytes(
    by: str, more: dict[str, Any], tmp_path: Path
) -> None:
    task, settings = noise_task(images=80), FineTune(epochs=3, lr=0.05, **more)

    def pruned(folder: str) -> tuple[nn.Module, Work]:
        (tmp_path / folder).mkdir(exist_ok=True)
        stage = Prune(amount=0.8, by=by, schedule="cubic", epochs=2.4, every=2)
        return stage(net(), task, Work(tmp_path)).model, Work(tmp_path / folder, lineage="k")

    model, work = pruned("a")
    whole, _ = fit(model, task, work, settings)
    model, work = pruned("b")
    with pytest.raises(Killed):
        fit(model, replace(task, train=Breaks(task.train, 1)), work, settings)
    model, work = pruned("b")
    again, _ = fit(model, task, work, settings)
    assert state(again) == state(whole)
    share = [zeros(layer) / layer.weight.numel() for layer in (whole[0], whole[5])]
    total = zeros(whole[0]) + zeros(whole[5])
    assert total == round(0.8 * (432 + 1134)) and max(share) < 1


def test_the_largest_are_kept_the_first_of_equals() -> None:
    torch.manual_seed(0)
    scores = torch.randn(7, 9)
    for count in (1, 20, 62):
        wanted = torch.zeros(63, dtype=torch.bool)
        wanted[scores.flatten().sort(descending=True).indices[:count]] = True
        assert torch.equal(kept(scores, count).flatten(), wanted)
    assert kept(torch.tensor([1.0, 2.0, 1.0, 1.0]), 3).tolist() == [True, True, True, False]
    assert not kept(scores, 0).any() and kept(scores, 63).all()


@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 3, 3)])
def test_patterns_run_along_the_input_channels(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    scores = torch.rand(shape)
    chosen = among_largest(scores, "2:4")
    rows = scores.movedim(1, -1).reshape(-1, 2, 4)
    where = chosen.movedim(1, -1).reshape(-1, 2, 4)
    assert (where.sum(-1) == 2).all()
    for row, mine in zip(rows.flatten(0, 1), where.flatten(0, 1), strict=True):
        assert set(row[mine].tolist()) == set(sorted(row.tolist())[2:])


def test_a_pattern_comes_along_a_schedule() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    masked(layer, amount=0.5, schedule="linear", steps=4, pattern="2:4")
    seen = []
    for _ in range(5):
        layer(torch.randn(4, 16)).square().sum().backward()
        seen.append(zeros(layer))
        in_fours = (layer.weight == 0).view(-1, 4).sum(1)
        assert int(in_fours.max()) <= 2
    assert seen == [16, 32, 48, 64, 64]


def test_it_stands_in_front_of_everything_else() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="which a mask must not follow"):
        masked(layer)
    layer = nn.Linear(4, 4)
    masked(layer)
    again = masked(layer, torch.eye(4, dtype=torch.bool))
    assert list(layer.parametrizations.weight) == [again] and parametrize.is_parametrized(layer)  # type: ignore[arg-type]
    assert zeros(layer) == 12


def test_mistakes_are_told() -> None:
    for settings, message in (
        ({"schedule": "sine"}, r"`schedule` \(='sine'\) must be one of one_shot, linear, cubic"),
        ({"by": "luck"}, r"`by` \(='luck'\) must be one of magnitude, movement, taylor"),
        ({"amount": 1.0}, r"`start` \(=0.0\) and `amount` \(=1.0\) must rise"),
        ({"amount": 0.5, "start": 0.6}, r"`start` \(=0.6\) and `amount` \(=0.5\) must rise"),
        ({"schedule": "cubic"}, r"`steps` \(=0\) and `every` \(=1\) must be at least 1 for a schedule"),
        ({"steps": 4}, r"without, `steps` is 0"),
        ({"pattern": "4:4"}, r"`pattern` \(='4:4'\) must leave at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskedWeight(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`pattern` \(='2/4'\) must read N:M"):
        parsed("2/4")


def test_a_schedule_that_had_ended_goes_on_from_an_earlier_state() -> None:
    layer = nn.Linear(4, 4)
    put_mask(layer, MaskedWeight(amount=0.5, schedule="linear", steps=3), torch.ones(4, 4, dtype=torch.bool))
    early = copy.deepcopy(layer.state_dict())
    for _ in range(5):
        layer(torch.ones(1, 4)).sum().backward()
    assert float((layer.weight == 0).float().mean()) == 0.5
    layer.load_state_dict(early)
    assert float((layer.weight == 0).float().mean()) == 0.0
    for _ in range(5):
        layer(torch.ones(1, 4)).sum().backward()
    assert float((layer.weight == 0).float().mean()) == 0.5
