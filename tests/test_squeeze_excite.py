"""Squeeze-and-excitation and the stage that puts it in: exactly the identity at first, and in the right places."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, SHAPE, noise_task
from torch import Tensor, nn

import compress
from compress import checkpoint
from compress.errors import ConfigError
from compress.lower import export_onnx, lower
from compress.measure import profile
from compress.models import (
    alexnet,
    mobilenet_v1,
    mobilenet_v2,
    resnet20,
    se_resnet20,
    shift_resnet20,
    small,
    squeezenet1_1,
)
from compress.nn.separable import SeparableConv2d
from compress.nn.shift import ShiftConv2d
from compress.nn.squeeze_excite import SqueezeExcitation
from compress.stage import Edit
from compress.stages import Quantize, Shift, SqueezeExcite
from compress.surgery import layers
from compress.task import Work

IMAGES = (3, 16, 16)
BUILD = ("compress.models.small", {"classes": 3, "channels": 2})


def gated(model: nn.Module, shape: tuple[int, ...] = IMAGES, **settings: Any) -> Edit:
    return SqueezeExcite(**settings)(model, noise_task(shape), Work(Path()))


def changed(edit: Edit) -> list[str]:
    return [site.name for site in edit.sites if site.after is not None]


def reasons(edit: Edit) -> dict[str, str]:
    return {site.name: site.why for site in edit.sites if site.after is None}


def opened(model: nn.Module) -> nn.Module:
    """The model with gates that differ from 1, as after training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SqueezeExcitation):
                module.fc2.weight.copy_(torch.randn(module.fc2.weight.shape, generator=generator))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_gate_is_exactly_one_and_learns_from_the_first_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = SqueezeExcitation(32).to(dtype), torch.randn(2, 32, 5, 7).to(dtype)
    assert torch.equal(layer(x), x)
    assert torch.equal(layer.eval()(x), x)
    layer(x).square().sum().backward()
    assert layer.fc2.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("largest", [2.0, 1.0])
def test_layer_is_the_papers_formula(largest: float) -> None:
    torch.manual_seed(0)
    layer, x = SqueezeExcitation(24, 4, largest).double(), torch.randn(2, 24, 5, 7, dtype=torch.double)
    nn.init.normal_(layer.fc2.weight)
    nn.init.normal_(layer.fc2.bias)
    for image, scaled in zip(x, layer(x), strict=True):
        means = torch.stack([channel.sum() / 35 for channel in image])
        hidden = (layer.fc1.weight[..., 0, 0] @ means + layer.fc1.bias).clamp(min=0)
        logits = layer.fc2.weight[..., 0, 0] @ hidden + layer.fc2.bias
        gate = largest / (1 + torch.exp(-logits))
        torch.testing.assert_close(scaled, gate[:, None, None] * image)


