"""`Prune`: which weights go, how many in each layer, what is solved anew, what the file takes, what stays zero."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, SHAPE, noise_task
from random_task import quantize, task, warm
from test_cluster import Tied
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.errors import ConfigError, DataError
from compress.lower import lower
from compress.models import resnet20, small
from compress.nn.masked import MaskedWeight, among_largest
from compress.nn.shift import ShiftConv2d
from compress.stage import Edit
from compress.stages import Cluster, Prune
from compress.task import Work


def prune(model: nn.Module, **settings: object) -> Edit:
    settings = {"images": 32} | settings
    return Prune(**settings)(model, noise_task(), Work(Path()))  # type: ignore[arg-type]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight == 0 for name, weight in weights(model).items()}


def digits() -> nn.Module:
    """A net for the 8-channel noise, with layers of different scales."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
    )
    model[2].weight.data.mul_(3)
    return warm(model, SHAPE)


def test_the_globally_smallest_go() -> None:
    model = digits()
    before = weights(model)
    flat = torch.cat([weight.flatten() for weight in before.values()]).abs()
    threshold = flat.sort().values[round(0.6 * len(flat))]
    edit = prune(model, amount=0.6, refit=False)
    for name, weight in weights(edit.model).items():
        stays = before[name].abs() >= threshold
        assert torch.equal(weight, before[name] * stays)
    assert edit.notes["requested"] == 0.6 and edit.notes["achieved"] == pytest.approx(0.6, abs=1e-3)
    share = {name: float((weight == 0).float().mean()) for name, weight in weights(model).items()}
    assert edit.notes["zeros"] == pytest.approx(share)
    assert edit.sites[1].after == f"{share['2']:.1%} of 2304 weights are zero"


def test_a_share_of_each_layer_and_shares_by_pattern() -> None:
    edit = prune(digits(), amount=0.25, scope="layer", layers={"7": 0.5, "2*": 0.75}, refit=False)
    assert edit.notes["zeros"] == pytest.approx({"0": 0.25, "2": 0.75, "7": 0.5})
    edit = prune(digits(), amount=0.4, layers={"7": 0.5}, refit=False)
    counts = {name: int(gone.sum()) for name, gone in zeros(edit.model).items()}
    assert counts["0"] + counts["2"] == round(0.4 * (1152 + 2304)) and counts["7"] == 24


def test_floors_hold_and_others_make_up_for_it() -> None:
    counts = {name: int((~gone).sum()) for name, gone in zeros(prune(digits(), amount=0.9, refit=False).model).items()}
    assert sum(counts.values()) == 3504 - round(0.9 * 3504)
    floored = {n: int((~gone).sum()) for n, gone in zeros(prune(digits(), amount=0.9, floor=0.05).model).items()}
    assert sum(floored.values()) == sum(counts.values())
    assert counts["0"] < math.ceil(0.05 * 1152) <= floored["0"] and floored["7"] >= 3
    edit = prune(digits(), amount=0.99, refit=False)
    assert {n: int((~gone).sum()) for n, gone in zeros(edit.model).items()} == {"0": 16, "2": 16, "7": 3}
    assert edit.notes["achieved"] == pytest.approx(1 - 35 / 3504)


def test_taylor_scores_are_squares_of_weight_times_gradient() -> None:
    model = digits()
    before = weights(model)
    expected = {name: torch.zeros_like(weight) for name, weight in before.items()}
    for x, y in noise_task().calibration:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name in before:
            weight = model.get_submodule(name).weight
            expected[name] += (weight.detach() * weight.grad).square()
    flat = torch.cat([score.flatten() for score in expected.values()])
    threshold = flat.sort().values[round(0.5 * len(flat))]
    edit = prune(digits(), by="taylor", refit=False)
    agree = [((expected[n] < threshold) == gone).float().mean() for n, gone in zeros(edit.model).items()]
    assert min(agree) > 0.995


