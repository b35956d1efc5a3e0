"""Fire modules and the stage that makes them, against plain formulas and the convolutions they replace."""

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
from compress.nn.fire import Fire as FireModule
from compress.nn.fire import middle
from compress.stages import Fire
from compress.surgery import describe
from compress.task import Work

EVEN = "ignore:Using padding='same' with even kernel"  # torch says so of plain convolutions too


def test_layer_is_squeeze_relu_and_two_convolutions_side_by_side() -> None:
    torch.manual_seed(0)
    layer = FireModule(5, 9, 3, 4, 5, (3, 5), stride=(2, 1), padding=(2, 4), dilation=2)
    x = torch.randn(2, 5, 9, 11)
    squeezed = F.conv2d(x, layer.squeeze.weight, layer.squeeze.bias).clamp(min=0)
    assert layer.expand1 is not None
    near = F.conv2d(squeezed, layer.expand1.weight, layer.expand1.bias, (2, 1))
    wide = F.conv2d(squeezed, layer.expand3.weight, layer.expand3.bias, (2, 1), (2, 4), 2)
    torch.testing.assert_close(layer(x), torch.cat((near, wide), 1))
    assert layer(x).shape == nn.Conv2d(5, 9, (3, 5), (2, 1), (2, 4), 2)(x).shape
    assert describe(layer) == "Fire(5, 9, 3x5, squeeze=3, expand=4+5, stride=(2, 1), dilation=2)"
    turned = FireModule(5, 9, 3, 4, 5, (3, 5), stride=(2, 1), padding=(2, 4), dilation=2, reorder=True)
    order = torch.randperm(9)
    turned.load_state_dict({**layer.state_dict(), "order": order})
    torch.testing.assert_close(turned(x), torch.cat((near, wide), 1)[:, order])


