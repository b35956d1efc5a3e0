"""Shift layers and the stage that makes them, against plain convolutions and plain loops."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, SHAPE, noise_task
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.nn.shift import ShiftConv2d
from compress.nn.taps import round_half_away, taps, window
from compress.reconstruct import normal_equations
from compress.stages import Shift
from compress.stages.shift import fit_shift, grouped_places, random_places
from compress.surgery import layers
from compress.task import Work


def work(path: Path) -> Work:
    return Work(path)


def moved(x: Tensor, dy: float, dx: float) -> Tensor:
    """x displaced by (dy, dx) with zeros outside, bilinear, by plain indexing: y[h, w] = x[h + dy, w + dx]."""
    out = torch.zeros_like(x)
    height, width = x.shape[-2:]
    for h in range(height):
        for w in range(width):
            for y, wy in ((math.floor(dy), 1 - dy % 1), (math.floor(dy) + 1, dy % 1)):
                for z, wz in ((math.floor(dx), 1 - dx % 1), (math.floor(dx) + 1, dx % 1)):
                    if 0 <= h + y < height and 0 <= w + z < width:
                        out[..., h, w] += wy * wz * x[..., h + y, w + z]
    return out


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("learn", [False, True])
def test_all_positions_kept_is_the_convolution(name: str, learn: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AWKWARD[name]().eval()
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    widest = max(math.prod(layer.kernel_size) for layer in layers(model, (nn.Conv2d,)).values())
    stage = Shift(taps=widest, learn=learn)
    edit = stage(model, noise_task(), work(tmp_path))
    torch.testing.assert_close(edit.model(x), expected, rtol=0, atol=1e-5)
    for site in edit.sites:
        assert site.after is not None or "1x1 kernel has one position" in site.why
    lowered = copy.deepcopy(edit.model)
    for layer_name, layer in layers(lowered, (ShiftConv2d,)).items():
        plain = layer.lower("onnxruntime")
        if not layer_name:
            lowered = plain
        else:
            parent, _, child = layer_name.rpartition(".")
            setattr(lowered.get_submodule(parent), child, plain)
    torch.testing.assert_close(lowered(x), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (2, 2), (4, 3), (1, 3)])
@pytest.mark.parametrize("quantize", [False, True])
def test_gradient_of_displacements(kernel: tuple[int, int], quantize: bool) -> None:
    torch.manual_seed(0)
    low, high = (torch.tensor([window(size)[i] for size in kernel], dtype=torch.double) for i in (0, 1))
    cell = torch.rand(3, 4, 2, dtype=torch.double)
    steps = torch.floor(cell * (high - low)).clamp(max=(high - low - 1).clamp(min=0))
    inside = (low + steps + 0.1 + 0.8 * torch.rand(3, 4, 2, dtype=torch.double)).clamp(max=high)
    d = torch.where(high > low, inside, low.expand_as(inside)).requires_grad_()
    if not quantize:
        free = d.detach()[..., high > low].requires_grad_()

        def of_free(values: Tensor) -> Tensor:
            full = low.expand(3, 4, 2).clone()
            full[..., high > low] = values
            return taps(full, kernel)

        assert torch.autograd.gradcheck(of_free, (free,))
        return
    # Straight through the rounding: the forward pass is rounded, the gradient is that of the float position.
    weight = torch.randn(3, 4, *kernel, dtype=torch.double)
    (rounded,) = torch.autograd.grad((taps(d, kernel, quantize=True) * weight).sum(), d)
    (exact,) = torch.autograd.grad((taps(d, kernel) * weight).sum(), d)
    torch.testing.assert_close(rounded, exact)
    torch.testing.assert_close(taps(d, kernel, quantize=True), taps(round_half_away(d), kernel))


def test_gradient_on_the_lattice_is_the_mean_of_both_sides_and_inward_at_the_edge() -> None:
    weight = torch.tensor([1.0, 5.0, 7.0]).view(1, 1, 1, 3)
    for x, expected in ((-1.0, 4.0), (0.0, 3.0), (1.0, 2.0), (0.5, 2.0)):
        d = torch.tensor([[[0.0, x]]], requires_grad=True)
        (grad,) = torch.autograd.grad((taps(d, (1, 3)) * weight).sum(), d)
        assert grad.flatten().tolist() == [0.0, expected]


def test_normalised_gradients_have_length_one() -> None:
    d = torch.full((2, 3, 2), 0.3, requires_grad=True)
    weight = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    (grad,) = torch.autograd.grad((taps(d, (3, 3), normalize=True) * weight).sum(), d)
    torch.testing.assert_close(grad.norm(dim=-1), torch.ones(2, 3))


@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
@pytest.mark.parametrize("quantize", [False, True])
def test_adjoint(stride: int | tuple[int, int], quantize: bool) -> None:
    torch.manual_seed(0)
    layer = ShiftConv2d(7, 5, 5, 3, stride, 2, bias=False, quantize=quantize).double()
    with torch.no_grad():
        layer.displacement.uniform_(-2, 2)
    x = torch.randn(2, 7, 9, 6, dtype=torch.double, requires_grad=True)
    out = layer(x)
    y = torch.randn_like(out)
    (back,) = torch.autograd.grad(out, x, y)
    z = torch.randn_like(x)
    torch.testing.assert_close((layer(z) * y).sum(), (z * back).sum())


@pytest.mark.parametrize("stride", [1, 2])
def test_layer_is_displaced_copies_and_a_pointwise_convolution(stride: int) -> None:
    torch.manual_seed(0)
    layer = ShiftConv2d(4, 6, 5, 2, stride, 2, quantize=False).double()
    with torch.no_grad():
        layer.displacement.uniform_(-2, 2)
    x = torch.randn(1, 4, 7, 7, dtype=torch.double)
    copies = [moved(x[:, c], *layer.displacement[c, t].tolist()) for c in range(4) for t in range(2)]
    expected = F.conv2d(torch.stack(copies, 1), layer.pointwise.weight, layer.pointwise.bias)[..., ::stride, ::stride]
    torch.testing.assert_close(layer(x), expected)


def test_a_displacement_larger_than_the_map_reads_zeros() -> None:
    layer = ShiftConv2d(1, 1, 5, 1, padding=2, bias=False)
    with torch.no_grad():
        layer.displacement.fill_(2)
    assert layer(torch.ones(1, 1, 2, 2)).abs().max() == 0


def test_settle_changes_no_output_and_parts_copies_that_met() -> None:
    torch.manual_seed(0)
    layer = ShiftConv2d(6, 4, 3, 4, padding=1, groups=2, learn=True, l1=0.1)
    with torch.no_grad():
        layer.displacement.uniform_(-1, 1)
    layer.eval()
    x = torch.randn(2, 6, 5, 5)
    before = layer(x)
    layer.settle()
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-5)
    assert torch.equal(layer.displacement, layer.displacement.round())
    for channel in layer.displacement:
        assert len({tuple(place) for place in channel.tolist()}) == 4
    assert not layer.displacement.requires_grad and not layer.config()["learn"]


def test_macs_are_a_hand_count() -> None:
    assert ShiftConv2d(16, 32, 3, 2, 2, 1).macs((1, 16, 8, 8)) == 4 * 4 * 32 * 16 * 2
    assert ShiftConv2d(16, 32, 3, 2, padding="same", groups=4).macs((1, 16, 8, 8)) == 8 * 8 * 32 * 4 * 2


def test_one_tap_lowers_to_depthwise_and_pointwise() -> None:
    layer = ShiftConv2d(4, 6, 3, 1, padding=1)
    with torch.no_grad():
        layer.displacement[1] = 1
    lowered = layer.lower("onnxruntime")
    assert isinstance(lowered, nn.Sequential) and lowered[0].groups == 4 and lowered[1].kernel_size == (1, 1)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(lowered(x), layer(x))


def test_too_many_taps() -> None:
    with pytest.raises(ValueError, match=r"`taps` \(=10\) must be between 1 and the kernel's 9 positions"):
        ShiftConv2d(4, 4, 3, 10)
    with pytest.raises(ConfigError, match=r"`taps` \(=10\) must not exceed the kernel's positions: 2 has 9"):
        Shift(taps=10)(AWKWARD["plain"](), noise_task(), Work(Path()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"taps": 0}, r"`taps` \(=0\) must be at least 1"),
        ({"images": 0}, r"`images` \(=0\) must be at least 1"),
        ({"l1": -1.0, "learn": True}, r"`l1` \(=-1.0\) must be a finite number, 0 or more"),
        ({"l1": 0.1}, r"`l1` \(=0.1\) pulls at learned displacements; set `learn: true` or `l1: 0`"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Shift(**settings)  # type: ignore[arg-type]


def test_patterns_that_match_nothing() -> None:
    with pytest.raises(ConfigError, match=r"`exclude` has the pattern 'conv9\*', which matches no layer; the layers"):
        Shift(exclude=["conv9*"])(AWKWARD["plain"](), noise_task(), Work(Path()))


def test_only_pointwise_layers_is_an_error() -> None:
    with pytest.raises(ConfigError, match="would change nothing; every layer was kept: a 1x1 kernel"):
        Shift()(nn.Sequential(nn.Conv2d(8, 4, 1)), noise_task(), Work(Path()))


@pytest.mark.parametrize("learn", [False, True])
def test_training_moves_learned_displacements_only(learn: bool) -> None:
    torch.manual_seed(0)
    layer = ShiftConv2d(4, 6, 3, 2, padding=1, learn=learn)
    before = layer.displacement.detach().clone()
    layer(torch.randn(2, 4, 5, 5)).square().sum().backward()
    if learn:
        assert layer.displacement.grad is not None and layer.displacement.grad.abs().sum() > 0
    else:
        assert layer.displacement.grad is None
    assert torch.equal(layer.displacement, before)


def test_grouped_places_follow_the_published_rule() -> None:
    places = grouped_places(20, (3, 3), 1).flatten().tolist()
    for channel in range(18):
        dx, dy = channel % 3 - 1, channel // 3 % 3 - 1
        assert places[channel] == (dy + 1) * 3 + dx + 1
    assert places[18:] == [4, 4]  # 18 = 2 whole turns; what is left stays where it is
    assert all(len(set(row)) == 3 for row in grouped_places(20, (3, 3), 3).tolist())


def test_random_places_differ_within_a_channel_and_follow_the_seed() -> None:
    places = random_places(50, (5, 5), 4, seed=1)
    assert all(len(set(row)) == 4 and max(row) < 25 for row in places.tolist())
    assert torch.equal(places, random_places(50, (5, 5), 4, seed=1))
    assert not torch.equal(places, random_places(50, (5, 5), 4, seed=2))


def test_fixed_places_are_fitted_by_least_squares(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    x = torch.randn(16, 4, 7, 7)
    new = ShiftConv2d(4, 6, 3, 1, padding=1)
    places = torch.tensor([[0], [4], [8], [1]])
    normal = normal_equations(layer, [(x, layer(x).detach())], len(x), bias=True)
    error = fit_shift(new, normal, 0.0, places)
    windows = F.unfold(x, 3, padding=1).view(16, 4, 9, 49)
    features = torch.stack([windows[:, c, p] for c, (p,) in enumerate(places.tolist())], -1).flatten(0, 1)
    features = torch.cat((features, torch.ones(len(features), 1)), 1)
    wanted = layer(x).detach().flatten(2).mT.flatten(0, 1)
    best = features @ torch.linalg.lstsq(features, wanted).solution
    torch.testing.assert_close(new(x).flatten(2).mT.flatten(0, 1), best, rtol=1e-4, atol=1e-4)
    assert error == pytest.approx(float((best - wanted).square().sum() / wanted.square().sum()), rel=1e-3)


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`places` \(='here'\) must be one of data, grouped, random"):
        Shift(places="here")


@pytest.mark.parametrize(("quantize", "far"), [(True, 1.6), (False, 1.3)])
def test_what_was_pushed_out_of_the_window_counts_as_its_edge(quantize: bool, far: float) -> None:
    torch.manual_seed(0)
    layer = ShiftConv2d(2, 3, 3, 1, padding=1, learn=True, quantize=quantize)
    x = torch.randn(1, 2, 5, 5)
    with torch.no_grad():
        layer.displacement.fill_(1.0)
        expected = layer.eval()(x)
        layer.displacement.fill_(far)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.lower("onnxruntime")(x), expected)
    layer.settle()
    torch.testing.assert_close(layer(x), expected)