def test_two_of_four_input_channels_stay() -> None:
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=2), nn.Flatten(), nn.Linear(280, 3)
    )
    before = weights(model)
    edit = prune(model, pattern="2:4", refit=False)
    for name, weight in weights(edit.model).items():
        assert torch.equal(weight != 0, among_largest(before[name].abs(), "2:4"))
        assert (weight.movedim(1, -1).reshape(-1, 4) != 0).sum(1).eq(2).all()
    assert edit.sites[0].after == "50.0% of 1152 weights are zero (2:4)"
    with pytest.raises(ConfigError, match=r"`pattern` \(=4:8\) needs multiples of 8 .* 2 has 4; put it into `exclude`"):
        prune(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2)), pattern="4:8")
    with pytest.raises(ConfigError, match=r"no layer has that: 0 has 8, 2 has 4; take `pattern: 2:4` instead"):
        prune(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1, groups=2)), pattern="2:5")


@pytest.mark.parametrize("settings", [{"amount": 0.7}, {"pattern": "1:4", "exclude": ["7"]}])
def test_refit_lowers_the_error_and_touches_no_zero(settings: dict[str, object]) -> None:
    plain, solved = (prune(digits(), **settings, refit=refit) for refit in (False, True))
    for name, gone in zeros(plain.model).items():
        assert torch.equal(zeros(solved.model)[name], gone)
    x = noise_task().calibration.x  # type: ignore[attr-defined]  # of the noise
    with torch.no_grad():
        wanted = digits()[:3](x)  # type: ignore[index]  # a Sequential, here and below
        plain_error, solved_error = (
            float((edit.model[:3](x) - wanted).square().sum() / wanted.square().sum())  # type: ignore[index,operator]
            for edit in (plain, solved)
        )
    assert solved_error < 0.9 * plain_error
    assert solved.notes["relative_error"]["2"] == pytest.approx(solved_error, rel=0.01)  # type: ignore[index,call-overload]


