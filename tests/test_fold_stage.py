"""Batch norm folding as a stage: what is folded, and why the rest is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, SHAPE, noise_task
from random_task import warm
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.models import resnet20
from compress.stage import Edit
from compress.stages import FoldBatchNorm
from compress.task import Work


def fold(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> Edit:
    return FoldBatchNorm()(model, noise_task(shape), Work(Path()))


@pytest.mark.parametrize("name", [name for name in AWKWARD if name not in ("used twice", "at the root")])
def test_the_output_stays(name: str) -> None:
    torch.manual_seed(0)
    layer = AWKWARD[name]()[:3]  # type: ignore[index]  # these are sequences
    width = layer(torch.zeros(2, *SHAPE)).shape[1]
    model = warm(nn.Sequential(*layer, nn.BatchNorm2d(width), nn.ReLU()), SHAPE)
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    last = len(layer) - 1
    edit = fold(model)
    assert [(site.name, site.after) for site in edit.sites] == [(str(last + 1), f"part of {last}")]
    torch.testing.assert_close(edit.model(x), expected, rtol=1e-4, atol=1e-5)


class Norms(nn.Module):
    """A norm that can be folded, and one for each reason why not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.fine = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.twice = nn.BatchNorm2d(8)
        self.behind = nn.BatchNorm2d(8)
        self.conv2, self.forked = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.conv3, self.first, self.second = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv4, self.without = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)
        self.unused = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(F.relu(self.fine(self.conv1(x)))))
        y = self.conv2(self.behind(x + 1))
        y = self.forked(y) + y
        y = self.second(self.conv3(self.first(self.conv3(y))))
        return self.without(self.conv4(y)).mean((2, 3))  # type: ignore[no-any-return]


def test_every_norm_that_stays_has_its_reason() -> None:
    model = warm(Norms(), SHAPE)
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    edit = fold(model)
    torch.testing.assert_close(edit.model(x), expected, rtol=1e-4, atol=1e-4)
    by_name = {site.name: site for site in edit.sites}
    assert by_name["fine"].after == "part of conv1" and type(edit.model.fine) is nn.Identity
    assert {name: site.why for name, site in by_name.items() if site.after is None} == {
        "twice": "called several times, behind different tensors",
        "behind": "it reads `add`, which is no convolution",
        "forked": "`add` reads conv2 in front of it too",
        "first": "conv3 in front of it is called several times",
        "second": "conv3 in front of it is called several times",
        "without": "it has no running statistics",
        "unused": "never reached by the forward pass",
    }
    assert edit.notes == {"folded": 1, "kept": 7}


def test_all_of_resnet20() -> None:
    edit = fold(warm(resnet20()), (3, 16, 16))
    assert len(edit.sites) == 19 and all(site.after is not None for site in edit.sites)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in edit.model.modules())


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.conv(x if x.sum() > 0 else -x))
        return out


def test_nothing_to_fold_is_an_error() -> None:
    with pytest.raises(ConfigError, match="the stage found no layer of a kind it handles"):
        fold(AWKWARD["plain"]())
    with pytest.raises(ConfigError, match=r"every layer was kept: who reads what is not known: the forward cannot be"):
        fold(Untraceable().eval())
