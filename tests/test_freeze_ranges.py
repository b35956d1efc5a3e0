"""Scales that stand still in training, once asked to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_task import quantize, task, warm
from torch import nn

from compress.errors import ConfigError
from compress.models import small
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight
from compress.stages.freeze_ranges import FreezeRanges
from compress.task import Work


def scales(model: nn.Module) -> list[torch.Tensor]:
    return [m.scale.detach().clone() for m in model.modules() if isinstance(m, FakeQuantize | FakeQuantizeWeight)]


def step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model.train()(task().example).square().sum().backward()
    optimizer.step()
    model(task().example)
    model.eval()


@pytest.mark.parametrize("learn", [False, True])
def test_scales_move_before_and_stand_still_after(learn: bool, tmp_path: Path) -> None:
    model = quantize(warm(small(channels=3)), tmp_path, weight_bits=4, learn=learn).model
    before = scales(model)
    step(model)
    assert any(not torch.equal(a, b) for a, b in zip(before, scales(model), strict=True))
    logits = model(task().example).detach()
    edit = FreezeRanges()(model, task(), Work(tmp_path))
    assert torch.equal(edit.model(task().example), logits)
    before = scales(edit.model)
    step(edit.model)
    assert all(torch.equal(a, b) for a, b in zip(before, scales(edit.model), strict=True))
    assert (edit.notes["activation_ranges_fixed"] > 0) == learn


def test_by_pattern_and_when_there_is_nothing_to_freeze(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not quantized; put `FreezeRanges` behind `Quantize`"):
        FreezeRanges()(small(channels=3), task(), Work(tmp_path))
    model = quantize(warm(small(channels=3)), tmp_path).model
    edit = FreezeRanges(include=["conv1"])(model, task(), Work(tmp_path))
    assert [site.name for site in edit.sites if site.after] == ["conv1"]
    FreezeRanges()(model, task(), Work(tmp_path))
    with pytest.raises(ConfigError, match="its scales are fixed already"):
        FreezeRanges()(model, task(), Work(tmp_path))
