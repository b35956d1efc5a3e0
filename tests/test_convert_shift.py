"""From bilinear shifts to whole pixels: exact where it can be, kept with a reason, solved for where it is not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from awkward import noise_task
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.models import as_net, as_resnet_w32
from compress.models.weights import load_weights, read_weights
from compress.nn.displace import Shift2d, ShiftPool2d
from compress.nn.displacement import displace
from compress.nn.shift import ShiftConv2d
from compress.nn.taps import round_half_away
from compress.reconstruct import seen_by
from compress.stage import Edit
from compress.stages import ConvertShift, Shift
from compress.surgery import describe, layers
from compress.task import Work

SHAPE = (2, 8, 8)


def net() -> nn.Module:
    torch.manual_seed(0)
    model = as_net(width=8, classes=3, channels=2, blocks=2)
    for layer in layers(model, (Shift2d,)).values():
        with torch.no_grad():
            layer.displacement.mul_(2)
    return model.eval()


def convert(model: nn.Module, path: Path, shape: tuple[int, ...] = SHAPE, **settings: object) -> Edit:
    return ConvertShift(images=32, **settings)(model, noise_task(shape), Work(path))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (8, 5)])
@pytest.mark.parametrize("stride", [2, 3])
def test_half_pixels_with_a_stride_are_a_pool_exactly(stride: int, size: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = Shift2d(6, 9, stride, start="uniform", quantize=False)
    layer.displacement.copy_(torch.randint(-4, 4, (6, 2)) + 0.5)
    x = torch.randn(2, 6, *size)
    expected = displace(x, layer.displacement, stride)
    model = convert(nn.Sequential(nn.ReLU(), layer), tmp_path, (6, *size)).model
    assert isinstance(model[1], ShiftPool2d)
    torch.testing.assert_close(model[1](x), expected)
    again = ShiftPool2d(**model[1].config())
    again.load_state_dict(model[1].state_dict())
    torch.testing.assert_close(again(x), expected)


def test_others_are_rounded_and_strided_ones_take_the_whole_part(tmp_path: Path) -> None:
    model = net()
    before = {name: layer.displacement.clone() for name, layer in layers(model, (Shift2d,)).items()}
    edit = convert(model, tmp_path, refit=False)
    assert {site.name for site in edit.sites if site.after} == set(before)
    for name, old in before.items():
        new = edit.model.get_submodule(name)
        inner = new.shift if isinstance(new, ShiftPool2d) else new
        wanted = torch.floor(old) if isinstance(new, ShiftPool2d) else round_half_away(old)
        assert torch.equal(inner.displacement, wanted) and inner.integer and not list(inner.parameters())
    pooled = [name for name in before if isinstance(edit.model.get_submodule(name), ShiftPool2d)]
    assert pooled == ["blocks.2.shift", "blocks.4.shift"]
    assert describe(edit.model.get_submodule(pooled[0])) == "ShiftPool2d(16, 15x15, whole pixels, stride=2)"


def test_either_kind_can_be_kept(tmp_path: Path) -> None:
    sites = {site.name: site for site in convert(net(), tmp_path, others="keep").sites}
    assert sites["blocks.2.shift"].after and sites["blocks.1.shift"].why == "`others` is keep"
    sites = {site.name: site for site in convert(net(), tmp_path, strided="keep").sites}
    assert sites["blocks.1.shift"].after and sites["blocks.2.shift"].why == "`strided` is keep"


def test_whole_pixels_are_kept_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="would change nothing; every layer was kept: it moves by whole pixels already"
    ):
        convert(nn.Sequential(Shift2d(2)), tmp_path)
    with pytest.raises(ConfigError, match="the stage found no layer of a kind it handles"):
        convert(nn.Sequential(nn.Conv2d(2, 2, 1)), tmp_path)


def test_the_convolutions_behind_are_solved_for(tmp_path: Path) -> None:
    original, x = net(), noise_task(SHAPE).example
    plain = convert(copy.deepcopy(original), tmp_path, refit=False).model
    edit = convert(copy.deepcopy(original), tmp_path)
    readers = [f"blocks.{number}.conv2" for number in range(6)]
    assert list(edit.notes["relative_error"]) == readers

    @torch.no_grad()
    def off(model: nn.Module) -> float:
        return float((model.blocks[0](original.conv0(x)) - original.blocks[0](original.conv0(x))).square().sum())

    assert off(edit.model) < off(plain)
    conv = edit.model.blocks[0].conv2
    # Least squares by torch on the same rows gives the same weights.
    images = torch.cat([batch for batch, _ in noise_task(SHAPE).calibration])
    now, then = (seen_by(m, m.blocks[0].conv2, 1, images)[0] for m in (edit.model, original))
    rows = now[0].transpose(0, 1).flatten(1).T.double()
    wanted = then[1].transpose(0, 1).flatten(1).T.double()
    best = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(conv.weight.flatten(1).double(), best, rtol=1e-2, atol=1e-2)


def test_a_convolution_that_others_read_past_is_left_alone(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = Shift2d(2, start="uniform", quantize=False)
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            moved = self.shift(x)
            out: Tensor = self.conv(moved) + moved
            return out

    model = Both()
    before = model.conv.weight.clone()
    edit = convert(model, tmp_path)
    assert edit.notes["relative_error"] == {} and torch.equal(model.conv.weight, before)


def test_used_on_maps_that_need_different_padding(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = Shift2d(2, stride=2, start="uniform", quantize=False)
            self.last = Shift2d(2, start="uniform", quantize=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.shift(self.shift(x)))
            return out

    sites = convert(Twice(), tmp_path, (2, 10, 10)).sites
    assert sites[0].after is None and "sizes that need different padding" in sites[0].why and sites[1].after


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strided": "round"}, r"`strided` \(='round'\) must be one of pool, keep"),
        ({"others": "pool"}, r"`others` \(='pool'\) must be one of round, keep"),
        ({"images": 0}, r"`images` \(=0\) must be at least 1"),
        ({"ridge": -1.0}, r"`ridge` \(=-1.0\) must be a finite number, 0 or more"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ConvertShift(**settings)  # type: ignore[arg-type]


def test_the_published_network_survives_the_rule_for_strides_but_not_rounding(data_root: Path, tmp_path: Path) -> None:
    model = as_resnet_w32()
    load_weights(model, data_root / "weights" / "as-resnet-w32.safetensors")
    golden = read_weights(data_root / "weights" / "as-resnet-w32-golden.safetensors")
    x = torch.stack([golden["cat.input"], golden["fish-bike.input"]])
    wanted = torch.stack([golden["cat.logits"], golden["fish-bike.logits"]])

    def cosine(converted: nn.Module) -> float:
        with torch.no_grad():
            out = converted(x)
        parts = [logits - logits.mean(1, keepdim=True) for logits in (out, wanted)]
        return float(torch.cosine_similarity(*parts).mean())

    rounded = copy.deepcopy(model.eval())
    for layer in layers(rounded, (Shift2d,)).values():
        layer.quantize = True
    assert cosine(rounded) < 0.4
    shape = (3, 224, 224)
    edit = ConvertShift(others="keep", refit=False)(model, noise_task(shape, images=2), Work(tmp_path))
    assert len([site for site in edit.sites if site.after]) == 4
    assert cosine(edit.model) > 0.98


def learned(path: Path) -> nn.Module:
    """A network of bilinear shift convolutions, made by the stage `Shift` and moved off the grid."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, 2, 1, groups=2), nn.ReLU())
    model = Shift(taps=3, learn=True, quantize=False, images=32)(model, noise_task(SHAPE), Work(path)).model
    for layer in layers(model, (ShiftConv2d,)).values():
        with torch.no_grad():
            layer.displacement.add_(torch.empty_like(layer.displacement).uniform_(-0.6, 0.6))
    return model.eval()


def test_shift_convolutions_are_rounded_parted_and_solved_for(tmp_path: Path) -> None:
    model = learned(tmp_path)
    x = torch.cat([images for images, _ in noise_task(SHAPE).calibration])[:32]
    wanted = model(x)
    lost = {}
    for refit in (False, True):
        edit = convert(copy.deepcopy(model), tmp_path, refit=refit)
        assert [bool(site.after) for site in edit.sites] == [True, True]
        for layer in layers(edit.model, (ShiftConv2d,)).values():
            assert layer.integer and not layer.learn and not layer.displacement.requires_grad
            assert all(len({tuple(place) for place in channel.tolist()}) == 3 for channel in layer.displacement)
        lost[refit] = float((edit.model(x) - wanted).detach().square().mean())
    assert lost[True] < 0.5 * lost[False] and list(edit.notes["relative_error"]) == ["0", "2"]


def test_shift_convolutions_can_be_kept_bilinear(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`others` is keep"):
        convert(learned(tmp_path), tmp_path, others="keep")