def test_counts_of_squeezenets_first_module() -> None:
    layer = FireModule(96, 128, 16, 64, 64)
    counted = profile(layer, torch.zeros(1, 96, 5, 5))
    assert counted.params == 11_920  # the paper's table 1
    assert counted.macs == 25 * (96 * 16 + 16 * 64 + 9 * 16 * 64)


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("name", AWKWARD)
def test_enough_squeeze_channels_are_the_convolution(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AWKWARD[name]().eval()
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    stage = Fire(squeeze=2, pct3=1)
    if name.startswith("depthwise"):
        with pytest.raises(ConfigError, match=r"its groups \(=8\) read channels of their own"):
            stage(model, noise_task(), Work(tmp_path))
        return
    if name == "groups 2":
        with pytest.raises(ConfigError, match=r"its groups \(=2\) read channels of their own"):
            stage(model, noise_task(), Work(tmp_path))
        return
    edit = stage(model, noise_task(), Work(tmp_path))
    torch.testing.assert_close(edit.model(x), expected, rtol=0, atol=1e-5)
    for site in edit.sites:
        assert site.after is not None or "a 1x1 kernel has no spatial extent" in site.why


def test_inputs_that_are_never_negative_need_no_second_half(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AWKWARD["plain"]().eval()
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    edit = Fire(squeeze=8 / 12, pct3=1)(model, noise_task(), Work(tmp_path))
    assert "squeeze=8, expand=0+12" in str(edit.sites[1].after)
    torch.testing.assert_close(edit.model(x), expected, rtol=0, atol=1e-5)
    at_the_root = Fire(squeeze=8 / 12, pct3=1)(AWKWARD["at the root"](), noise_task(), Work(tmp_path))
    assert 0 < at_the_root.notes["relative_error"][""] < 0.1


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize("name", AWKWARD)
def test_the_default_keeps_shapes_and_says_what_it_leaves(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AWKWARD[name]().eval()
    x = torch.randn(2, *SHAPE)
    expected = model(x).shape
    try:
        edit = Fire()(model, noise_task(), Work(tmp_path))
    except ConfigError as error:
        assert "every layer was kept" in str(error)
        return
    assert edit.model(x).shape == expected
    assert all(0 < error < 1 for error in edit.notes["relative_error"].values())


@pytest.mark.parametrize("pct3", [1.0, 0.5])
def test_a_convolution_that_is_one_is_found_again(pct3: float, tmp_path: Path) -> None:
    """Of rank 3 over its inputs; with `pct3` 0.5 every other output sees the middle only. No zeros at the border."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 10, 3, stride=2, padding=1, padding_mode="reflect")
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("oqyx,qc->ocyx", torch.randn(10, 3, 3, 3), torch.randn(3, 8)))
        if pct3 < 1:
            kept = layer.weight[::2, :, 1:2, 1:2].clone()
            layer.weight[::2] = F.pad(kept, (1, 1, 1, 1))
    task = noise_task()
    x = task.calibration.x  # type: ignore[attr-defined]
    expected = layer(x).detach()
    edit = Fire(squeeze=0.3, pct3=pct3, ridge=1e-9)(layer, task, Work(tmp_path))
    torch.testing.assert_close(edit.model(x), expected, rtol=0, atol=1e-2)
    assert edit.notes["relative_error"][""] < 1e-4
    assert edit.model.squeeze(x).min() > -1e-4  # type: ignore[operator]  # nothing is clipped


@pytest.mark.filterwarnings(EVEN)
@pytest.mark.parametrize(
    ("kernel", "padding", "dilation"),
    [
        (3, 1, 1),
        (3, 2, 2),
        ((1, 5), (0, 2), 1),
        ((4, 2), "same", 1),
        (3, "same", (1, 3)),
        (1, "valid", 1),
        (3, (1, 0), 1),
        (2, 0, 1),
        (3, "valid", 1),
        (4, "same", 3),
        (2, 1, 2),
    ],
)
def test_middle_is_where_a_pointwise_convolution_looks(kernel: int, padding: int, dilation: int) -> None:
    layer = nn.Conv2d(1, 1, kernel, 1, padding, dilation, bias=False)
    x = torch.randn(1, 1, 9, 11)
    place = middle(layer)
    with torch.no_grad():
        found = []
        for y in range(layer.kernel_size[0]):
            for z in range(layer.kernel_size[1]):
                layer.weight.zero_()[0, 0, y, z] = 1
                if torch.equal(layer(x), x):
                    found.append((y, z))
    assert found == ([] if place is None else [place])


def test_layers_that_are_too_thin_are_named() -> None:
    with pytest.raises(ConfigError, match=r"leave nothing of a part of 2 \(0 squeeze, 6 1x1, 6 k x k channels\)"):
        Fire(squeeze=0.01)(AWKWARD["plain"](), noise_task(), Work(Path()))
    with pytest.raises(
        ConfigError, match=r"`pct3` \(=0.99\) .* 2 \(6 squeeze, 0 1x1, 12 k x k channels\); change them"
    ):
        Fire(pct3=0.99).check(AWKWARD["plain"]())
    Fire(squeeze=0.01, exclude=["2"]).check(AWKWARD["plain"]())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"squeeze": 0.0}, r"`squeeze` \(=0.0\) must be a finite number above 0"),
        ({"squeeze": math.inf}, r"`squeeze` \(=inf\) must be a finite number above 0"),
        ({"pct3": 0.0}, r"`pct3` \(=0.0\) must be above 0 and at most 1"),
        ({"pct3": 1.5}, r"`pct3` \(=1.5\) must be above 0 and at most 1"),
        ({"images": 0}, r"`images` \(=0\) must be at least 1"),
        ({"ridge": -1.0}, r"`ridge` \(=-1.0\) must be a finite number, 0 or more"),
        ({"gate": "time"}, r"`gate` \(='time'\) must be one of none, macs"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Fire(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"squeeze": 0}, r"`squeeze` \(=0\) must be at least 1"),
        ({"expand3": 0, "expand1": 8}, r"`expand3` \(=0\) must be at least 1"),
        ({"expand1": 3}, r"`expand1` \(=3\) and `expand3` \(=4\) must add up to `out_channels` \(=8\)"),
        ({"padding": (1, 0)}, r"`padding` \(=\(1, 0\)\) must keep the size .* set `expand1` to 0"),
    ],
)
def test_modules_that_make_no_sense(arguments: dict[str, int], message: str) -> None:
    whole = {"in_channels": 4, "out_channels": 8, "squeeze": 2, "expand1": 4, "expand3": 4}
    with pytest.raises(ValueError, match=message):
        FireModule(**{**whole, **arguments})  # type: ignore[arg-type]
