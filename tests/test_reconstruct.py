"""The data-driven start, against direct least squares and exhaustive search."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from awkward import noise_task
from torch import nn

from compress.reconstruct import (
    Normal,
    eliminate,
    execution_order,
    fit_convolution,
    normal_equations,
    relative_error,
    seen_by,
)
from compress.stages import Shift
from compress.task import Work


def solve(normal: Normal, group: int, keep: torch.Tensor) -> torch.Tensor:
    """The least-squares weights of the kept features, straight from the normal equations."""
    gram, cross = normal.gram[group][keep][:, keep], normal.cross[group][keep]
    return torch.linalg.lstsq(gram, cross).solution


def data(layer: nn.Conv2d, images: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(images, layer.in_channels, 6, 6) @ torch.randn(6, 6)
    return x, layer(x).detach()


def test_a_convolution_is_found_again_from_what_it_does() -> None:
    layer = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, groups=2)
    x, y = data(layer)
    fitted = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, groups=2)
    assert fit_convolution(fitted, [(x, y)], len(x), ridge=0.0) < 1e-6
    torch.testing.assert_close(fitted.weight, layer.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fitted.bias, layer.bias, rtol=1e-3, atol=1e-4)


def test_the_gram_matrix_of_a_wide_layer_is_that_of_its_windows() -> None:
    layer = nn.Conv2d(62, 4, 3, bias=False)  # 558 features: put together from blocks of odd sizes
    x, y = data(layer, images=8)
    gram = normal_equations(layer, [(x, y)], 8, bias=False).gram[0]
    rows = F.unfold(x, 3).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(gram, rows @ rows.mT, rtol=1e-4, atol=1e-2)


def test_all_features_kept_gives_back_the_layer() -> None:
    layer = nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1, groups=2)
    x, y = data(layer)
    normal = normal_equations(layer, [(x, y)], len(x), bias=True)
    for group in range(2):
        weights = solve(normal, group, torch.arange(19))
        rows = slice(group * 3, group * 3 + 3)
        torch.testing.assert_close(weights[:-1].mT.float(), layer.weight[rows].flatten(1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(weights[-1].float(), layer.bias[rows], rtol=1e-3, atol=1e-4)
        assert relative_error(normal, group, torch.arange(19), weights) < 1e-6


def test_elimination_is_as_good_as_exhaustive_search_for_one_position_less() -> None:
    layer = nn.Conv2d(1, 5, 3, padding=1, bias=False)
    x, y = data(layer)
    normal = normal_equations(layer, [(x, y)], len(x), bias=False)
    kept, weights = eliminate(normal, 0, 9, 8, ridge=0.0)
    errors = {}
    for choice in itertools.combinations(range(9), 8):
        rows = torch.tensor(choice)
        errors[choice] = relative_error(normal, 0, rows, solve(normal, 0, rows))
    assert tuple(kept[0].tolist()) == min(errors, key=errors.__getitem__)
    torch.testing.assert_close(weights, solve(normal, 0, kept[0]))


def test_updated_inverse_gives_the_least_squares_solution() -> None:
    layer = nn.Conv2d(6, 8, 3, padding=1)
    x, y = data(layer)
    normal = normal_equations(layer, [(x, y)], len(x), bias=True)
    kept, weights = eliminate(normal, 0, 9, 3, ridge=0.0)
    rows = torch.cat(((torch.arange(6).unsqueeze(1) * 9 + kept).flatten(), torch.tensor([54])))
    unfolded = F.unfold(x, 3, padding=1).permute(1, 0, 2).flatten(1)
    unfolded = torch.cat((unfolded, torch.ones(1, unfolded.shape[1])))[rows].double()
    expected = torch.linalg.lstsq(unfolded.mT, y.permute(1, 0, 2, 3).flatten(1).mT.double()).solution
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)


def test_order_is_that_of_the_forward_pass() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.idle = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(self.first(x)))  # type: ignore[no-any-return]

    model = Backwards()
    named = {name: module for name, module in model.named_modules() if name}
    x = torch.randn(2, 4, 3, 3)
    assert execution_order(model, named, x) == {"first": 2, "last": 1}
    pairs = seen_by(model, model.first, 2, x)
    torch.testing.assert_close(pairs[1][0], pairs[0][1])
    torch.testing.assert_close(pairs[0][0], x)


def test_the_start_beats_the_largest_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))
    task = noise_task()
    images = task.calibration.x  # type: ignore[attr-defined]
    images.copy_(F.avg_pool2d(images, 3, 1, 1))
    with torch.no_grad():
        expected = model(images)
        plain = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in ((8, 16), (16, 8))))
        for mine, theirs in zip(plain, (model[0], model[2]), strict=True):
            energy = theirs.weight.square().sum(0).flatten(1)
            keep = torch.zeros_like(energy).scatter_(1, energy.topk(4, 1).indices, 1.0)
            mine.weight.copy_(theirs.weight * keep.view(1, -1, 3, 3))
            mine.bias.copy_(theirs.bias)
        largest = (plain[1](plain[0](images).relu()) - expected).square().sum()
        edit = Shift(taps=4)(model, task, Work(tmp_path))
        fitted = (edit.model(images) - expected).square().sum()
    assert fitted < 0.5 * largest
    assert set(edit.notes["relative_error"]) == {"0", "2"}


def test_channels_that_are_copies_of_each_other_can_be_solved_without_a_ridge() -> None:
    layer = nn.Conv2d(3, 4, 3)
    x = torch.randn(8, 1, 6, 6).repeat(1, 3, 1, 1)
    normal = normal_equations(layer, [(x, layer(x).detach())], len(x), bias=True)
    kept, weights = eliminate(normal, 0, 9, 3, ridge=0.0)
    assert kept.shape == (3, 3) and bool(weights.isfinite().all())
