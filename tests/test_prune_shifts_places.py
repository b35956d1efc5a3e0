"""Where displacements end up: settled whatever else happens, at zero where that serves as well, else left and told."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import noise_task
from test_prune_shifts import network, prune, shift
from torch import nn

from compress.errors import ConfigError
from compress.nn.displace import Shift2d
from compress.shift_pruning import Copies, Sweep, alive_copies, equations, places_with_zero

EXAMPLE = noise_task().example


def test_learned_layers_settle_though_nothing_of_them_goes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, lone, still = shift([[(0, 1), (1, 0)]] * 6, learn=True), Shift2d(6, learn=True), Shift2d(6)
    with torch.no_grad():
        layer.displacement += 0.3 * torch.rand(6, 2, 2)  # type: ignore[misc]  # a parameter
        lone.displacement.copy_(torch.tensor([0.4, -0.6]))
    model = network(nn.Sequential(layer, lone, still), 6)
    expected = model(EXAMPLE)
    edit = prune(copy.deepcopy(model), tmp_path, harm=0)
    torch.testing.assert_close(edit.model(EXAMPLE), expected)
    new: Any = edit.model[3]  # type: ignore[index]
    assert new[0].displacement.tolist() == [[[0, 1], [1, 0]]] * 6 and new[1].displacement.tolist() == [[0, -1]] * 6
    assert not list(new[1].parameters()) and not any(part.learn for part in new)
    assert not any(parameter.requires_grad for name, parameter in new.named_parameters() if "displacement" in name)
    told = {site.name: (site.after, site.why) for site in edit.sites}
    assert told["3.0"] == (
        "ShiftConv2d(6, 6, 2 of 3x3), displacements fixed",
        "all its copies stay: each costs more than `harm` (=0)",
    )
    reason = "`zero` (=0) leaves displacements as they are; try 0.01, say"
    assert told["3.1"] == ("Shift2d(6, 3x3, whole pixels), displacements fixed", reason)
    assert told["3.2"] == (None, reason)
    with pytest.raises(ConfigError, match=r"would change nothing.*`zero` \(=0\) leaves .*all its copies stay"):
        prune(edit.model, tmp_path, harm=0)


def test_what_is_settled_says_what_went_as_well(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = shift([[(0, 1), (1, 0)]] * 6, learn=True)
    with torch.no_grad():
        layer.pointwise.weight[:, 0] = 0
    edit = prune(network(layer, 6), tmp_path, harm=0)
    assert edit.sites[0].after.endswith(", 11 of 12 copies, displacements fixed")  # type: ignore[union-attr]
    model = network(Shift2d(9, learn=True), 9)
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = 0, 1  # type: ignore[index]  # as bright everywhere
    edit = prune(model, tmp_path, zero=0.2)
    assert edit.sites[0].after == "Shift2d(9, 3x3, whole pixels), 1 displacements to zero, displacements fixed"


def test_zero_says_within_what_nothing_moved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no displacement that is not zero becomes zero within `zero` \(=1e-09\)"):
        prune(network(Shift2d(9), 9), tmp_path, zero=1e-9)


def test_a_target_that_looks_like_the_copy_takes_its_place() -> None:
    """Their equations are singular: only once the copy is gone there is something to explain."""
    weights = torch.tensor([[3.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    sweep = Sweep(torch.full((2, 2), 4.0, dtype=torch.float64), weights, torch.tensor([True, False]))
    assert sweep.matrix[1, 1] == 0
    rise = sweep.rises_by_moving(torch.tensor([[0]]), torch.tensor([1]))
    assert rise.tolist() == [[0.0]]
    for feature in (0, 1):
        sweep.pivot(feature)
    assert sweep.weights[1].tolist() == [3, -1]


@pytest.mark.parametrize("beyond", [0.0, -1.0])
def test_a_target_that_others_explain_is_no_place_to_move_to(beyond: float) -> None:
    """What is left of it rounds to nothing, or below."""
    gram = torch.tensor([[2.0, 0.0, 0.0], [0.0, 4.0, 4.0], [0.0, 4.0, 4.0 + beyond]], dtype=torch.float64)
    weights = torch.tensor([[1.0], [1.0], [0.0]], dtype=torch.float64)
    sweep = Sweep(gram, weights, torch.tensor([True, True, False]))
    assert sweep.rises_by_moving(torch.tensor([[0]]), torch.tensor([2])).tolist() == [[math.inf]]


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_where_a_channel_stands_twice_weights_stay_finite(ridge: float) -> None:
    torch.manual_seed(0)
    layer = shift([[(0, 1)], [(0, 0)]], outputs=4)
    x = torch.randn(16, 1, 9, 9).expand(-1, 2, -1, -1)
    y = layer(x).detach()
    copies = Copies(layer, alive_copies(layer), equations(layer, places_with_zero(layer), [(x, y)], 16), ridge)
    copies.move_to_zero(0.01)
    assert copies.moved == 0
    copies.move_to_zero(0.999)
    new, _ = copies.rebuilt()
    assert bool(new.pointwise.weight.isfinite().all()) and math.isfinite(copies.error)


def test_what_is_not_a_number_stops_it() -> None:
    torch.manual_seed(0)
    layer = shift([[(0, 1)]] * 3, outputs=4)
    x = torch.randn(16, 3, 9, 9)
    copies = Copies(layer, alive_copies(layer), equations(layer, places_with_zero(layer), [(x, layer(x))], 16), 0.0)
    copies.sweeps[0].weights[1] = math.nan
    copies.move_to_zero(0.999)
    assert copies.moved == 0 and copies.error == 0
