"""Separable layers and the stage that makes them, against plain convolutions and direct least squares."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, SHAPE, noise_task
from torch import Tensor, nn

from compress.data import cifar10, make_task
from compress.errors import ConfigError
from compress.measure import profile
from compress.models import resnet20
from compress.models.weights import load_weights
from compress.nn.separable import SeparableConv2d
from compress.reconstruct import Normal, normal_equations, plain_images, seen_by
from compress.stages import Separable
from compress.stages import separable as stage
from compress.surgery import describe, layers
from compress.task import Work

DEPTHWISE = {"depthwise", "depthwise, multiplier 2"}


def dense(layer: SeparableConv2d) -> Tensor:
    """The k x k kernel that the layer equals, entry by entry from the definition."""
    inside, m = layer.in_channels // layer.groups, layer.multiplier
    kernel = torch.zeros(layer.out_channels, inside, *layer.kernel_size)
    for o in range(layer.out_channels):
        first = o // (layer.out_channels // layer.groups) * inside
        for c in range(inside):
            for t in range(m):
                kernel[o, c] += layer.pointwise.weight[o, c * m + t] * layer.depthwise.weight[(first + c) * m + t, 0]
    return kernel.detach()


def low_rank(layer: nn.Conv2d, rank: int) -> None:
    """Give each input channel of the layer kernels of this rank."""
    outputs, inputs = layer.weight.shape[:2]
    kernels = torch.randn(inputs, rank, math.prod(layer.kernel_size))
    with torch.no_grad():
        layer.weight.copy_(
            torch.einsum("oct,ctp->ocp", torch.randn(outputs, inputs, rank), kernels).view_as(layer.weight)
        )


def smooth(images: int, channels: int) -> Tensor:
    return F.avg_pool2d(torch.randn(images, channels, 10, 10), 3, 1)


def equations(layer: nn.Conv2d, images: int = 32) -> tuple[Tensor, Normal]:
    x = smooth(images, layer.in_channels)
    return x, normal_equations(layer, [(x, layer(x).detach())], images, bias=layer.bias is not None)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch says so of plain ones too
@pytest.mark.parametrize("name", sorted(AWKWARD.keys() - DEPTHWISE))
def test_enough_kernels_are_the_convolution(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AWKWARD[name]().eval()
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    wide = {n: m for n, m in layers(model, (nn.Conv2d,)).items() if math.prod(m.kernel_size) > 1}
    positions = {math.prod(layer.kernel_size) for layer in wide.values()}
    edit = Separable(multiplier=max(positions))(model, noise_task(), Work(tmp_path))
    torch.testing.assert_close(edit.model(x), expected, rtol=0, atol=1e-5)
    for site in edit.sites:
        if site.name not in wide:
            assert site.after is None and site.why == "a 1x1 kernel is pointwise already"
            continue
        outputs = wide[site.name].out_channels // wide[site.name].groups
        new = edit.model.get_submodule(site.name)
        assert isinstance(new, SeparableConv2d) and new.multiplier == min(outputs, *positions)
        assert site.after == describe(new) and f"multiplier={new.multiplier}" in site.after
        fewer = outputs < max(positions)
        assert site.why == (f"{outputs} kernels for each input channel are exact" if fewer else "")
        assert (site.name in edit.notes["fewer"]) == fewer


@pytest.mark.parametrize("name", sorted(DEPTHWISE))
def test_depthwise_layers_are_kept(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"every layer was kept: a 1x1 kernel .*; it is depthwise already: each output"
    ):
        Separable()(AWKWARD[name](), noise_task(), Work(Path()))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", sorted(AWKWARD.keys() - DEPTHWISE))
def test_kernels_of_low_rank_are_found_again(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AWKWARD[name]().eval()
    for layer in layers(model, (nn.Conv2d,)).values():
        if math.prod(layer.kernel_size) > 1:
            low_rank(layer, 2)
    x = smooth(2, 8)
    expected = model(x).detach()
    edit = Separable(multiplier=2, ridge=1e-9)(model, noise_task(), Work(tmp_path))
    scale = float(expected.abs().max())
    torch.testing.assert_close(edit.model(x) / scale, expected / scale, rtol=0, atol=1e-3)
    assert all(error < 1e-6 for error in edit.notes["relative_error"].values())


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": (2, 1), "padding": (1, 0), "dilation": 2},
        {"padding": "same", "groups": 2, "bias": False},
        {"padding": 1, "padding_mode": "reflect", "groups": 4},
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_layer_is_the_dense_convolution_of_its_composed_kernel(settings: dict[str, Any], training: bool) -> None:
    torch.manual_seed(0)
    layer = SeparableConv2d(4, 8, (3, 2) if "padding_mode" not in settings else 3, 2, **settings).train(training)
    plain = nn.Conv2d(4, 8, layer.kernel_size, **settings)
    with torch.no_grad():
        plain.weight.copy_(dense(layer))
        if plain.bias is not None and layer.pointwise.bias is not None:
            plain.bias.copy_(layer.pointwise.bias)
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-5)
    again = SeparableConv2d(**layer.config()).train(training)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


def test_trained_as_one_kernel_has_the_gradients_of_two_layers() -> None:
    torch.manual_seed(0)
    layer = SeparableConv2d(4, 8, 3, 2, padding=1)
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    parts = (x, *layer.parameters())
    composed = torch.autograd.grad(layer(x).square().sum(), parts)
    apart = torch.autograd.grad(layer.pointwise(layer.depthwise(x)).square().sum(), parts)
    for mine, other in zip(composed, apart, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_work_and_weights_are_a_hand_count() -> None:
    layer = SeparableConv2d(16, 32, 3, 2, stride=2, padding=1)
    found = profile(layer, torch.zeros(2, 16, 8, 8))
    assert found.macs == 4 * 4 * (16 * 2 * 9 + 16 * 2 * 32)
    assert found.params == 16 * 2 * 9 + 16 * 2 * 32 + 32 and not found.uncounted
    assert describe(layer) == "SeparableConv2d(16, 32, 3x3, multiplier=2, stride=2)"


def test_the_reported_error_is_that_of_the_layer_on_its_data() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3, padding=1, groups=2)
    x, normal = equations(layer)
    new = stage.empty_separable(layer, 1)
    error = stage.fit_separable(new, normal, ridge=0.0, rounds=10)
    with torch.no_grad():
        direct = (new(x) - layer(x)).square().sum() / layer(x).square().sum()
    assert error == pytest.approx(float(direct), rel=1e-3) and 0.001 < error < 0.5


def test_each_half_is_solved_as_direct_least_squares_does() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    x, normal = equations(layer)
    problem = stage.Problem.of(normal, 0, 9, ridge=0.0)
    rows = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1).double()  # (images * places, channels * positions)
    wanted = layer(x).detach().flatten(2).transpose(1, 2).flatten(0, 1).double()
    kernels = stage.leading_kernels(problem, 2)
    copies = torch.einsum("rcp,ctp->rct", rows.view(-1, 3, 9), kernels).flatten(1)
    mix = stage.solve_mix(problem, kernels)
    torch.testing.assert_close(mix.flatten(0, 1), torch.linalg.lstsq(copies, wanted).solution, rtol=1e-3, atol=1e-4)
    # For the kernels, every row gives one equation for each output; the span of a channel's kernels is what counts.
    design = torch.einsum("rcp,cto->roctp", rows.view(-1, 3, 9), mix).flatten(2).flatten(0, 1)
    best = torch.linalg.lstsq(design, wanted.flatten()).solution.view(3, 2, 9)
    found = stage.solve_kernels(problem, kernels, mix)
    torch.testing.assert_close(found @ found.mT, torch.eye(2).double().expand(3, 2, 2))
    torch.testing.assert_close(best @ found.mT @ found, best, rtol=1e-3, atol=1e-4)


def test_rounds_lower_the_error_also_a_few_channels_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3, padding=1)
    _, normal = equations(layer)

    def errors(most: int) -> list[float]:
        return [
            stage.fit_separable(stage.empty_separable(layer, 2), normal, ridge=0.0, rounds=rounds)
            for rounds in range(most)
        ]

    together = errors(5)
    monkeypatch.setattr(stage, "UNKNOWNS", 3 * 2 * 9)
    apart = errors(5)
    for found in (together, apart):
        assert found == sorted(found, reverse=True) and found[-1] < 0.995 * found[0]
    assert together[0] == apart[0] and together[1] <= apart[1]


def test_a_black_channel_has_a_solution() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    x = smooth(16, 4)
    x[:, 1] = 0
    normal = normal_equations(layer, [(x, layer(x).detach())], 16, bias=True)
    new = stage.empty_separable(layer, 2)
    error = stage.fit_separable(new, normal, ridge=0.0, rounds=10)
    assert error < 0.2 and all(bool(p.isfinite().all()) for p in new.parameters())


def test_solving_in_turn_beats_the_decomposition_on_a_trained_layer(data_root: Path) -> None:
    task = make_task(cifar10(data_root, download=False, limit=1000), calibration_images=128)
    model = resnet20().eval()
    load_weights(model, data_root / "weights/resnet20-12fca82f.th")
    layer = model.get_submodule("layer3.0.conv2")
    assert isinstance(layer, nn.Conv2d)
    images = plain_images(task.calibration, 128, task.device)
    normal = normal_equations(layer, [p for x in images for p in seen_by(model, layer, 1, x)], 128, bias=False)
    start, solved = (
        stage.fit_separable(stage.empty_separable(layer, 1), normal, ridge=1e-4, rounds=rounds) for rounds in (0, 10)
    )
    assert solved < 0.9 * start < 0.5


def test_too_many_kernels() -> None:
    with pytest.raises(ValueError, match=r"`multiplier` \(=10\) must be between 1 and the kernel's 9 positions"):
        SeparableConv2d(4, 4, 3, 10)
    with pytest.raises(
        ConfigError, match=r"`multiplier` \(=10\) must not exceed the kernel's positions: 2 has 9; lower"
    ):
        Separable(multiplier=10)(AWKWARD["plain"](), noise_task(), Work(Path()))


def test_channels_that_do_not_divide_into_groups() -> None:
    with pytest.raises(ValueError, match=r"`in_channels` \(=3\) must be divisible by `groups` \(=2\)"):
        SeparableConv2d(3, 4, 3, 2, groups=2)
    with pytest.raises(ValueError, match=r"`out_channels` \(=5\) must be divisible by `groups` \(=2\)"):
        SeparableConv2d(4, 5, 3, 2, groups=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"multiplier": 0}, r"`multiplier` \(=0\) must be at least 1"),
        ({"rounds": -1}, r"`rounds` \(=-1\) must be at least 0"),
        ({"images": 0}, r"`images` \(=0\) must be at least 1"),
        ({"ridge": math.nan}, r"`ridge` \(=nan\) must be a finite number, 0 or more"),
        ({"gate": "size"}, r"`gate` \(='size'\) must be one of"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Separable(**settings)


def test_a_second_time_there_is_nothing_left_to_do(tmp_path: Path) -> None:
    model = Separable(images=16)(AWKWARD["plain"](), noise_task(), Work(tmp_path)).model
    with pytest.raises(ConfigError, match=r"it is a part of SeparableConv2d"):
        Separable(images=16)(model, noise_task(), Work(tmp_path))