def test_refit_with_everything_kept_in_an_output_is_least_squares() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    layer.weight.data[0] *= 100
    model = nn.Sequential(nn.Flatten(), nn.Linear(792, 8), layer)
    x = noise_task().calibration.x.flatten(1) @ model[1].weight.mT + model[1].bias  # type: ignore[attr-defined]
    y = layer(x)
    prune(model, amount=0.5, include=["2"], ridge=0.0)
    for output in range(4):
        stays = model[2].weight[output] != 0
        design = torch.cat((x[:, stays], torch.ones(len(x), 1)), 1).detach().double()
        solution = torch.linalg.lstsq(design, y[:, output : output + 1].detach().double()).solution.flatten()
        torch.testing.assert_close(model[2].weight[output][stays].double(), solution[:-1], rtol=1e-3, atol=1e-4)
        assert float(model[2].bias[output].detach()) == pytest.approx(float(solution[-1]), abs=1e-3)


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_convolutions(name: str) -> None:
    torch.manual_seed(0)
    model = AWKWARD[name]().eval()
    plain = copy.deepcopy(model)
    edit = prune(model, amount=0.4, scope="layer")
    assert all(site.after for site in edit.sites)
    convolutions = [[m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (edit.model, plain)]
    for module, other in zip(*convolutions, strict=True):
        assert int((module.weight == 0).sum()) == round(0.4 * module.weight.numel())
        other.weight.data.copy_(module.weight.detach())
        if other.bias is not None:
            other.bias.data.copy_(module.bias.detach())
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(edit.model(x), plain(x))
    torch.testing.assert_close(lower(edit.model, "onnxruntime")(x), plain(x))


def test_a_second_time_raises_the_amount() -> None:
    model = prune(digits(), amount=0.5).model
    first = zeros(model)
    edit = prune(model, amount=0.8, by="taylor")
    second = zeros(edit.model)
    assert all(bool((second[name] >= gone).all()) for name, gone in first.items())
    assert sum(int(gone.sum()) for gone in second.values()) == round(0.8 * 3504)
    chain = edit.model[2].parametrizations.weight  # type: ignore[index,union-attr]
    assert [type(part) for part in chain] == [MaskedWeight]  # type: ignore[union-attr]


def test_schedules_start_with_what_is_there_and_say_when_they_end() -> None:
    edit = prune(digits(), amount=0.5, schedule="linear", epochs=3, updates=2)
    assert (edit.notes["steps"], edit.notes["every"]) == (6, 1)
    share = edit.notes["zeros"]["2"]  # type: ignore[index,call-overload]
    assert edit.sites[1].after == f"from 0.0% zeros to {share:.1%} of 2304 weights in 6 steps, linear"
    assert not any(gone.any() for gone in zeros(edit.model).values())
    assert prune(digits(), schedule="cubic", epochs=3, every=4).notes["every"] == 4


def test_layers_that_are_kept_say_why() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1, groups=8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    nn.init.zeros_(model[2].weight)
    nn.utils.parametrizations.weight_norm(model[3])
    sites = prune(model).sites
    assert sites[0].why == "its 8 weights have to stay (`floor`, or as many as a layer has outputs)"
    assert sites[1].after == "50.0% of 576 weights are zero"
    assert sites[2].why == "all its weights are zero, and zeros stay zero in training; train it first"
    assert sites[3].why == "its weight is parametrized by something that a mask must not follow"
    whys = {site.name: site.why for site in prune(Tied(), refit=False).sites}
    assert whys["one"] == whys["two"] == "it has a parameter that is another layer's too" and not whys["own"]
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data.add_(100)
    assert prune(model, amount=0.2, refit=False).sites[1].why == (
        "all its weights that are not zero are among those that stay"
    )


def test_layers_of_ours_are_pruned_inside_after_settling() -> None:
    torch.manual_seed(0)
    layer = ShiftConv2d(8, 16, 3, 3, padding=1, learn=True)
    layer.displacement.data[:, 1] = layer.displacement.data[:, 0]  # two copies meet
    model = nn.Sequential(layer, nn.ReLU(), nn.Flatten(), nn.Linear(16 * 99, 3))
    edit = prune(model, amount=0.6, scope="layer")
    assert edit.sites[0].after == "59.9% of 384 weights are zero" and not layer.learn
    assert edit.sites[0].why == "not solved anew: no single convolution"
    assert parametrize.is_parametrized(layer.pointwise, "weight")
    before = layer.pointwise.weight.detach().clone()
    layer.settle()
    assert torch.equal(layer.pointwise.weight, before)
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(lower(model, "onnxruntime")(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_mistakes_are_told(tmp_path: Path) -> None:
    for settings, message in (
        ({"amount": 1.0}, r"`amount` \(=1.0\) must be above 0 and below 1"),
        ({"layers": {"fc*": 0.0}}, r"`layers.fc\*` \(=0.0\) must be above 0 and below 1"),
        ({"scope": "block"}, r"`scope` \(='block'\) must be one of global, layer"),
        ({"by": "luck"}, r"`by` \(='luck'\) must be one of magnitude, movement, taylor"),
        ({"by": "movement"}, r"`by` \(=movement\) is told by training, .* take linear or cubic, or `by: taylor`"),
        ({"schedule": "cubic", "refit": True}, r"`refit` \(=true\) solves what is left at once"),
        ({"pattern": "2/4"}, r"`pattern` \(='2/4'\) must read N:M"),
        ({"pattern": "1:4", "amount": 0.5}, r"`amount` \(=0.5\) must be 0.75, as `pattern` \(=1:4\) says; drop it"),
        ({"pattern": "2:4", "floor": 0.1}, r"`floor` \(=0.1\) has no say beside `pattern`"),
        ({"floor": 1.0}, r"`floor` \(=1.0\) must be at least 0 and below 1"),
        ({"epochs": 0.0}, r"`epochs` \(=0.0\) must be above 0"),
        ({"every": 0}, r"`every` \(=0\) must be at least 1"),
        ({"ridge": -1.0}, r"`ridge` \(=-1.0\) must be a finite number, 0 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            Prune(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"`layers` has the pattern 'fc\*', which matches no layer"):
        prune(digits(), layers={"fc*": 0.4})
    broken = digits()
    broken[0].weight.data[3, 4] = float("nan")
    with pytest.raises(DataError, match="the weights of `0` hold NaN or infinity"):
        prune(broken)
    with pytest.raises(ConfigError, match="the model is clustered already; put `Prune` before `Cluster`"):
        prune(Cluster()(warm(small(channels=3)), task(), Work(tmp_path)).model)
    with pytest.raises(ConfigError, match="the model is quantized already; put `Prune` before `Quantize`"):
        prune(quantize(warm(resnet20()), tmp_path).model)
