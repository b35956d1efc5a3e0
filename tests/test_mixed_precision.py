"""Bits by layer under a budget: against measuring by hand, and what the report shows of it."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from random_task import task, warm
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.errors import ConfigError
from compress.lower.fold import fold_batch_norm
from compress.models import small
from compress.nn.quantized import FakeQuantizeWeight
from compress.plots import sensitivity
from compress.stage import Edit
from compress.stages.mixed_precision import MixedPrecision
from compress.task import Work


def net() -> nn.Module:
    """Always the same one, whose answers to the images differ."""
    torch.manual_seed(0)
    model = warm(small(channels=3))
    with torch.no_grad():
        model.linear.bias -= model(all_images()).mean(0)  # type: ignore[operator,union-attr]
    return model


def mixed(tmp_path: Path, **settings: object) -> Edit:
    given = {"bits": [2, 4, 8], "images": 32, "calibration_images": 32} | settings
    return MixedPrecision(**given)(net(), task(), Work(tmp_path))  # type: ignore[arg-type]


def bits_of(edit: Edit) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, module in edit.model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            grid = module.parametrizations.weight[-1]  # type: ignore[union-attr,index]
            assert isinstance(grid, FakeQuantizeWeight)
            found[name] = grid.bits
    return found


def all_images() -> Tensor:
    return torch.cat([x for x, _ in task().calibration])[:32]


def test_the_divergence_is_that_of_one_layer_rounded(tmp_path: Path) -> None:
    edit = mixed(tmp_path, like_bits=4, adaptive=False)
    model = net()
    fold_batch_norm(model)
    images = all_images()
    with torch.no_grad():
        wanted = model(images).log_softmax(1)
        for name in ("conv1", "layer2.0.conv2", "linear"):
            changed = copy.deepcopy(model)
            layer = changed.get_submodule(name)
            weight = layer.weight
            assert isinstance(weight, Tensor)
            runs = weight.flatten(1)
            best = torch.full((len(runs),), math.inf)
            rounded = torch.zeros_like(runs)
            for clip in torch.linspace(0.2, 1.0, 81):
                scale = runs.abs().amax(1, keepdim=True) * clip  # two bits: -1, 0, 1
                tried = (runs / scale).round().clamp(-1, 1) * scale
                error = (tried - runs).square().sum(1)
                rounded[error < best] = tried[error < best]
                best = torch.minimum(best, error)
            weight.copy_(rounded.view_as(weight))
            got = changed(images).log_softmax(1)
            off = float(F.kl_div(got, wanted, reduction="batchmean", log_target=True))
            assert edit.notes["sensitivity"][name]["2"]["divergence"] == pytest.approx(off, rel=0.01, abs=2e-6)


def test_bytes_stay_within_the_budget_and_layers_differ(tmp_path: Path) -> None:
    edit = mixed(tmp_path, like_bits=4)
    table, taken = edit.notes["sensitivity"], edit.notes["weight_bits"]
    uniform = sum(options["4"]["bytes"] for options in table.values())
    assert edit.notes["requested"] == {"bytes": uniform}
    assert edit.notes["weight_bytes"] == sum(table[name][str(bits)]["bytes"] for name, bits in taken.items())
    assert 0.8 * uniform < edit.notes["weight_bytes"] <= uniform
    assert bits_of(edit) == taken and len(set(taken.values())) > 1
    harm = {how: sum(table[n][str(b)]["divergence"] for n, b in how_bits) for how, how_bits in (
        ("mixed", list(taken.items())), ("uniform", [(name, 4) for name in table]),
    )}  # fmt: skip
    assert harm["mixed"] <= harm["uniform"]
    half = mixed(tmp_path, like_bits=3)
    least = sum(options["2"]["bytes"] for options in table.values())
    assert half.notes["requested"]["bytes"] == pytest.approx((least + uniform) / 2, abs=1)
    tight = mixed(tmp_path, budget_bytes=least)
    assert set(bits_of(tight).values()) == {2}


def test_answers_that_may_change(tmp_path: Path) -> None:
    strict, loose = mixed(tmp_path, changed=4.0), mixed(tmp_path, changed=60.0)
    assert loose.notes["weight_bytes"] < strict.notes["weight_bytes"]
    model, images = net(), all_images()
    edit = mixed(tmp_path, changed=4.0, activation_bits=None)
    with torch.no_grad():
        same = (edit.model.eval()(images).argmax(1) == model(images).argmax(1)).float().mean()
    assert edit.notes["activation_bits"] is None and float(same) > 0.8


def test_the_model_is_measured_and_not_changed_on_the_way(tmp_path: Path) -> None:
    """With one width to choose from the outcome is plain quantization."""
    from compress.stages.quantize import Quantize

    ours = mixed(tmp_path, bits=[4], like_bits=4).model.eval()
    theirs = Quantize(weight_bits=4, weight_range="mse", calibration_images=32)(
        net(), task(), Work(tmp_path)
    ).model.eval()
    with torch.no_grad():
        assert torch.equal(ours(all_images()), theirs(all_images()))


def test_the_plot_rings_what_was_chosen(tmp_path: Path) -> None:
    edit = mixed(tmp_path, like_bits=4)
    text = sensitivity(edit.notes, "s0")
    assert text.startswith("<svg") and all(name in text for name in edit.notes["sensitivity"])
    assert "8 bits" in text and "var(--accent)" in text


WRONG = [
    ({}, r"exactly one of `like_bits`, `budget_bytes` and `changed` must be given, not none"),
    ({"like_bits": 4.0, "changed": 1.0}, r"must be given, not `like_bits` and `changed`"),
    ({"like_bits": 9.0}, r"`like_bits` \(=9.0\) must lie between 2 and 8"),
    ({"like_bits": 4.0, "bits": [4, 9]}, r"`bits` \(=\[4, 9\]\) must be different numbers between 2 and 8"),
    ({"like_bits": 4.0, "bits": []}, r"`bits` \(=\[\]\)"),
    ({"changed": 0.0}, r"`changed` \(=0.0\) must be above 0"),
    ({"budget_bytes": 0}, r"`budget_bytes` \(=0\) must be at least 1"),
    ({"like_bits": 4.0, "activation_bits": 1}, r"`activation_bits` \(=1\) must be between 2 and 8, or null"),
    ({"like_bits": 4.0, "observer": "x"}, r"`observer` \(='x'\) must be one of histogram"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[str(settings) for settings, _ in WRONG])
def test_settings_that_make_no_sense(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixedPrecision(**settings)  # type: ignore[arg-type]


def test_budgets_that_cannot_be_met(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`budget_bytes` \(=10\) must be at least \d+: so much take 2 bits"):
        mixed(tmp_path, budget_bytes=10)
    with pytest.raises(ConfigError, match=r"`changed` \(=0.001\) must be at least .* of a hundred answers change"):
        mixed(tmp_path, changed=0.001, bits=[2])


def test_a_layer_called_twice_and_a_linear_network(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3 * 256, 10)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.linear(self.conv(self.conv(x).relu()).relu().flatten(1))
            return out

    torch.manual_seed(0)
    edit = MixedPrecision(like_bits=4, bits=[3, 6], images=32, calibration_images=32)(Twice(), task(), Work(tmp_path))
    assert set(bits_of(edit)) == {"conv", "linear"}
