"""Copies that go, displacements that become zero, channels that nothing reads: against least squares by hand."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, SHAPE, noise_task
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.nn.displace import Shift2d, ShiftPool2d
from compress.nn.masked import mask_of
from compress.nn.shift import ShiftConv2d
from compress.shift_pruning import Copies, alive_copies, drop_while, equations, places_with_zero
from compress.stage import Edit
from compress.stages import PruneShifts, Shift
from compress.surgery import layers
from compress.task import Work


def prune(model: nn.Module, folder: Path, **settings: Any) -> Edit:
    torch.manual_seed(0)
    return PruneShifts(**{"images": 32, **settings})(model, noise_task(), Work(folder))


def shift(copies: list[list[tuple[int, int]]], outputs: int = 6, **more: Any) -> ShiftConv2d:
    """A layer whose channels have copies at these (y, x)."""
    layer = ShiftConv2d(len(copies), outputs, 3, len(copies[0]), padding=1, **more)
    with torch.no_grad():
        layer.displacement.copy_(torch.tensor(copies))
    return layer


def carrying(layer: nn.Module) -> list[set[tuple[int, int]]]:
    """For each channel of a shift layer, where its copies that have weight stand."""
    assert isinstance(layer, ShiftConv2d)
    weight = layer.pointwise.weight.detach().reshape(layer.groups, layer.out_channels // layer.groups, -1)
    each = weight.any(1).view(layer.in_channels, layer.taps)
    return [
        {tuple(place) for place, has in zip(places, some, strict=True) if has}
        for places, some in zip(layer.displacement.int().tolist(), each.tolist(), strict=True)
    ]


def apart(y: Tensor, wanted: Tensor) -> float:
    """The squared error as a share of the squares."""
    return float((y - wanted).detach().square().sum() / wanted.detach().square().sum())


def network(layer: nn.Module, channels: int) -> nn.Module:
    """The layer behind a convolution and in front of a head."""
    with torch.no_grad():
        width = layer(torch.zeros(1, channels, 9, 11)).shape[1]
    first = (nn.Conv2d(8, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
    return nn.Sequential(*first, layer, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)).eval()


@pytest.mark.parametrize("name", AWKWARD)
def test_copies_without_weight_go_and_nothing_else_changes(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AWKWARD[name]().eval()
    model = Shift(taps=2, images=32)(model, noise_task(), Work(tmp_path)).model
    wanted = {}
    for at, layer in layers(model, (ShiftConv2d,)).items():
        assert isinstance(layer, ShiftConv2d)
        gone = torch.rand(layer.in_channels // layer.groups * layer.taps) < 0.4
        gone[0], gone[-1] = True, False
        with torch.no_grad():
            layer.pointwise.weight[:, gone] = 0
        wanted[at] = carrying(layer)
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    edit = prune(model, tmp_path, harm=0, zero=0, channels=False)
    torch.testing.assert_close(edit.model(x), expected, rtol=1e-4, atol=1e-5)
    for at, layer in layers(edit.model, (ShiftConv2d,)).items():
        assert isinstance(layer, ShiftConv2d)
        assert carrying(layer) == wanted[at]
        assert layer.taps == max(1, *map(len, wanted[at]))
        left = sum(map(len, wanted[at]))
        assert edit.notes["copies"][at] == [2 * layer.in_channels, left]  # type: ignore[index,call-overload]
        places = [{tuple(place) for place in each} for each in layer.displacement.tolist()]
        assert all(len(each) == layer.taps for each in places)  # every copy has a place of its own
        masked = mask_of(layer.pointwise)
        assert (masked is None) == (left == layer.taps * layer.in_channels)
    edit = prune(edit.model, tmp_path, harm=0.1, zero=0.9, channels=False)
    assert edit.notes["total"]["zeroed"] > 0  # type: ignore[index,call-overload,operator]
    for at, layer in layers(edit.model, (ShiftConv2d,)).items():
        assert isinstance(layer, ShiftConv2d)
        before, after = ([place for each in places for place in each] for places in (wanted[at], carrying(layer)))
        assert edit.notes["copies"][at] == [len(before), len(after)]  # type: ignore[index,call-overload]
        assert after.count((0, 0)) <= before.count((0, 0)) + edit.notes["zeroed"][at]  # type: ignore[index,call-overload]
        y = torch.randn(2, layer.in_channels, 9, 11)
        torch.testing.assert_close(layer.lower("onnxruntime")(y), layer(y), rtol=1e-4, atol=1e-5)


def displaced(x: Tensor, dy: int, dx: int) -> Tensor:
    """y[h, w] = x[h + dy, w + dx], zeros outside."""
    wide = F.pad(x, (1, 1, 1, 1))
    return wide[..., 1 + dy : 1 + dy + x.shape[-2], 1 + dx : 1 + dx + x.shape[-1]]


def least_error(features: list[Tensor], y: Tensor) -> float:
    """What least squares leave of y, as a share of its squares, with a constant among the features."""
    a = torch.stack([*features, torch.ones_like(features[0])], 1)
    left = y - a @ torch.linalg.lstsq(a, y).solution
    return float(left.square().sum() / y.square().sum())


def test_elimination_is_what_brute_force_finds() -> None:
    torch.manual_seed(1)
    places = [[(0, 0), (0, 1), (1, 0)], [(-1, 0), (0, -1), (1, 1)]]
    layer = shift(places, outputs=4)
    x = F.avg_pool2d(torch.randn(16, 2, 11, 11), 3, 1)  # neighbours are alike
    y = layer(x).detach()
    normal = equations(layer, places_with_zero(layer), [(x, y)], 16)
    copies = Copies(layer, alive_copies(layer), normal, 0.0)
    target = y.double().permute(0, 2, 3, 1).reshape(-1, 4)
    feature = {
        (c, place): displaced(x, *place)[:, c].double().flatten() for c in (0, 1) for place in (*places[c], (0, 0))
    }
    left = [(c, place) for c in (0, 1) for place in places[c]]
    while len(left) > 2:
        errors = {out: least_error([feature[each] for each in left if each != out], target) for out in left}
        best = min(errors, key=errors.__getitem__)
        before = least_error([feature[each] for each in left], target)
        assert copies.rise() == pytest.approx(errors[best] - before, rel=1e-4)
        copies.drop()
        left.remove(best)
        assert copies.error == pytest.approx(errors[best], rel=1e-4)
        new, stays = copies.rebuilt()
        assert {(c, p) for c, each in enumerate(carrying(new)) for p in each} == set(left)
        assert apart(new(x), y) == pytest.approx(errors[best], rel=1e-3)  # the weights are the solution
        assert int(stays.sum()) == len(left)
    while True:
        moves = {
            (c, place): least_error([feature[e] for e in left if e != (c, place)] + [feature[c, (0, 0)]], target)
            for c, place in left
            if (c, (0, 0)) not in left
        }
        before = least_error([feature[each] for each in left], target)
        if not moves:
            break
        best = min(moves, key=moves.__getitem__)
        rise = moves[best] - before
        moved = copies.moved
        copies.move_to_zero(rise - 1e-4)
        assert copies.moved == moved
        copies.move_to_zero(rise + 1e-4)
        assert copies.moved == moved + 1
        assert copies.error == pytest.approx(moves[best], rel=1e-4)
        left[left.index(best)] = (best[0], (0, 0))
        assert {(c, p) for c, each in enumerate(carrying(copies.rebuilt()[0])) for p in each} == set(left)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_copy_with_little_energy_goes(groups: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = shift([[(0, 1), (1, 0)]] * 8, groups=groups)
    with torch.no_grad():
        layer.pointwise.weight[:, 1::2] *= 0.01  # of one size with the others before: 1e-4 of the energy
    model = nn.Sequential(layer).eval()
    x = torch.cat([x for x, _ in noise_task().calibration])
    parts = layer.pointwise.weight.detach().clone()
    with pytest.raises(ConfigError, match=r"would change nothing.*all its copies stay: each costs more than `harm`"):
        prune(copy.deepcopy(model), tmp_path, harm=1e-6, zero=0)
    edit = prune(copy.deepcopy(model), tmp_path, harm=1e-3, zero=0)
    new: Any = edit.model[0]  # type: ignore[index]
    assert carrying(new) == [{(0, 1)}] * 8 and new.taps == 1
    assert mask_of(new.pointwise) is None
    error = apart(new(x), layer(x))
    assert error == pytest.approx(1e-4, rel=0.3)
    assert edit.notes["relative_error"]["0"] == pytest.approx(error, rel=0.1)  # type: ignore[index,call-overload]
    torch.testing.assert_close(new.pointwise.weight, parts[:, 0::2], rtol=0.05, atol=1e-3)
    assert edit.sites[0].after == describe_of(new) + ", 8 of 16 copies"


def describe_of(layer: ShiftConv2d) -> str:
    return f"ShiftConv2d({layer.extra_repr()})"


def test_an_amount_takes_the_cheapest_of_all_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(*(shift([[(0, 0), (0, 1), (1, 1)]] * 8, outputs=8) for _ in range(2))).eval()
    with torch.no_grad():
        model[0].pointwise.weight[:, 0:6] *= 1e-3  # both of the first layer's first two channels
    edit = prune(copy.deepcopy(model), tmp_path, amount=6 / 48, zero=0, channels=False)
    assert edit.notes["requested"] == edit.notes["achieved"] == 6 / 48
    assert edit.notes["copies"] == {"0": [24, 18], "1": [24, 24]}
    assert [len(each) for each in carrying(edit.model[0])] == [0, 0, *[3] * 6]  # type: ignore[index]
    assert "others cost less" in next(site.why for site in edit.sites if site.name == "1")
    edit = prune(copy.deepcopy(model), tmp_path, amount=0.9, zero=0, channels=False)
    assert sum(len(each) for layer in edit.model for each in carrying(layer)) == 48 - round(0.9 * 48)  # type: ignore[union-attr,attr-defined]
    with pytest.raises(ConfigError, match=r"`amount` \(=0.97\) must be at most 0.9583, the closest: of 48 copies 2"):
        prune(model, tmp_path, amount=0.97)


def test_displacements_become_zero_where_that_serves_as_well(tmp_path: Path) -> None:
    """The first channel is as bright everywhere, the second one is noise."""
    torch.manual_seed(0)
    layer = shift([[(0, 1)], [(0, 1)]], outputs=4)
    layer.padding = (0, 0)
    model = network(layer, 2)
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0] = 0, 1  # type: ignore[index,operator]
    x = noise_task().example
    expected = model(x)
    edit = prune(model, tmp_path, harm=0, zero=1e-4)
    torch.testing.assert_close(edit.model(x), expected, rtol=1e-3, atol=1e-3)
    new: Any = edit.model[3]  # type: ignore[index]
    assert new.displacement.tolist() == [[[0, 0]], [[0, 1]]]
    assert edit.notes["zeroed"] == {"3": 1} and edit.notes["total"]["zeroed"] == 1  # type: ignore[index,call-overload]
    assert next(site.after for site in edit.sites).endswith(", 2 of 2 copies, 1 moved to zero")  # type: ignore[union-attr]


def test_a_lone_shift_stays_where_its_map_hardly_changes(tmp_path: Path) -> None:
    """Of an even map, displaced by a column, the last column changes: a tenth of the ten that are left of eleven."""
    model = network(Shift2d(9), 9)
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = 0, 1  # type: ignore[index,operator]
        model[0].weight[8], model[0].bias[8] = 0, -1  # type: ignore[index,operator]  # nothing behind the ReLU
        before = model[3].displacement.clone()  # type: ignore[union-attr,operator,index]
        assert before[5].tolist() == [0, 1]
    edit = prune(copy.deepcopy(model), tmp_path, zero=0.1001)
    assert (edit.model[3].displacement - before).any(1).nonzero().flatten().tolist() == [5, 8]  # type: ignore[index,union-attr,operator]
    assert edit.sites[0].after == "Shift2d(9, 3x3, whole pixels), 2 displacements to zero"
    assert edit.model[3].displacement[[5, 8]].abs().sum() == 0  # type: ignore[index,union-attr]
    edit = prune(copy.deepcopy(model), tmp_path, zero=0.0999)
    assert (edit.model[3].displacement - before).any(1).nonzero().flatten().tolist() == [8]  # type: ignore[index,union-attr,operator]
    with pytest.raises(ConfigError, match=r"`amount` .* of which none is taken"):
        prune(model, tmp_path, amount=0.5)


def test_a_strided_shift_is_measured_where_it_lands(tmp_path: Path) -> None:
    model = network(ShiftPool2d(9, 3, 2, 1, (1, 1)), 9)
    model[3] = nn.Sequential(model[3], Shift2d(9, stride=2))  # type: ignore[index]
    edit = prune(model, tmp_path, zero=0.999)
    assert {site.name for site in edit.sites} == {"3.0.shift", "3.1"}


def test_the_solution_is_nearer_than_the_copies_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = shift([[(0, 0), (0, 1), (1, 0)]] * 4)
    model = nn.Sequential(nn.AvgPool2d(3, 1, 1), layer).eval()
    model[0] = nn.Sequential(nn.Conv2d(8, 4, 1), model[0])
    x = torch.cat([x for x, _ in noise_task().calibration])
    wanted = model(x)
    edit = prune(copy.deepcopy(model), tmp_path, amount=0.5, zero=0, channels=False)
    error = apart(edit.model(x), wanted)
    assert error == pytest.approx(edit.notes["relative_error"]["1"], rel=0.02)  # type: ignore[index,call-overload]
    left = [(c, place) for c, each in enumerate(carrying(edit.model[1])) for place in each]  # type: ignore[index]
    inputs = model[0](x).detach().double()
    features = [displaced(inputs, *place)[:, c].flatten() for c, place in left]
    best = least_error(features, wanted.double().permute(0, 2, 3, 1).reshape(-1, 6).detach())
    assert 0.999 * best <= error < 1.02 * best + 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"harm": 0.1, "amount": 0.5}, r"`harm` \(=0.1\) and `amount` \(=0.5\) both say how many copies go"),
        ({"harm": -0.1}, r"`harm` \(=-0.1\) must be at least 0 and below 1"),
        ({"zero": 1.0}, r"`zero` \(=1.0\) must be at least 0 and below 1"),
        ({"zero": math.nan}, r"`zero` \(=nan\) must be at least 0"),
        ({"amount": 1.0}, r"`amount` \(=1.0\) must be above 0 and below 1"),
        ({"images": 0}, r"`images` \(=0\) must be at least 1"),
        ({"ridge": math.inf}, r"`ridge` \(=inf\) must be a finite number"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneShifts(**settings)


def test_layers_are_dropped_from_evenly_by_cost() -> None:
    """With two groups of outputs, each keeps a copy, and the path goes over both by what they cost."""
    torch.manual_seed(0)
    layer = shift([[(0, 0), (0, 1)]] * 4, outputs=4, groups=2)
    with torch.no_grad():
        layer.pointwise.weight[:2] *= 0.1
    x = torch.randn(16, 4, 9, 9)
    copies = Copies(layer, alive_copies(layer), equations(layer, places_with_zero(layer), [(x, layer(x))], 16), 1e-6)
    rises = []
    while math.isfinite(copies.rise()):
        rises.append(copies.rise())
        drop_while([copies], lambda each, n=copies.left: each.left == n)  # type: ignore[misc]
    assert len(rises) == 6 and copies.left == 2
    assert [int(copies.alive[group].sum()) for group in (slice(0, 2), slice(2, 4))] == [1, 1]
    assert max(rises[:3]) < min(rises[3:]) and all(a <= b for a, b in itertools.pairwise(rises))