@pytest.mark.parametrize(("channels", "reduction", "hidden"), [(256, 16, 16), (64, 16, 4), (16, 16, 4), (16, 2, 8)])
def test_counts_by_hand(channels: int, reduction: int, hidden: int) -> None:
    counted = profile(SqueezeExcitation(channels, reduction), torch.zeros(1, channels, 8, 8))
    assert counted.params == 2 * channels * hidden + hidden + channels
    assert (counted.macs, counted.uncounted) == (2 * channels * hidden, ())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), r"`channels` \(=0\) must be at least 1"),
        ((16, 0), r"`reduction` \(=0\) must be at least 1"),
        ((16, 16, 0.0), r"`largest` \(=0.0\) must be a finite number above 0; 2 starts as the identity"),
    ],
)
def test_arguments_are_checked(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SqueezeExcitation(*arguments)


def test_gates_stand_at_the_end_of_residual_branches() -> None:
    torch.manual_seed(0)
    model = resnet20().eval()
    before, x = copy.deepcopy(model), torch.randn(2, *IMAGES)
    edit = gated(model)
    assert changed(edit) == [f"layer{i}.{j}.bn2" for i in (1, 2, 3) for j in range(3)]
    assert torch.equal(edit.model(x), before(x))
    assert edit.notes == {"reduction": 16, "gates": 9, "params_added": 3060}
    site = next(site for site in edit.sites if site.name == "layer3.0.bn2")
    assert (site.before, site.after) == ("BatchNorm2d(64)", "BatchNorm2d(64) + SqueezeExcitation(64, reduction=16)")
    assert set(reasons(edit).values()) == {"no residual branch ends here"}


def test_a_branch_may_end_in_a_relu() -> None:
    edit = gated(shift_resnet20(expansion=1))
    assert changed(edit) == [f"blocks.{number}.bn2" for number in range(9)]


def test_of_two_convolved_sides_the_longer_one_is_the_branch() -> None:
    edit = gated(small(channels=3))
    assert changed(edit) == ["layer1.0.bn2", "layer2.0.bn2", "layer3.0.bn2"]
    shortcuts = [name for name, why in reasons(edit).items() if why.startswith("it ends the shortcut")]
    assert shortcuts == ["layer2.0.shortcut.1", "layer3.0.shortcut.1"]


def test_a_linear_bottleneck_that_is_added_to_is_no_branch() -> None:
    edit = gated(mobilenet_v2(10))
    # the blocks that add; the first of each group feeds the next one's shortcut and only that
    assert changed(edit) == [f"features.{i}.conv.3" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]
    assert reasons(edit)["features.2.conv.3"].startswith("it ends the shortcut")
    assert reasons(edit)["features.17.conv.3"] == "no residual branch ends here"


class Odd(nn.Module):
    """Additions that are written in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.dropout, self.passing = nn.Dropout(), nn.Identity()
        self.bias = nn.Parameter(torch.ones(8, 1, 1))
        self.fourth, self.unused = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.relu())
        y += x
        y = torch.add(y, self.dropout(self.second(y.relu())))
        y = y + self.passing(self.third(y)) + 1
        z: Tensor = self.fourth(y.relu()) + self.bias
        return z


def test_additions_however_they_are_written() -> None:
    torch.manual_seed(0)
    model, x = Odd().eval(), torch.randn(2, *SHAPE)
    expected = model(x)
    edit = gated(model, SHAPE)
    assert changed(edit) == ["first", "second", "third"]
    assert reasons(edit) == {"fourth": "no residual branch ends here", "unused": "never reached by the forward pass"}
    assert torch.equal(edit.model(x), expected)


@pytest.mark.parametrize(
    ("factory", "last"),
    [
        (lambda: alexnet(size=16), ["features.1", "features.5", "features.9", "features.12", "features.15"]),
        (lambda: squeezenet1_1(10), ["features.0", *(f"features.{i}.expand3x3" for i in (3, 4, 6, 7, 9, 10, 11, 12))]),
        (lambda: squeezenet1_1(10, bypass=True), ["features.0", "features.3.expand3x3", "features.4.expand3x3"]),
        (lambda: mobilenet_v1(10, width=0.25), ["stem.1", *(f"blocks.{i}.dw.1" for i in range(13))]),
    ],
)
def test_without_residual_branches_gates_stand_behind_wide_convolutions(
    factory: Callable[[], nn.Module], last: list[str]
) -> None:
    model, x = factory().eval(), torch.randn(1, 3, 16 if len(last) == 5 else 32, 16 if len(last) == 5 else 32)
    expected = model(x)
    edit = gated(model, tuple(x.shape[1:]))
    assert changed(edit)[: len(last)] == last
    assert set(reasons(edit).values()) == {"no convolution wider than 1x1 ends here"}
    assert torch.equal(edit.model(x), expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch says so of plain ones too
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_convolutions_keep_their_output(name: str) -> None:
    torch.manual_seed(0)
    model, x = AWKWARD[name]().eval(), torch.randn(2, *SHAPE)
    expected = model(x)
    wide = [n for n, layer in layers(model, (nn.Conv2d,)).items() if layer.kernel_size != (1, 1)]
    edit = gated(model, SHAPE)
    assert torch.equal(edit.model(x), expected)
    assert changed(edit) == wide
    assert len(layers(edit.model, (SqueezeExcitation,))) == len(wide)


def test_a_layer_of_ours_is_one_piece(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shift(taps=3, images=16)(Odd().eval(), noise_task(SHAPE), Work(tmp_path)).model
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    edit = gated(model, SHAPE)
    assert changed(edit) == ["first", "second", "third"]
    assert list(layers(edit.model, (ShiftConv2d,)))[:2] == ["first.0", "second.0"]
    assert torch.equal(edit.model(x), expected)


@pytest.mark.parametrize("residual", [False, True])
def test_a_layer_made_of_several_is_one_piece(residual: bool) -> None:
    torch.manual_seed(0)
    model = Odd() if residual else AWKWARD["plain"]()
    for name in ("first", "second", "third") if residual else ("2",):
        setattr(model, name, SeparableConv2d(8, 8, 3, 2, padding=1))
    model, x = model.eval(), torch.randn(2, *SHAPE)
    expected = model(x)
    edit = gated(model, SHAPE)
    assert changed(edit) == (["first", "second", "third"] if residual else ["2"])
    inner = "second.depthwise" if residual else "2.depthwise"
    assert reasons(edit)[inner].startswith("it is a part of SeparableConv2d(8, 8, ")
    assert torch.equal(edit.model(x), expected)


def test_twice_on_a_layer_is_an_error() -> None:
    model = gated(small(channels=3), exclude=["layer3*"]).model
    with pytest.raises(
        ConfigError, match=r"already behind layer1\.0\.bn2\.0, layer2\.0\.bn2\.0; put these layers into"
    ):
        gated(model)
    assert changed(gated(model, include=["layer3*"])) == ["layer3.0.bn2"]
    with pytest.raises(ConfigError, match=r"already behind layer1\.0\.bn2, layer1\.1\.bn2"):
        gated(se_resnet20())
    plain = gated(alexnet(size=16)).model
    with pytest.raises(ConfigError, match=r"already behind features\.1\.0, features\.5\.0"):
        gated(plain)


def test_what_cannot_be_changed_says_why() -> None:
    class Shaped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else x

    with pytest.raises(ConfigError, match="where branches end cannot be seen: the forward cannot be traced"):
        gated(Shaped(), SHAPE)
    with pytest.raises(ConfigError, match=r"no convolution wider than 1x1 ends here \(e.g. 0\)"):
        gated(nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)), SHAPE)
    with pytest.raises(ConfigError, match=r"`reduction` \(=0\) must be at least 1; 16 is usual"):
        SqueezeExcite(reduction=0)


def test_the_start_depends_on_the_seed_and_the_name_alone() -> None:
    torch.manual_seed(1)
    one = gated(small(channels=3), exclude=["layer1*"]).model
    drawn = torch.rand(1)
    torch.manual_seed(1)
    other = gated(small(channels=3)).model
    assert torch.equal(torch.rand(1), drawn)
    assert torch.equal(one.layer2[0].bn2[1].fc1.weight, other.layer2[0].bn2[1].fc1.weight)
    assert not torch.equal(other.layer3[0].bn2[1].fc1.weight[:, :48], other.layer2[0].bn2[1].fc1.weight[:4, :48])


def test_trained_gates_fold_quantize_reload_and_export(tmp_path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.manual_seed(0)
    task = noise_task((2, 8, 8))
    model = opened(gated(small(**BUILD[1]), (2, 8, 8)).model).eval()
    expected = model(task.example).detach()
    lowered = lower(model, "onnxruntime")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in lowered.modules())
    torch.testing.assert_close(lowered(task.example), expected, rtol=1e-4, atol=1e-4)
    edit = Quantize(calibration_images=32)(model, task, Work(tmp_path))
    quantized = {site.name for site in edit.sites if site.after == "int8 weights per channel, uint8 activations"}
    assert {"layer1.0.bn2.1.fc1", "layer1.0.bn2.1.fc2", "layer1.0.conv2"} <= quantized
    assert F.mse_loss(edit.model(task.example), expected) < 0.05 * expected.square().mean()
    path = tmp_path / "model.safetensors"
    checkpoint.save(edit.model.eval(), path, build=BUILD, input=task.input, provenance={}, results={})
    assert torch.equal(compress.load(path)(task.example), edit.model(task.example))
    told = export_onnx(edit.model, task.example, tmp_path / "model.onnx", input=task.input)
    assert told["float_layers"] == {}
    assert max(row["max_abs"] for row in told["parity"]) < 0.1 * float(expected.abs().max())
