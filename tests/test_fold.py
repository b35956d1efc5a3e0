"""Batch norm folded into the layer before it: same output, no norm left, or left where it cannot go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from random_task import quantize, warm
from torch import Tensor, nn

from compress.lower.fold import fold_batch_norm
from compress.nn.fire import Fire
from compress.nn.shift import ShiftConv2d

AWKWARD = [
    dict(stride=2),
    dict(stride=(2, 1)),
    dict(padding=(1, 0)),
    dict(dilation=2),
    dict(groups=2),
    dict(groups=8),
    dict(kernel_size=1),
    dict(kernel_size=1, stride=2),
    dict(bias=False),
    dict(padding=1, padding_mode="reflect"),
]


@pytest.mark.parametrize("settings", AWKWARD, ids=str)
def test_folding_changes_no_output(settings: dict[str, object]) -> None:
    arguments = {"kernel_size": 3} | settings
    model = warm(nn.Sequential(nn.Conv2d(8, 16, **arguments), nn.BatchNorm2d(16), nn.ReLU()), (8, 12, 12))
    x = torch.randn(2, 8, 12, 12)
    expected = model(x)
    assert fold_batch_norm(model) == [("0", "1")]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert type(model[1]) is nn.Identity and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_folding_reaches_into_layers_of_ours() -> None:
    model = warm(nn.Sequential(ShiftConv2d(8, 16, 3, 3, padding=1, bias=False), nn.BatchNorm2d(16)), (8, 12, 12))
    x = torch.randn(2, 8, 12, 12)
    expected = model(x)
    assert fold_batch_norm(model) == [("0", "1")]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("expand1", "reorder"), [(0, False), (6, False), (6, True)])
def test_folding_reaches_into_fire_modules(expand1: int, reorder: bool) -> None:
    fire = Fire(8, 16, 4, expand1, 16 - expand1, reorder=reorder)
    if reorder:
        fire.order.copy_(torch.randperm(16, generator=torch.Generator().manual_seed(1)))
    model = warm(nn.Sequential(fire, nn.BatchNorm2d(16), nn.ReLU()), (8, 12, 12))
    x = torch.randn(2, 8, 12, 12)
    expected = model(x)
    assert fold_batch_norm(model) == [("0" if expand1 else "0.expand3", "1")]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    twice = warm(nn.Sequential(fire := Fire(8, 8, 4, 4, 4), nn.ReLU(), fire, nn.BatchNorm2d(8)), (8, 12, 12))
    assert fold_batch_norm(twice) == []


class Twice(nn.Module):
    """A convolution called twice, one norm behind each call; another whose output has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.fork, self.third = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.conv(F.relu(self.first(self.conv(x)))))
        y = self.fork(x)
        return self.third(y) + y


def test_norms_that_cannot_be_folded_stay(tmp_path: Path) -> None:
    model = warm(Twice())
    assert fold_batch_norm(model) == []
    edit = quantize(model, tmp_path)
    assert [site.after for site in edit.sites] == ["int8 weights per channel, uint8 activations"] * 2
