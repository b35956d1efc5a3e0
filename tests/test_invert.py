"""Inverted bottlenecks and the stage that makes them, against plain formulas and the convolutions they replace."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, SHAPE, noise_task
from torch import nn

from compress.errors import ConfigError
from compress.measure import profile
from compress.nn.inverted import InvertedConv2d
from compress.stages import Invert
from compress.surgery import describe, layers
from compress.task import Work

EVEN = "ignore:Using padding='same' with even kernel"  # torch says so of plain convolutions too
GROUPED = {"groups 2": 2, "depthwise": 8, "depthwise, multiplier 2": 8}


@pytest.mark.parametrize("clip6", [False, True])
def test_layer_is_expand_filter_project(clip6: bool) -> None:
    torch.manual_seed(0)
    layer = InvertedConv2d(3, 5, (3, 5), 2, stride=(2, 1), padding=(2, 4), dilation=2, clip6=clip6)
    x = 9 * torch.randn(2, 3, 9, 11)
    most = 6.0 if clip6 else math.inf
    hidden = F.conv2d(x, layer.expand.weight, layer.expand.bias).clamp(0, most)
    hidden = F.conv2d(hidden, layer.depthwise.weight, layer.depthwise.bias, (2, 1), (2, 4), 2, groups=6).clamp(0, most)
    torch.testing.assert_close(layer(x), F.conv2d(hidden, layer.project.weight, layer.project.bias))
    assert layer(x).shape == nn.Conv2d(3, 5, (3, 5), (2, 1), (2, 4), 2)(x).shape
    text = "InvertedConv2d(3, 5, 3x5, expansion=2, stride=(2, 1), dilation=2"
    assert describe(layer) == text + (", clip6)" if clip6 else ")")


def test_counts() -> None:
    counted = profile(InvertedConv2d(8, 12, 3, 4, stride=2, padding=1), torch.zeros(1, 8, 6, 6))
    assert counted.params == (8 * 32 + 32) + (9 * 32 + 32) + (32 * 12 + 12)
    assert counted.macs == 36 * 8 * 32 + 9 * (9 * 32 + 32 * 12)


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("name", AWKWARD)
def test_enough_copies_are_the_convolution(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AWKWARD[name]().eval()
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    widest = max(math.prod(layer.kernel_size) for layer in layers(model, (nn.Conv2d,)).values())
    stage = Invert(expansion=2 * widest)
    if name in GROUPED:
        with pytest.raises(ConfigError, match=rf"its groups \(={GROUPED[name]}\) read channels of their own"):
            stage(model, noise_task(), Work(tmp_path))
        return
    edit = stage(model, noise_task(), Work(tmp_path))
    torch.testing.assert_close(edit.model(x), expected, rtol=0, atol=1e-5)
    for site in edit.sites:
        assert site.after is not None or "a 1x1 kernel has nothing" in site.why


def test_inputs_that_are_never_negative_need_half_as_many(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AWKWARD["plain"]().eval()
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    edit = Invert(expansion=9)(model, noise_task(), Work(tmp_path))
    assert str(edit.sites[1].after) == "InvertedConv2d(8, 12, 3x3, expansion=9)"
    torch.testing.assert_close(edit.model(x), expected, rtol=0, atol=1e-5)
    again = Invert(expansion=18)(AWKWARD["plain"](), noise_task(), Work(tmp_path))
    assert again.sites[1].after == edit.sites[1].after


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("clip6", [False, True])
@pytest.mark.parametrize("name", AWKWARD)
def test_few_copies_keep_shapes(name: str, clip6: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AWKWARD[name]().eval()
    x = torch.randn(2, *SHAPE)
    expected = model(x).shape
    try:
        edit = Invert(expansion=2, clip6=clip6)(model, noise_task(), Work(tmp_path))
    except ConfigError as error:
        assert "every layer was kept" in str(error)
        return
    assert edit.model(x).shape == expected
    assert all(0 <= error < 1 for error in edit.notes["relative_error"].values())


@pytest.mark.parametrize("clip6", [False, True])
@pytest.mark.parametrize("sign", ["any", "positive"])
def test_a_separable_convolution_is_found_again(sign: str, clip6: bool, tmp_path: Path) -> None:
    """Two kernels for each input channel; no zeros at the border, where a lifted channel would see them."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 10, 3, stride=2, padding=1, padding_mode="reflect")
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("oct,ctyx->ocyx", torch.randn(10, 8, 2), torch.randn(8, 2, 3, 3)))
    task = noise_task()
    x = task.calibration.x  # type: ignore[attr-defined]
    if sign == "positive":
        x.abs_()
    expected = layer(x).detach()
    edit = Invert(expansion=2, clip6=clip6, ridge=1e-9)(layer, task, Work(tmp_path))
    torch.testing.assert_close(edit.model(x), expected, rtol=0, atol=1e-2)
    assert edit.notes["relative_error"][""] < 1e-5
    expand, depthwise = edit.model.expand, edit.model.depthwise
    for hidden in (expand(x), depthwise(expand(x))):  # type: ignore[operator]
        assert hidden.min() > -1e-4 and (not clip6 or hidden.max() < 6 + 1e-4)  # nothing is clipped


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expansion": 0}, r"`expansion` \(=0\) must be at least 1"),
        ({"images": 0}, r"`images` \(=0\) must be at least 1"),
        ({"ridge": -1.0}, r"`ridge` \(=-1.0\) must be a finite number, 0 or more"),
        ({"gate": "time"}, r"`gate` \(='time'\) must be one of none, macs"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Invert(**settings)  # type: ignore[arg-type]


def test_no_channel() -> None:
    with pytest.raises(ValueError, match=r"`expansion` \(=0\) must be at least 1"):
        InvertedConv2d(4, 4, 3, 0)
