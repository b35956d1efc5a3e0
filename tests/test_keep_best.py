"""`keep: best` and schedules of `Prune`: no epoch is the best before the last zero has come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import noise_task
from test_masked import net, zeros
from test_train import Breaks, Killed, state
from torch import Tensor, nn

from compress import train
from compress.errors import ConfigError
from compress.stages import FineTune, Prune
from compress.task import Work
from compress.train import fit

TOTAL = 432 + 1134  # weights of the network


def scheduled(folder: Path, epochs: float = 3, **settings: Any) -> nn.Module:
    stage = Prune(amount=0.8, schedule="cubic", epochs=epochs, every=1, **settings)
    return stage(net(), noise_task(), Work(folder)).model


def all_zeros(model: Any) -> int:
    return zeros(model[0]) + zeros(model[5])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Makes every epoch score worse than the one before, and gives the zeros and the bytes at the end of each."""
    seen: list[Any] = []
    logits = train.logits

    def scored(model: nn.Module, *more: Any) -> tuple[Tensor, Tensor]:
        outputs, _ = logits(model, *more)
        seen.append((all_zeros(model), state(model)))
        return outputs, outputs.argmax(1) + (torch.arange(len(outputs)) < 2 * len(seen))

    monkeypatch.setattr(train, "logits", scored)
    return seen


@pytest.mark.parametrize("more", [{}, {"average": 0.5}])
def test_the_best_epoch_is_one_after_the_schedule(more: dict[str, Any], seen: list[Any], tmp_path: Path) -> None:
    settings = FineTune(epochs=5, lr=0.01, keep="best", **more)
    trained, history = fit(scheduled(tmp_path), noise_task(), Work(tmp_path), settings)
    scores = [record["val_top1"] for record in history]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 5
    assert seen[0][0] < seen[1][0] < seen[2][0] == round(0.8 * TOTAL)
    assert state(trained) == seen[2][1]


def _fresh(folder: Path) -> Work:
    (folder / "fresh").mkdir()
    return Work(folder / "fresh")


def test_killed_before_the_schedule_ended(seen: list[Any], tmp_path: Path) -> None:
    settings = FineTune(epochs=4, lr=0.01, keep="best")
    whole, _ = fit(scheduled(tmp_path), noise_task(), _fresh(tmp_path), settings)
    seen.clear()
    task = noise_task()
    with pytest.raises(Killed):
        fit(scheduled(tmp_path), replace(task, train=Breaks(task.train, 1)), Work(tmp_path), settings)
    again, _ = fit(scheduled(tmp_path), task, Work(tmp_path), settings)
    assert state(again) == state(whole) and all_zeros(again) == round(0.8 * TOTAL)


def test_fewer_epochs_than_the_schedule_has_no_best(tmp_path: Path) -> None:
    said = (
        r"`keep` \(=best\) chooses among the epochs after the schedule of `Prune`, which has 6 steps left, more than "
        r"`epochs` \(=2\) of 2 steps make; take 3 epochs, or `keep: last`"
    )
    with pytest.raises(ConfigError, match=said):
        fit(scheduled(tmp_path), noise_task(), Work(tmp_path), FineTune(epochs=2, keep="best"))
    half, _ = fit(scheduled(tmp_path), noise_task(), Work(tmp_path), FineTune(epochs=2, lr=0.01))
    fit(half, noise_task(), _fresh(tmp_path), FineTune(epochs=1, lr=0.01, keep="best"))
