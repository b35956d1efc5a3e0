"""The published shift networks: their counts, their weights, their export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import compress.models as models
from compress.errors import ConfigError, DataError
from compress.lower import export_onnx, lower
from compress.measure import profile
from compress.models.weights import load_weights, read_weights
from compress.nn.displace import Shift2d
from compress.surgery import layers

CIFAR, IMAGENET = torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 224, 224)

# Depth, expansion: parameters and multiply-adds; the parameters are those that the authors' repository prints.
SHIFT_RESNETS = {
    (20, 1): (34_906, 5_948_032),
    (20, 3): (95_642, 16_433_792),
    (20, 6): (186_746, 32_162_432),
    (20, 9): (277_850, 47_891_072),
    (56, 1): (102_106, 15_385_216),
    (56, 3): (294_554, 44_745_344),
    (56, 6): (583_226, 88_785_536),
    (56, 9): (871_898, 132_825_728),
    (110, 1): (202_906, 29_540_992),
    (110, 3): (592_922, 87_212_672),
    (110, 6): (1_177_946, 173_720_192),
    (110, 9): (1_762_970, 260_227_712),
}


@pytest.mark.parametrize(("depth", "expansion"), SHIFT_RESNETS)
def test_shift_resnets_count_what_the_paper_counts(depth: int, expansion: int) -> None:
    counted = profile(getattr(models, f"shift_resnet{depth}")(expansion=expansion), CIFAR)
    assert (counted.params, counted.macs) == SHIFT_RESNETS[depth, expansion] and not counted.uncounted
    # by hand: each of the n blocks of a group has width w and width * expansion channels inside
    blocks = (depth - 2) // 6
    params, inner = 3 * 9 * 16 + 2 * 16 + 64 * 10 + 10, 16
    for width in (16, 32, 64):
        for number in range(blocks):
            middle = width * expansion
            params += inner * middle + 2 * middle + middle * width + 2 * width
            params += inner * width + 2 * width if number == 0 and width != inner else 0
            inner = width
    assert params == counted.params


@pytest.mark.parametrize(("shift", "learned"), [("grouped", 0), ("random", 0), ("active", 336), ("sparse", 336)])
def test_only_learned_displacements_are_parameters(shift: str, learned: int) -> None:
    model = models.shift_resnet20(expansion=1, shift=shift)
    assert profile(model, CIFAR).params == 34_906 + 2 * learned
    assert sum(layer.channels for layer in layers(model, (Shift2d,)).values()) == 336
    assert all(layer.integer is (shift != "active") for layer in layers(model, (Shift2d,)).values())


# Millions of parameters in the paper's table for CIFAR
@pytest.mark.parametrize(
    ("width", "expansion", "millions"),
    [(16, 1, 0.035), (16, 3, 0.1), (16, 6, 0.19), (16, 9, 0.28), (46, 1, 0.28), (88, 1, 0.99)],
)
def test_as_nets_have_the_published_size(width: int, expansion: int, millions: float) -> None:
    digits = 3 if millions < 0.1 else 2
    assert round(profile(models.as_net(width, expansion), CIFAR).params / 1e6, digits) == millions


# Millions of parameters and of multiply-adds in the papers' tables
@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("as_resnet_w32", 0.90, 171),
        ("as_resnet_w50", 1.96, 404),
        ("as_resnet_w68", 3.42, None),  # published 729; the layers of the authors' file have 736
        ("shiftnet_a", 4.19, 1424),
        ("shiftnet_b", 1.18, 371),
        ("shiftnet_c", 0.78, None),
    ],
)
def test_imagenet_networks_have_the_published_size(name: str, params: float, macs: int | None) -> None:
    counted = profile(getattr(models, name)(), IMAGENET)
    assert round(counted.params / 1e6, 2) == params and not counted.uncounted
    assert macs is None or round(counted.macs / 1e6) == macs


@pytest.mark.parametrize(
    ("settings", "weights", "macs"),
    [
        ({}, 3.92, 410.5),
        ({"head": 1932}, 4.61, 417.9),
        ({"head": 1932, "width": 1.375}, 6.73, 773.2),
        ({"head": 1932, "width": 1.375, "hidden": "input"}, 5.99, 563.7),
    ],
)
def test_fe_nets_are_those_of_the_authors_logs(settings: dict[str, object], weights: float, macs: float) -> None:
    model = models.fe_net(**settings)  # type: ignore[arg-type]
    shifted = sum(layer.channels for layer in layers(model, (Shift2d,)).values())
    counted = profile(model, IMAGENET)
    assert round((counted.params - 2 * shifted) / 1e6, 2) == weights
    assert round(counted.macs / 1e6, 1) == macs
    assert "width" in settings or shifted == 5_344


def test_the_published_active_shift_network_gives_its_logits(data_root: Path) -> None:
    model = models.as_resnet_w32()
    load_weights(model, data_root / "weights" / "as-resnet-w32.safetensors")
    golden = read_weights(data_root / "weights" / "as-resnet-w32-golden.safetensors")
    with torch.no_grad():
        out = model.eval()(torch.stack([golden["cat.input"], golden["fish-bike.input"]]))
    torch.testing.assert_close(out, torch.stack([golden["cat.logits"], golden["fish-bike.logits"]]), rtol=0, atol=1e-3)
    probability, label = out[1].softmax(0).max(0)
    assert label == 870 and round(float(probability), 3) == 0.708


def test_a_file_of_our_own_names_loads_as_it_is_and_a_broken_one_is_named(data_root: Path, tmp_path: Path) -> None:
    model = models.as_net(width=4)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    load_weights(model, tmp_path / "own.safetensors")
    with pytest.raises(DataError, match=r"do not fit ASResNet: missing: blocks\.1\.shortcut\.weight"):
        load_weights(models.as_resnet_w32(), tmp_path / "own.safetensors")
    published = read_weights(data_root / "weights" / "as-resnet-w32.safetensors")
    del published["shift2_3/2.shift_x"]
    save_file({**published, "extra/9.weight": torch.zeros(1)}, tmp_path / "theirs.safetensors")
    with pytest.raises(DataError, match=r"missing: blocks.6.shift.displacement; unexpected: extra/9.weight"):
        load_weights(models.as_resnet_w32(), tmp_path / "theirs.safetensors")


@pytest.mark.parametrize(
    ("model", "side"),
    [
        (lambda: models.as_net(8), 17),
        (lambda: models.shift_resnet20(expansion=1, shift="sparse"), 17),
        (lambda: models.shiftnet_c(), 65),
        (lambda: models.fe_net(width=0.25, head=32), 65),
    ],
)
def test_each_family_trains_and_is_lowered_to_plain_layers(model: Callable[[], nn.Module], side: int) -> None:
    torch.manual_seed(0)
    net, x = model(), torch.randn(2, 3, side, side)
    net.train()(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    plain = lower(net.eval(), "onnxruntime")
    assert not layers(plain, (Shift2d,))
    with torch.no_grad():
        torch.testing.assert_close(plain(x), net(x), rtol=1e-4, atol=1e-4)


def test_bilinear_shifts_are_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = models.as_net(8, blocks=1).eval(), torch.randn(2, 3, 17, 17)
    export = export_onnx(net, x, tmp_path / "m.onnx", input={"scale": 1.0, "mean": [0], "std": [1]})
    assert all(row["max_abs"] < 1e-4 for row in export["parity"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.shift_resnet20(shift="none"), r"`shift` \(='none'\) must be one of grouped, random, active"),
        (lambda: models.shift_resnet20(shift="sparse", l1=-1.0), r"`l1` \(=-1.0\) must be a finite number, 0 or more"),
        (lambda: models.shift_resnet20(expansion=0), r"`expansion` \(=0\) must be at least 1/16"),
        (lambda: models.as_net(width=0), r"`width` \(=0\), `expansion` \(=1\) and `blocks` \(=3\) must be at least 1"),
        (lambda: models.as_net(blocks=0), r"`blocks` \(=0\) must be at least 1"),
        (lambda: models.fe_net(l1=-1.0), r"`l1` \(=-1.0\) must be a finite number, 0 or more"),
        (lambda: models.fe_net(hidden="both"), r"`hidden` \(='both'\) must be one of output, input"),
        (lambda: models.fe_net(width=0.1), r"`width` \(=0.1\) must be at least 1/4"),
    ],
)
def test_arguments_are_checked(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
