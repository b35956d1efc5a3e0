"""Low-rank layers and their fit, against plain convolutions, counts by formula and direct least squares."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, SHAPE
from torch import Tensor, nn

from compress.lowrank.decompose import vbmf_rank
from compress.lowrank.factors import Problem, Shape, factorize, regress, truncated
from compress.lowrank.fit import fit
from compress.measure import profile
from compress.nn.lowrank import LowRankConv2d, LowRankLinear
from compress.reconstruct import Normal, normal_equations
from compress.surgery import describe, layers

METHODS = ("tucker", "svd", "spatial", "cp")


def full_ranks(layer: nn.Conv2d, method: str) -> tuple[int, int]:
    """Ranks that any weights have, counted by hand."""
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    height, width = layer.kernel_size
    if height * width > 1 and method == "spatial":
        return min(inputs * height, outputs * width), outputs
    if height * width > 1 and method == "cp":
        return inputs, inputs * outputs * min(height, width)
    return inputs, outputs


def equations(layer: nn.Conv2d, x: Tensor) -> Normal:
    return normal_equations(layer, [(x, layer(x).detach())], len(x), bias=layer.bias is not None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", sorted(AWKWARD))
def test_full_rank_is_the_convolution(name: str, method: str) -> None:
    torch.manual_seed(0)
    for layer in layers(AWKWARD[name]().eval(), (nn.Conv2d,)).values():
        assert isinstance(layer, nn.Conv2d)
        ranks = full_ranks(layer, method)
        x = torch.randn(8, layer.in_channels, *SHAPE[1:])
        for normal in (None, equations(layer, x)):
            new, error = fit(layer, normal, method, ranks, ridge=1e-12, rounds=2)
            torch.testing.assert_close(new(x), layer(x), rtol=0, atol=1e-4)
            assert error < 1e-6
            again = LowRankConv2d(**new.config())
            again.load_state_dict(new.state_dict())
            assert torch.equal(again(x), new(x))


@pytest.mark.parametrize("method", ["tucker", "svd", "spatial"])
@pytest.mark.parametrize("groups", [1, 2])
def test_weights_of_low_rank_are_found_again(method: str, groups: int) -> None:
    torch.manual_seed(0)
    ranks = {"tucker": (3, 2), "svd": (8 // groups, 2), "spatial": (2, 12 // groups)}[method]
    layer = nn.Conv2d(8, 12, 3, padding=1, groups=groups)
    shape = Shape.of(layer, method)
    with torch.no_grad():
        kernels = torch.stack([truncated(each, ranks).kernel() for each in shape.kernel(layer)])
        layer.weight.copy_(kernels.permute(0, 3, 1, 2).reshape(layer.weight.shape))
    x = torch.randn(16, 8, 9, 9)
    new, error = fit(layer, equations(layer, x), method, ranks, ridge=1e-12, rounds=5)
    torch.testing.assert_close(new(x), layer(x), rtol=0, atol=1e-4)
    assert error < 1e-6


@pytest.mark.parametrize(
    ("settings", "weights", "macs"),
    [
        # S R3 + D^2 R3 R4 + T R4, at 8x8 in front of the stride and 4x4 behind it
        ({"ranks": [5, 7]}, 16 * 5 + 9 * 5 * 7 + 32 * 7, 64 * 16 * 5 + 16 * (9 * 5 * 7 + 32 * 7)),
        ({"ranks": [16, 7]}, 9 * 16 * 7 + 32 * 7, 16 * (9 * 16 * 7 + 32 * 7)),
        ({"ranks": [5, 32]}, 16 * 5 + 9 * 5 * 32, 64 * 16 * 5 + 16 * 9 * 5 * 32),
        ({"ranks": [5], "form": "spatial"}, 3 * 16 * 5 + 3 * 5 * 32, 32 * 3 * 16 * 5 + 16 * 3 * 5 * 32),
        ({"ranks": [5], "form": "cp"}, 16 * 5 + 6 * 5 + 5 * 32, 64 * 16 * 5 + 32 * 3 * 5 + 16 * (3 * 5 + 5 * 32)),
        ({"ranks": [5, 7], "groups": 2}, 16 * 5 + 18 * 5 * 7 + 32 * 7, 64 * 16 * 5 + 16 * (18 * 5 * 7 + 32 * 7)),
    ],
)
def test_weights_and_work_are_the_formula(settings: dict[str, Any], weights: int, macs: int) -> None:
    layer = LowRankConv2d(16, 32, 3, stride=2, padding=1, **settings)
    found = profile(layer, torch.zeros(2, 16, 8, 8))
    assert (found.params, found.macs, found.uncounted) == (weights + 32, macs, ())
    assert [part.bias is not None for part in layer.parts] == [False] * (len(layer.parts) - 1) + [True]


def test_descriptions() -> None:
    layer = LowRankConv2d(16, 32, 3, [5, 7], stride=2)
    assert describe(layer) == "LowRankConv2d(16, 32, 3x3, tucker, rank=5+7, stride=2)"
    assert describe(LowRankLinear(8, 4, 2)) == "LowRankLinear(8, 4, rank=2)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ranks": [2]}, r"`ranks` \(=\[2\]\) must be 2 of 1 or more for the form tucker"),
        ({"ranks": [0, 2]}, r"`ranks` \(=\[0, 2\]\) must be 2 of 1 or more"),
        ({"ranks": [5, 2]}, r"`ranks` \(=\[5, 2\]\) must not exceed a group's channels, \[4, 8\]"),
        ({"ranks": [2, 2], "form": "cp"}, r"must be 1 of 1 or more for the form cp"),
        ({"ranks": [2], "form": "tt"}, r"`form` \(='tt'\) must be one of tucker, spatial, cp"),
        ({"ranks": [1, 1], "groups": 3}, r"`in_channels` \(=4\) must be divisible by `groups` \(=3\)"),
    ],
)
def test_layers_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankConv2d(4, 8, 3, **settings)
    with pytest.raises(ValueError, match=r"`rank` \(=0\) must be at least 1"):
        LowRankLinear(4, 8, 0)


def smooth(images: int, channels: int) -> Tensor:
    return F.avg_pool2d(torch.randn(images, channels, 10, 10), 3, 1).relu()


@pytest.mark.parametrize("method", METHODS)
def test_the_fit_is_never_worse_than_the_truncation_and_tells_its_error(method: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 12, 3, padding=1, groups=2)
    x = smooth(32, 8)
    ranks = {"tucker": (2, 3), "svd": (4, 3), "spatial": (5, 6), "cp": (4, 6)}[method]

    def off(new: nn.Module) -> float:
        with torch.no_grad():
            return float((new(x) - layer(x)).square().sum() / layer(x).square().sum())

    plain, _ = fit(layer, None, method, ranks, 0.0, 0)
    start, _ = fit(layer, equations(layer, x), method, ranks, 0.0, 0)
    solved, told = fit(layer, equations(layer, x), method, ranks, 0.0, 10)
    assert off(solved) <= off(start) * (1 + 1e-6) and off(solved) < 0.9 * off(plain)
    assert told == pytest.approx(off(solved), rel=1e-3)


def test_regression_of_reduced_rank_is_the_best_there_is() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    x = smooth(32, 3)
    shape = Shape.of(layer, "svd")
    problem = Problem.of(equations(layer, x), 0, shape, ridge=0.0)
    factors = regress(problem, None, 2)
    rows = F.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    wanted = layer(x).detach().flatten(2).transpose(1, 2).flatten(0, 1).double()
    # Eckart and Young: the outputs nearest to these of rank 2, which lie in the span of the rows already.
    left, values, right = torch.linalg.svd(wanted, full_matrices=False)
    best = left[:, :2] * values[:2] @ right[:2]
    torch.testing.assert_close(rows @ factors.kernel().flatten(0, 1), best, rtol=0, atol=1e-5)


def test_the_first_factor_ends_where_nothing_is_better() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    problem = Problem.of(equations(layer, smooth(32, 4)), 0, Shape.of(layer, "tucker"), ridge=0.0)
    found = factorize(problem, (2, 3), 50)
    gain = problem.gain(found)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        moved = found.first + 1e-2 * torch.randn(4, 2, generator=generator, dtype=torch.float64)
        assert problem.gain(regress(problem, torch.linalg.qr(moved).Q, 3)) < gain * (1 + 1e-3)


def test_a_black_channel_has_a_solution() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, padding=1)
    x = smooth(16, 4)
    x[:, 1] = 0
    for method in METHODS:
        new, _ = fit(layer, equations(layer, x), method, (3, 3) if method == "tucker" else (4, 6), 0.0, 5)
        assert all(bool(p.isfinite().all()) for p in new.parameters())


def test_rank_that_stands_out_of_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 576, generator=generator)
    assert vbmf_rank(noise) == 0 and vbmf_rank(noise.mT) == 0
    signal = torch.randn(64, 8, generator=generator) @ torch.randn(8, 576, generator=generator)
    assert vbmf_rank(signal + noise) == 8 and vbmf_rank((signal + noise).mT) == 8
    assert vbmf_rank(torch.zeros(4, 9)) == 0
    assert math.isclose(vbmf_rank(1e-3 * (signal + noise)), 8)  # it does not depend on the unit
