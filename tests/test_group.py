"""Grouped convolutions and the stage that makes them, against plain formulas and the convolutions they replace."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, SHAPE, noise_task
from torch import nn

from compress.errors import ConfigError
from compress.measure import profile
from compress.nn.grouped import GroupedConv2d
from compress.stages import Group
from compress.stages.group import deal_out
from compress.surgery import describe
from compress.task import Work

EVEN = "ignore:Using padding='same' with even kernel"  # torch says so of plain convolutions too


def test_layer_is_a_convolution_of_each_groups_channels() -> None:
    torch.manual_seed(0)
    layer = GroupedConv2d(6, 4, (3, 5), 2, stride=(2, 1), padding=(2, 4), dilation=2)
    layer.order.copy_(torch.tensor([3, 1, 4, 0, 5, 2]))
    x = torch.randn(2, 6, 9, 11)
    halves = [
        F.conv2d(x[:, chosen], layer.grouped.weight[made], layer.grouped.bias[made], (2, 1), (2, 4), 2)
        for chosen, made in (([3, 1, 4], slice(2)), ([0, 5, 2], slice(2, 4)))
    ]
    torch.testing.assert_close(layer(x), torch.cat(halves, 1))
    assert describe(layer) == "GroupedConv2d(6, 4, 3x5, stride=(2, 1), dilation=2, groups=2)"


def test_a_new_layer_shuffles_as_torch_does() -> None:
    layer = GroupedConv2d(12, 6, 3, 3)
    x = torch.randn(1, 12, 4, 4)
    torch.testing.assert_close(layer(x), layer.grouped(nn.ChannelShuffle(4)(x)))


def test_counts() -> None:
    counted = profile(GroupedConv2d(8, 12, 3, 4, padding=1), torch.zeros(1, 8, 5, 5))
    assert (counted.params, counted.macs) == (12 * 2 * 9 + 12, 25 * 12 * 2 * 9)


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("name", AWKWARD)
def test_one_group_is_the_convolution(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AWKWARD[name]().eval()
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    edit = Group(groups=1)(model, noise_task(), Work(tmp_path))
    torch.testing.assert_close(edit.model(x), expected, rtol=0, atol=1e-5)
    for site in edit.sites:
        assert site.after is not None or "already" in site.why


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("shuffle", ["data", "fixed"])
@pytest.mark.parametrize("name", AWKWARD)
def test_more_groups_keep_shapes(name: str, shuffle: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AWKWARD[name]().eval()
    x = torch.randn(2, *SHAPE)
    expected = model(x).shape
    edit = Group(groups=4, shuffle=shuffle)(model, noise_task(), Work(tmp_path))
    assert edit.model(x).shape == expected
    for layer in edit.model.modules():
        if isinstance(layer, GroupedConv2d):
            assert sorted(layer.order.tolist()) == list(range(layer.in_channels))


@pytest.mark.parametrize("bias", [True, False])
def test_a_grouped_convolution_in_disguise_is_found_again(bias: bool, tmp_path: Path) -> None:
    """Its groups read channels that no fixed shuffle brings together."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, stride=2, padding=1, dilation=(1, 2), bias=bias)
    order = torch.tensor([0, 1, 2, 7, 3, 6, 4, 5])
    with torch.no_grad():
        mask = torch.zeros(12, 8, 1, 1)
        for group, channels in enumerate(order.view(2, 4)):
            mask[group * 6 : group * 6 + 6, channels] = 1
        layer.weight.mul_(mask)
    task = noise_task()
    x = task.calibration.x  # type: ignore[attr-defined]
    expected = layer(x).detach()
    edit = Group(ridge=1e-9)(layer, task, Work(tmp_path))
    torch.testing.assert_close(edit.model(x), expected, rtol=0, atol=1e-4)
    assert [set(half) for half in edit.model.order.view(2, 4).tolist()] == [{0, 1, 2, 7}, {3, 4, 5, 6}]
    assert (edit.model.grouped.bias is not None) == bias  # type: ignore[union-attr]
    assert edit.notes["relative_error"] == {"": pytest.approx(0, abs=1e-6)}


@pytest.mark.parametrize("groups", [2, 3])
def test_dealing_out_is_as_good_as_trying_all(groups: int) -> None:
    gains = torch.rand(6, groups, generator=torch.Generator().manual_seed(groups))
    size = 6 // groups

    def value(order: tuple[int, ...]) -> float:
        return sum(float(gains[channel, place // size]) for place, channel in enumerate(order))

    best = max(value(order) for order in itertools.permutations(range(6)))
    assert value(tuple(deal_out(gains, torch.arange(6)).tolist())) == pytest.approx(best)


def test_reasons() -> None:
    model = nn.Sequential(nn.Conv2d(8, 9, 3), nn.Conv2d(9, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3))
    edit = Group()(model, noise_task(), Work(Path()))
    assert [site.why for site in edit.sites] == [
        "its 9 outputs do not divide into 2 groups",
        "its 9 inputs do not divide into 2 groups",
        "it has groups (=2) already",
        "",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 0}, r"`groups` \(=0\) must be at least 1"),
        ({"images": 0}, r"`images` \(=0\) must be at least 1"),
        ({"shuffle": "random"}, r"`shuffle` \(='random'\) must be one of data, fixed"),
        ({"ridge": math.nan}, r"`ridge` \(=nan\) must be a finite number, 0 or more"),
        ({"gate": "time"}, r"`gate` \(='time'\) must be one of none, macs"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Group(**settings)  # type: ignore[arg-type]


def test_channels_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"`out_channels` \(=9\) must be divisible by `groups` \(=2\)"):
        GroupedConv2d(8, 9, 3, 2)
