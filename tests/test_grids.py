"""The grids that weights and activations can be put on beside the usual one, and how their scales are found."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from random_task import Images, quantize, task, warm
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress import checkpoint
from compress.errors import ConfigError, DataError
from compress.models import small
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight, nearest_power
from compress.nn.straight_through import fake_quantized
from compress.stage import Edit
from compress.stages.quantize import Quantize
from compress.task import Task, Work

BUILD = ("compress.models.small", {"classes": 10, "channels": 3})


def grids(model: nn.Module) -> list[FakeQuantizeWeight]:
    return [module for module in model.modules() if isinstance(module, FakeQuantizeWeight)]


def affine(weight: Tensor, bits: int) -> Tensor:
    """Asymmetric rounding of one run of weights, in plain words."""
    low, high = min(float(weight.min()), 0.0), max(float(weight.max()), 0.0)
    scale = (high - low) / (2**bits - 1)
    zero = round(-low / scale)
    return ((weight / scale).round() + zero).clamp(0, 2**bits - 1).sub(zero) * scale


def test_nearest_power_is_the_nearest_of_a_list() -> None:
    x = torch.cat((torch.linspace(-70, 70, 4001), torch.tensor([0.0, 0.49, 0.5, 0.75, 1.5, 3.0, 6.0, 48.0])))
    known = torch.tensor([0.0] + [sign * 2.0**k for sign in (1, -1) for k in range(8)])
    distance = (nearest_power(x) - x).abs()
    torch.testing.assert_close(distance, (x[:, None] - known).abs().amin(1))
    assert set(nearest_power(x).tolist()) <= set(known.tolist())


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (3, 4), (4, 64)])
def test_powers_of_two_fit_int8_and_come_back_the_same(bits: int, largest: int) -> None:
    weight = torch.randn(6, 5, 3, 3)
    grid = FakeQuantizeWeight(bits, 6, grid="power_of_two")
    quantized = grid(weight)
    integers = grid.eval().integers(weight)
    assert integers.dtype == torch.int8 and int(integers.abs().max()) == largest
    assert len(integers.unique()) <= 2**bits - 1
    assert bool((integers.abs().log2() % 1 == 0)[integers != 0].all())
    assert torch.equal(grid.values(integers, torch.float32), quantized)
    assert torch.equal(grid(quantized), quantized) and torch.equal(grid.integers(quantized), integers)


@pytest.mark.parametrize("bits", [3, 8])
def test_zero_points_follow_a_lopsided_weight(bits: int) -> None:
    weight = torch.rand(4, 9) * torch.tensor([1.0, 2, 3, 4]).view(-1, 1) - 0.2
    weight[3] = weight[3].abs()
    grid = FakeQuantizeWeight(bits, 4, symmetric=False)
    quantized = grid(weight)
    for row, expected in zip(quantized, weight, strict=True):
        torch.testing.assert_close(row, affine(expected, bits), atol=1e-5, rtol=0)
    integers = grid.eval().integers(weight)
    assert torch.equal(grid.values(integers, torch.float32), quantized)
    assert torch.equal(grid.integers(quantized), integers)


@pytest.mark.parametrize("runs", [1, 8, 24])
def test_runs_have_a_scale_of_their_own(runs: int) -> None:
    weight = torch.randn(8, 3, 3, 1)
    grid = FakeQuantizeWeight(4, runs)
    quantized = grid(weight)
    for part, expected in zip(quantized.reshape(runs, -1), weight.reshape(runs, -1), strict=True):
        scale = expected.abs().max() / 7
        torch.testing.assert_close(part, (expected / scale).round() * scale)


@pytest.mark.parametrize(("symmetric", "grid"), [(True, "uniform"), (False, "uniform"), (True, "power_of_two")])
def test_a_learned_scale_has_the_gradient_of_the_paper(symmetric: bool, grid: str) -> None:
    """Esser et al., equation 3: -w/s + round(w/s) inside, the limits outside, over sqrt(count x largest)."""
    torch.manual_seed(0)
    weight = torch.randn(3, 40)
    module = FakeQuantizeWeight(3, 3, symmetric=symmetric, grid=grid, step="learn")
    module.follow(weight)
    module.set_scale(module.scale.detach() * 0.6)
    module(weight).sum().backward()
    low, high = module.limits
    zero = torch.zeros(3, 1) if symmetric else module.zero_point.unsqueeze(1).float()
    scale = module.scale.detach().unsqueeze(1)
    units = weight / scale
    inside = (units > low - zero) & (units < high - zero)
    rounded = (nearest_power(units) if grid == "power_of_two" else units.round()).clamp(low - zero, high - zero)
    wanted = torch.where(inside, rounded - units, rounded).sum(1) / (40 * high) ** 0.5
    torch.testing.assert_close(module.scale.grad, wanted)
    learned = module(weight).detach()
    torch.testing.assert_close(module.eval()(weight), learned)
    module.fix()
    assert not list(module.parameters()) and module.config()["step"] == "fixed"


def test_a_learned_range_has_the_gradient_of_the_paper() -> None:
    x = torch.randn(4, 50) * 2
    module = FakeQuantize(3, learn=True)
    module.set_range(0.3, 2)
    module(x).sum().backward()
    units = x / 0.3
    rounded = units.round().clamp(-2, 5)
    inside = (units > -2) & (units < 5)
    wanted = torch.where(inside, rounded - units, rounded).sum() / (50 * 7) ** 0.5
    torch.testing.assert_close(module.scale.grad, wanted)
    torch.testing.assert_close(module.eval()(x), rounded * 0.3)


@pytest.mark.parametrize("learn", [False, True])
def test_training_sees_the_numbers_of_evaluation_and_passes_gradients_inside_the_range(learn: bool) -> None:
    x = (torch.randn(2, 3, 8, 8) * 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    module = FakeQuantize(4, learn=learn)
    module.set_range(0.123, 5)
    out = module(x)
    assert torch.equal(out, module.eval()(x))
    slopes = torch.randn_like(x)
    out.backward(slopes)
    inside = (x > -5 * 0.123) & (x < 10 * 0.123)
    assert x.grad is not None and torch.equal(x.grad, torch.where(inside, slopes, 0.0))


@pytest.mark.parametrize(
    "settings",
    [
        {"granularity": "tensor"},
        {"granularity": "group", "group_size": 3},
        {"weight_bits": 4, "symmetric": False},
        {"symmetric": False},
        {"weight_bits": 4, "grid": "power_of_two"},
        {"weight_bits": 3, "weight_range": "mse"},
        {"weight_bits": 3, "learn": True, "activation_bits": 4},
        {"activation_bits": None},
        {"weight_bits": 4, "first_last_bits": 8, "layers": {"*conv2": 6}, "inputs": {"*conv2": 5}},
        *({"observer": name} for name in ("average", "percentile", "minmax")),
        {"observer": "percentile", "symmetric_activations": True},
    ],
    ids=str,
)
def test_every_setting_saves_loads_trains_and_stays_near_the_float_model(
    settings: dict[str, object], tmp_path: Path
) -> None:
    model = warm(small(channels=3))

    x = task().example
    wanted = model(x).detach()
    edit = quantize(copy.deepcopy(model), tmp_path, **settings)
    error = float((edit.model(x).detach() - wanted).norm() / wanted.norm())
    assert error < (0.06 if settings.get("weight_bits", 8) == settings.get("activation_bits", 8) == 8 else 0.7)
    path = tmp_path / "model.safetensors"
    checkpoint.save(edit.model.eval(), path, build=BUILD, input=task().input, provenance={}, results={})
    assert torch.equal(checkpoint.load(path)(x), edit.model(x))
    trained = edit.model.train()
    optimizer = torch.optim.SGD(trained.parameters(), 0.01)
    for _ in range(2):
        loss = F.cross_entropy(trained(x), torch.tensor([1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(bool(torch.isfinite(grid.scale).all()) for grid in grids(trained.eval()))
    for grid, chain in zip(grids(trained), chains(trained), strict=True):
        integers = grid.integers(chain())
        assert torch.equal(grid.values(integers, torch.float32), chain())


def chains(model: nn.Module) -> list[parametrize.ParametrizationList]:
    return [module for module in model.modules() if isinstance(module, parametrize.ParametrizationList)]


def names(edit: Edit) -> list[str]:
    return [site.name for site in edit.sites]


def test_bits_by_layer(tmp_path: Path) -> None:
    plain = quantize(warm(small(channels=3)), tmp_path)
    first, *inner, last = names(plain)
    edit = quantize(
        warm(small(channels=3)), tmp_path, weight_bits=3, first_last_bits=8, layers={inner[0]: 5}, inputs={inner[0]: 6}
    )
    bits = {site.name: str(site.after).split()[0] for site in edit.sites}
    assert bits == {first: "int8", inner[0]: "int5", last: "int8"} | dict.fromkeys(inner[1:], "int3")
    assert edit.notes["weight_bits"][inner[0]] == 5 and edit.notes["activation_bits"][inner[0]] == 6
    reads = {site.name: str(site.after).split()[-2] for site in edit.sites}
    assert reads[inner[0]] == "uint6"


def test_an_observer_of_percentiles_leaves_out_what_is_rare(tmp_path: Path) -> None:
    class Rare(Images):
        def __init__(self) -> None:
            super().__init__((1, 8, 8))
            self.x.clamp_(-2, 2)
            self.x[0, 0, 0, 0] = 50.0

    data = Rare()
    rare = Task(data, data, data, data, data.x[:2], 10, {}, "rare")
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    scales = {}
    for observer in ("minmax", "percentile"):
        edit = Quantize(observer=observer, percentile=99.0)(copy.deepcopy(model), rare, Work(tmp_path))
        grid = next(iter(edit.model.quantizers.children()))
        scales[observer] = float(grid.scale) * 255
    assert scales["minmax"] == pytest.approx(52, abs=0.5) and 3 < scales["percentile"] < 5


def test_symmetric_activations_stand_around_zero(tmp_path: Path) -> None:
    edit = quantize(warm(small(channels=3)), tmp_path, symmetric_activations=True)
    zeros = {int(module.zero_point) for module in edit.model.quantizers.children()}
    assert zeros <= {0, 127, 128} and len(zeros) == 2


def test_the_range_of_least_squared_error_is_no_worse_than_any_other(tmp_path: Path) -> None:
    weight = torch.randn(5, 200) ** 3
    model = nn.Sequential(nn.Linear(200, 5), nn.Identity())
    model[0].weight.data.copy_(weight)
    edit = quantize(model, tmp_path, (200,), weight_bits=3, weight_range="mse", activation_bits=None)
    found = (edit.model[0].weight - weight).square().sum(1)  # type: ignore[index]
    for clip in torch.linspace(0.2, 1, 41):
        scale = weight.abs().amax(1, keepdim=True) / 3 * clip
        tried = ((weight / scale).round().clamp(-3, 3) * scale - weight).square().sum(1)
        assert bool((found <= tried * 1.02).all())


def test_a_tensor_of_zeros_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(576, 10))
    model[0].weight.data.zero_()
    model[0].bias.data.fill_(-1.0)  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"nothing but zeros at 1:call:0, which has no range.*`exclude`"):
        quantize(model, tmp_path)


def test_no_images_to_calibrate_on(tmp_path: Path) -> None:
    data = Images((3, 16, 16), images=2)
    empty = Images((3, 16, 16), images=0)
    nothing = Task(data, empty, data, data, data.x[:2], 10, {}, "none")
    with pytest.raises(DataError, match=r"calibration has no images; give the task some, or quantize weights only"):
        Quantize()(warm(small(channels=3)), nothing, Work(tmp_path))
    assert Quantize(activation_bits=None)(warm(small(channels=3)), nothing, Work(tmp_path)).sites


WRONG = [
    ({"weight_bits": 1}, r"`weight_bits` \(=1\) must be between 2 and 8: one bit is a sign without zero"),
    ({"weight_bits": 5, "grid": "power_of_two"}, r"`weight_bits` \(=5\) must be between 2 and 4; for more, take `grid"),
    ({"layers": {"*": 9}}, r"`layers.\*` \(=9\) must be between 2 and 8"),
    ({"first_last_bits": 9}, r"`first_last_bits` \(=9\) must be between 2 and 8"),
    ({"grid": "log"}, r"`grid` \(='log'\) must be one of uniform, power_of_two"),
    ({"granularity": "row"}, r"`granularity` \(='row'\) must be one of channel, tensor, group"),
    ({"percentile": 40.0}, r"`percentile` \(=40.0\) must be above 50"),
    ({"group_size": 0}, r"`group_size` \(=0\) must be at least 1"),
    ({"grid": "power_of_two", "weight_bits": 3, "symmetric": False}, r"`symmetric` \(=False\) must be true for powers"),
    ({"activation_bits": None, "inputs": {"*": 8}}, r"`inputs` gives bits to activations"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[str(settings) for settings, _ in WRONG])
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Quantize(**settings)  # type: ignore[arg-type]


def test_what_fits_no_layer_is_refused(tmp_path: Path) -> None:
    for setting in ("layers", "inputs"):
        with pytest.raises(ConfigError, match=rf"`{setting}` has the pattern 'nowhere\*', which matches no layer"):
            quantize(warm(small(channels=3)), tmp_path, **{setting: {"nowhere*": 4}})
    with pytest.raises(ConfigError, match=r"`group_size` \(=10\) must divide .* and conv1 has 27, .*; take 3, which"):
        quantize(warm(small(channels=3)), tmp_path, granularity="group", group_size=10)


def test_grids_refuse_what_they_cannot_be() -> None:
    for (name, value), message in zip(
        itertools.chain({"grid": "x", "step": "x", "channels": 0}.items()),
        (r"`grid` \(='x'\)", r"`step` \(='x'\)", r"`channels` \(=0\)"),
        strict=True,
    ):
        with pytest.raises(ValueError, match=message):
            FakeQuantizeWeight(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_rounded_alike_where_torch_would_wait_for_the_cpu(symmetric: bool, bits: int) -> None:
    grid = FakeQuantizeWeight(bits, channels=6, symmetric=symmetric)
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = grid.train()(weight)  # torch's own function, on the CPU
    zero = torch.zeros(6) if symmetric else grid.zero_point
    given = fake_quantized(weight.view(6, -1), grid.scale.unsqueeze(1), zero.unsqueeze(1), *grid.limits).view_as(weight)
    assert torch.equal(given, expected)
    gradients = [torch.autograd.grad(each.square().sum(), weight)[0] for each in (given, expected)]
    assert torch.equal(*gradients)
