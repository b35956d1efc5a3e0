"""Sharing a budget out over layers, against a search of everything, and a shift network that meets its budget."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from awkward import AWKWARD, noise_task
from torch import nn

from compress.allocate import Choice, harm, share_out
from compress.errors import ConfigError
from compress.nn.shift import ShiftConv2d
from compress.reconstruct import own_equations, plain_images, solve
from compress.stages import Shift
from compress.task import Work
from compress.train import divergence


def convex(seed: int, layers: int, choices: int) -> dict[str, list[Choice]]:
    """Layers whose every further unit of cost helps less than the one before, as it is with taps, bits and ranks."""
    torch.manual_seed(seed)
    found = {}
    for layer in range(layers):
        gains = torch.rand(choices).sort(descending=True).values.cumsum(0)
        found[str(layer)] = [Choice(layer + (layer + 1) * n, float(gains[-1] - gains[n])) for n in range(choices)]
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [10, 17, 25, 40])
def test_near_the_best_of_all_ways(seed: int, budget: int) -> None:
    found = convex(seed, layers=4, choices=4)
    taken = share_out(found, budget)
    assert sum(found[name][i].cost for name, i in taken.items()) <= budget
    ways = itertools.product(*found.values())
    best = min(sum(c.harm for c in way) for way in ways if sum(c.cost for c in way) <= budget)
    worst = sum(each[0].harm for each in found.values())
    assert sum(found[name][i].harm for name, i in taken.items()) <= best + 0.15 * (worst - best)


def test_all_or_nothing() -> None:
    found = convex(0, layers=3, choices=4)
    assert share_out(found, 10**6) == {"0": 3, "1": 3, "2": 3}
    least = sum(each[0].cost for each in found.values())
    assert share_out(found, least) == {"0": 0, "1": 0, "2": 0}
    with pytest.raises(ValueError, match=f"must be at least {least}"):
        share_out(found, least - 1)


def test_a_choice_that_costs_more_and_harms_more_is_never_taken() -> None:
    assert share_out({"a": [Choice(1, 0.5), Choice(2, 0.7), Choice(3, 0.1)]}, 2) == {"a": 0}
    assert share_out({"a": [Choice(1, 0.5), Choice(2, 0.7), Choice(3, 0.1)]}, 3) == {"a": 2}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 6, 3, 2), nn.ReLU(), nn.Flatten()),
        nn.Linear(120, 3),
    ).eval()


def test_harm_is_the_divergence_with_the_layer_changed_and_nothing_else() -> None:
    model, images = net(), plain_images(noise_task().calibration, 32, torch.device("cpu"))
    old = model[2]
    new = nn.Conv2d(12, 6, 3, 2).eval()
    with torch.no_grad():
        wanted = [model(x) for x in images]
        by_hand = nn.Sequential(*model[:2], new, *model[3:])
        expected = divergence(torch.cat([by_hand(x) for x in images]), torch.cat(wanted))
    assert harm(model, old, new, images, wanted) == pytest.approx(expected, rel=1e-4)
    assert model[2] is old
    assert harm(model, old, old, images, wanted) == pytest.approx(0, abs=1e-6)


def test_equations_of_all_layers_in_one_pass() -> None:
    model, images = net(), plain_images(noise_task().calibration, 32, torch.device("cpu"))
    found = {str(n): model[n] for n in (0, 2)}
    for name, normal in own_equations(model, found, dict.fromkeys(found, 1), images).items():
        layer = found[name]
        solved = solve(normal, ridge=0.0)[0]
        assert layer.bias is not None
        torch.testing.assert_close(solved[:-1].mT.float(), layer.weight.flatten(1), rtol=0, atol=1e-3)
        torch.testing.assert_close(solved[-1].float(), layer.bias, rtol=0, atol=1e-3)


def test_a_shift_network_meets_its_budget_and_spends_it(tmp_path: Path) -> None:
    model = net()
    before = sum(p.numel() for p in model.parameters())
    edit = Shift(taps=9, budget=0.6, images=32)(model, noise_task(), Work(tmp_path))
    after = sum(p.numel() for p in edit.model.parameters())
    assert after <= 0.6 * before
    taps = {name: layer.taps for name, layer in edit.model.named_modules() if isinstance(layer, ShiftConv2d)}
    assert edit.notes["taps"] == taps
    one_more = min(
        layer.pointwise.weight.numel() // layer.taps + 2 * layer.in_channels
        for layer in edit.model.modules()
        if isinstance(layer, ShiftConv2d) and layer.taps < 9
    )
    assert after + one_more > 0.6 * before


def test_a_budget_that_cannot_be_met_names_the_least(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"`budget` \(=0.1\) must be at least 0\.\d+: one tap everywhere leaves so much"
    ) as caught:
        Shift(budget=0.1, images=32).check(net())
    least = float(str(caught.value).partition("at least ")[2].partition(":")[0])
    Shift(budget=least, images=32)(net(), noise_task(), Work(tmp_path))
    with pytest.raises(ConfigError, match="must be at least"):
        Shift(budget=least - 0.002).check(net())
    with pytest.raises(ConfigError, match=r"`budget` \(=1.5\) must be a share"):
        Shift(budget=1.5)


@pytest.mark.parametrize("name", AWKWARD)
def test_a_budget_makes_no_layer_larger(name: str, tmp_path: Path) -> None:
    model = AWKWARD[name]().eval()
    sizes = {n: sum(p.numel() for p in layer.parameters()) for n, layer in model.named_modules()}
    edit = Shift(taps=2, budget=0.8, images=32)(model, noise_task(), Work(tmp_path))
    assert edit.notes["taps"]
    for n, layer in edit.model.named_modules():
        if isinstance(layer, ShiftConv2d):
            assert sum(p.numel() for p in layer.parameters()) < sizes[n]
    assert sum(p.numel() for p in edit.model.parameters()) <= 0.8 * sizes[""]


def test_a_layer_that_is_never_called_keeps_its_share(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = net(), nn.Conv2d(8, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.used(x)
            return out

    edit = Shift(taps=4, budget=0.8, images=32)(Net().eval(), noise_task(), Work(tmp_path))
    assert set(edit.notes["taps"]) <= {"used.0", "used.2"} and edit.notes["parameters_left"] <= 0.8
