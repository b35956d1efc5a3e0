"""Displacements that reach past the map: refused where they are fixed, since nothing but zeros would come out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from awkward import noise_task
from torch import nn

from compress.errors import ConfigError
from compress.models import shift_resnet20
from compress.nn.displace import Shift2d
from compress.nn.shift import ShiftConv2d
from compress.off_map import off_the_map
from compress.run import run
from compress.stages import FoldBatchNorm, Shift
from compress.task import Work


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_it_names_the_channels_that_come_out_as_zeros(stride: int, side: int) -> None:
    layer = Shift2d(18, 7, stride, start="random")
    for axis in (0, 1):
        torch.manual_seed(axis)
        layer.displacement.copy_(torch.randint(-3, 4, (18, 2)))
        zeros = int((layer(torch.ones(1, 18, side, side)).flatten(2).abs().amax((0, 2)) == 0).sum())
        told = off_the_map(nn.Sequential(layer), torch.ones(1, 18, side, side))
        assert bool(told) == bool(zeros)
        if told:
            assert told[0].startswith(f"`0` displaces {zeros} of 18 channels off its map of {side}x{side} pixels")


@pytest.mark.parametrize(("padding", "dilation", "side"), [(2, 1, 2), (4, 2, 3), ("same", 2, 3), (0, 1, 7), (2, 1, 3)])
def test_copies_of_a_shift_convolution(padding: int | str, dilation: int, side: int) -> None:
    layer = ShiftConv2d(1, 1, 5, 25, padding=padding, dilation=dilation, bias=False)
    zeros = 0
    for copy in range(25):
        with torch.no_grad():
            layer.pointwise.weight.zero_()[0, copy] = 1
        zeros += int(layer(torch.ones(1, 1, side, side)).abs().max() == 0)
    told = off_the_map(nn.Sequential(layer), torch.ones(1, 1, side, side))
    assert bool(told) == bool(zeros) and (not told or f"displaces {zeros} of 25 copies of channels" in told[0])


def test_learned_displacements_may_find_their_way_back() -> None:
    assert off_the_map(nn.Sequential(Shift2d(9, learn=True)), torch.ones(1, 9, 1, 1)) == []


def test_a_run_refuses_a_base_that_is_displaced_off_its_maps(tmp_path: Path) -> None:
    build = ("compress.models.shift_resnet20", {"shift": "random", "classes": 3, "channels": 2})
    with pytest.raises(ConfigError, match=r"off its map of 2x2 pixels \(displacements up to 3\).*larger images"):
        run([FoldBatchNorm()], noise_task((2, 8, 8)), build=build, out=tmp_path, measure="none")
    assert off_the_map(shift_resnet20(), torch.zeros(1, 3, 32, 32)) == []


def test_fixed_directions_off_the_map_are_refused_by_the_stage(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 9, 8), nn.ReLU(), nn.Conv2d(9, 4, 3, padding=1), nn.Flatten())
    stage = Shift(taps=1, places="grouped", exclude=["0"], images=32)
    with pytest.raises(ConfigError, match=r"`2` displaces 8 of 9 copies of channels off its map of 1x1 .* `exclude`"):
        stage(model, noise_task((2, 8, 8)), Work(tmp_path))


def test_images_may_lie_on_another_device_than_a_base_that_has_just_been_made() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).to("meta")
    assert off_the_map(model, torch.zeros(1, 2, 8, 8)) == []
