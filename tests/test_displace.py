"""The standalone shift layer against plain loops, published formulas and finite differences."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from random_task import quantize, task, warm
from torch import Tensor, nn

from compress.errors import TrainingError
from compress.lower import export_onnx, fold_batch_norm
from compress.nn.displace import Shift2d
from compress.nn.displacement import displace
from compress.nn.places import quantizer_places
from compress.nn.taps import round_half_away
from compress.stages import FineTune
from compress.task import Work
from compress.train import fit


def moved(x: Tensor, displacement: Tensor, stride: int = 1) -> Tensor:
    """y[n, c, h, w] = x[n, c, stride * h + dy, stride * w + dx] by plain indexing, bilinear, zeros outside."""
    height, width = x.shape[-2:]
    out = x.new_zeros(*x.shape[:2], -(-height // stride), -(-width // stride))
    for c, (dy, dx) in enumerate(displacement.tolist()):
        for h in range(out.shape[-2]):
            for w in range(out.shape[-1]):
                for y, wy in ((math.floor(dy), 1 - dy % 1), (math.floor(dy) + 1, dy % 1)):
                    for z, wz in ((math.floor(dx), 1 - dx % 1), (math.floor(dx) + 1, dx % 1)):
                        a, b = stride * h + y, stride * w + z
                        if 0 <= a < height and 0 <= b < width:
                            out[:, c, h, w] += wy * wz * x[:, c, a, b]
    return out


def off_the_lattice(channels: int, reach: int) -> Tensor:
    cells = torch.randint(-reach, reach, (channels, 2))
    return (cells + 0.1 + 0.8 * torch.rand(channels, 2)).double()


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(6, 7), (5, 9), (2, 3)])
@pytest.mark.parametrize("whole", [False, True])
def test_it_is_the_plain_loop(stride: int, size: tuple[int, int], whole: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 10, *size, dtype=torch.double)
    d = off_the_lattice(10, 5)
    torch.testing.assert_close(
        displace(x, d, stride, quantize=whole), moved(x, round_half_away(d) if whole else d, stride)
    )


def test_channels_last_and_bfloat16_move_the_same_numbers() -> None:
    x = torch.randn(2, 9, 6, 5, generator=torch.Generator().manual_seed(0))
    layer = Shift2d(9)
    expected = moved(x, layer.displacement)
    assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected) and torch.equal(layer(x.bfloat16()), expected.bfloat16())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 6), (5, 7)])
def test_gradients_are_finite_differences(stride: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, *size, dtype=torch.double, requires_grad=True)
    d = off_the_lattice(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: displace(a, b, stride), (x, d))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("whole", [False, True])
def test_backward_is_the_adjoint(stride: int, whole: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 11, 7, 6, dtype=torch.double, requires_grad=True)
    d = off_the_lattice(11, 4)
    out = displace(x, d, stride, quantize=whole)
    y, z = torch.randn_like(out), torch.randn_like(x)
    (back,) = torch.autograd.grad(out, x, y)
    torch.testing.assert_close((displace(z, d, stride, quantize=whole) * y).sum(), (z * back).sum())
    if stride == 1:  # Jeon & Kim: the shift by the opposite displacement
        torch.testing.assert_close(back, displace(y, -d, quantize=whole))


def test_rounding_passes_the_bilinear_gradient_straight_through() -> None:
    torch.manual_seed(0)
    x, d = torch.randn(2, 6, 5, 5, dtype=torch.double), off_the_lattice(6, 2).requires_grad_()
    grad = torch.randn(2, 6, 5, 5, dtype=torch.double)
    (exact,) = torch.autograd.grad(displace(x, d), d, grad)
    (rounded,) = torch.autograd.grad(displace(x, d, quantize=True), d, grad)
    (unit,) = torch.autograd.grad(displace(x, d, normalize=True), d, grad)
    torch.testing.assert_close(rounded, exact)
    torch.testing.assert_close(unit, exact / exact.norm(dim=1, keepdim=True))


def test_halves_are_rounded_away_from_zero() -> None:
    x = torch.arange(7.0).view(1, 1, 1, 7)
    for d, first in ((0.5, 1.0), (1.5, 2.0), (2.5, 3.0)):
        assert displace(x, torch.tensor([[0.0, d]]), quantize=True)[0, 0, 0, 0] == first
        assert displace(x, torch.tensor([[0.0, -d]]), quantize=True)[0, 0, 0, 6] == 6 - first


def test_on_the_lattice_the_derivative_is_that_of_the_cell_to_the_right() -> None:
    x = torch.tensor([1.0, 5.0, 7.0]).view(1, 1, 1, 3)
    for place, expected in ((-1.0, 4.0), (0.0, 2.0), (1.0, -7.0)):
        d = torch.tensor([[0.0, place]], requires_grad=True)
        (grad,) = torch.autograd.grad(displace(x, d)[0, 0, 0, 1], d)
        assert grad[0, 1] == expected


@pytest.mark.parametrize(("kernel", "channels", "dilation"), [(3, 9, 1), (3, 22, 1), (5, 60, 1), (3, 20, 2), (3, 8, 1)])
def test_the_grouped_start_is_the_reference_kernels_rule(kernel: int, channels: int, dilation: int) -> None:
    half = kernel // 2
    expected = []
    for c in range(channels):
        inside = c < channels // kernel**2 * kernel**2
        expected.append(
            [(c // kernel % kernel - half) * dilation, (c % kernel - half) * dilation] if inside else [0, 0]
        )
    assert Shift2d(channels, kernel, dilation=dilation).displacement.tolist() == expected


def test_other_starts_stay_inside_their_ranges() -> None:
    torch.manual_seed(0)
    drawn = Shift2d(500, 7, start="random").displacement
    assert torch.equal(drawn, drawn.round()) and drawn.min() == -3 and drawn.max() == 3
    drawn = Shift2d(500, 15, start="uniform", learn=True, quantize=False).displacement
    assert drawn.abs().max() <= 1 and drawn.std() > 0.5


def test_a_shift_larger_than_the_map_gives_zeros() -> None:
    layer = Shift2d(4, 9)
    layer.displacement.copy_(torch.tensor([[4.0, 0], [0, -4], [3, 3], [-4, 4]]))
    assert layer(torch.ones(1, 4, 3, 3)).abs().max() == 0


def test_fixed_displacements_are_no_parameters_and_settling_fixes_learned_ones() -> None:
    torch.manual_seed(0)
    assert not list(Shift2d(9).parameters())
    layer = Shift2d(9, 5, start="uniform", learn=True, l1=0.1)
    assert [name for name, _ in layer.named_parameters()] == ["displacement"]
    assert layer.parameter_rules() == {"displacement": {"lr_scale": 0.01, "weight_decay": 0.0}}
    torch.testing.assert_close(layer.penalty(), 0.1 * layer.displacement.abs().sum())
    x = torch.randn(1, 9, 6, 6)
    before = layer(x)
    layer.settle()
    assert torch.equal(layer(x), before) and not list(layer.parameters()) and not layer.config()["learn"]
    assert layer.penalty() == 0 and layer.parameter_rules() == {}
    again = Shift2d(**layer.config())
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), before)
    bilinear = Shift2d(9, 5, start="uniform", learn=True, quantize=False)
    bilinear.settle()
    assert bilinear.learn and not bilinear.integer
    before = bilinear(x)
    bilinear.freeze()
    assert torch.equal(bilinear(x), before) and not bilinear.learn and not list(bilinear.parameters())


def test_macs_are_a_hand_count() -> None:
    assert Shift2d(16, stride=2).macs((1, 16, 7, 9)) == 0
    assert Shift2d(16, start="uniform", stride=2, quantize=False).macs((1, 16, 7, 9)) == 4 * 16 * 4 * 5


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("whole", [False, True])
def test_lowered_it_is_a_depthwise_convolution(stride: int, whole: bool) -> None:
    torch.manual_seed(0)
    layer = Shift2d(7, 7, stride, start="uniform", quantize=whole)
    layer.displacement.mul_(2.4)
    lowered = layer.lower("onnxruntime")
    assert isinstance(lowered, nn.Conv2d) and lowered.groups == 7
    assert not whole or set(lowered.weight.flatten().tolist()) == {0.0, 1.0}
    x = torch.randn(2, 7, 9, 8)
    torch.testing.assert_close(
        lowered(x), moved(x, round_half_away(layer.displacement) if whole else layer.displacement, stride)
    )


def test_displacements_of_zero_are_lowered_to_nothing() -> None:
    assert isinstance(Shift2d(5).lower("onnxruntime"), nn.Identity)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, r"`channels` \(=0\) must be at least 1"),
        ({"channels": 4, "stride": 0}, r"`stride` \(=0\) must be at least 1"),
        ({"channels": 4, "kernel_size": 4}, r"`kernel_size` \(=4\) must be odd, so that it has a centre"),
        (
            {"channels": 4, "kernel_size": 101, "dilation": 3},
            r"`kernel_size` \(=101\) with `dilation` \(=3\) must not be",
        ),
        ({"channels": 4, "start": "zero"}, r"`start` \(='zero'\) must be one of grouped, random, uniform"),
    ],
)
def test_arguments_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shift2d(**settings)  # type: ignore[arg-type]


class Net(nn.Module):
    """Conv-shift-conv between a convolution and a classifier."""

    def __init__(self, **shift: object) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 18, 3, padding=1), nn.BatchNorm2d(18), nn.ReLU())
        self.shift = Shift2d(18, stride=2, **shift)  # type: ignore[arg-type]
        self.conv = nn.Conv2d(18, 8, 1)
        self.tail = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tail(self.conv(self.shift(self.stem(x))))
        return out


def test_quantized_whole_pixels_stay_on_their_inputs_grid(tmp_path: Path) -> None:
    model = warm(Net())
    edit = quantize(model, tmp_path)
    places = quantizer_places(edit.model)
    assert "stem.2:call:0" in places and "shift:call:0" not in places
    export = export_onnx(edit.model, task().example, tmp_path / "m.onnx", input={"scale": 1.0, "mean": [0], "std": [1]})
    assert export["float_layers"] == {} and all(row["max_abs"] < 1e-4 for row in export["parity"])


def test_quantized_fractions_of_pixels_get_a_grid_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    edit = quantize(warm(Net(start="uniform", quantize=False)), tmp_path)
    assert {"stem.2:call:0", "shift:call:0"} <= set(quantizer_places(edit.model))
    (site,) = [site for site in edit.sites if site.name == "shift"]
    assert site.after is None and "no weights to quantize" in site.why


def test_batch_norm_folds_around_it_and_training_moves_learned_displacements(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Net(start="uniform", learn=True, quantize=False)
    before = model.shift.displacement.detach().clone()
    fit(model, task(), Work(tmp_path), FineTune(epochs=1, lr=0.1))
    steps = (model.shift.displacement - before).abs()
    assert 0 < steps.max() < 0.01  # three steps of at most lr / 100 and their momentum
    assert fold_batch_norm(model.eval()) == [("stem.0", "stem.1")]


def test_at_the_far_edge_the_gradient_is_that_of_the_side_within_reach() -> None:
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).view(1, 1, 1, 5)
    for start, expected in ((1.0, 4.0), (-1.0, 2.0)):  # at position 2: 8 - 4, and 4 - 2
        layer = Shift2d(1, 3, learn=True, normalize=False)
        with torch.no_grad():
            layer.displacement.copy_(torch.tensor([[0.0, start]]))
        layer(x)[0, 0, 0, 2].backward()
        assert layer.displacement.grad is not None
        assert layer.displacement.grad[0, 1] == pytest.approx(expected, rel=1e-5)


def test_a_layer_that_learns_can_be_used_twice() -> None:
    layer = Shift2d(4, 3, learn=True, quantize=False)
    with torch.no_grad():
        layer.displacement.fill_(1.5)
    layer(layer(torch.randn(2, 4, 5, 5)).relu()).square().sum().backward()
    assert layer.displacement.grad is not None and layer.displacement.max() == 1


def test_a_displacement_that_is_no_number_ends_in_a_training_error(tmp_path: Path) -> None:
    layer = Shift2d(2, 3, learn=True, quantize=False)
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))
    with torch.no_grad():
        layer.displacement[0, 0] = math.nan
    with pytest.raises(TrainingError, match="the loss became nan"):
        fit(model, task((2, 16, 16)), Work(tmp_path), FineTune(epochs=1))
