"""The networks besides plain ResNets: counts by hand, published weights, real images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import compress.models
from compress.constructors import build_base
from compress.data.folder import decode
from compress.data.input import normalise
from compress.errors import ConfigError
from compress.lower import export_onnx, export_pt2, lower
from compress.measure import profile
from compress.models.mobilenet import MobileNetV1
from compress.models.squeezenet import Fire
from compress.models.weights import load_weights
from compress.nn.places import trace

# ImageNet's numbers of the ten classes of imagenette
IMAGENETTE = {
    "n01440764": 0,
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
}
SMALL_STRIDES = [1, 1, 1, 2, 2, 1, 2, 1]
# every factory, with arguments that make it quick, and the side of its images
QUICK: dict[str, tuple[dict[str, Any], int]] = {
    "squeezenet1_0": ({"padding": 1, "bypass": True}, 40),
    "squeezenet1_1": ({}, 40),
    "mobilenet_v1": ({"width": 0.25}, 64),
    "mobilenet_v2": ({"width": 0.25, "strides": SMALL_STRIDES}, 16),
    "se_resnet20": ({"shortcut": "conv"}, 16),
    "alexnet": ({"size": 8}, 8),
}


def quick(name: str) -> tuple[nn.Module, Tensor]:
    """The network with random weights and batch norm statistics, and two images."""
    arguments, side = QUICK[name]
    torch.manual_seed(0)
    model: nn.Module = getattr(compress.models, name)(classes=5, **arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval(), torch.randn(2, 3, side, side)


def resnet20_params(w: int) -> int:
    convolutions = 9 * (3 * w + 6 * w**2 + w * 2 * w + 5 * 4 * w**2 + 2 * w * 4 * w + 5 * 16 * w**2)
    return convolutions + 2 * (w + 6 * w + 6 * 2 * w + 6 * 4 * w) + 10 * (4 * w + 1)


def squeezenet_params(kernel: int, width: int) -> int:
    fires = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
    total = kernel**2 * 3 * width + width
    for squeeze, expand in fires:
        total += width * squeeze + squeeze + squeeze * expand + expand + 9 * squeeze * expand + expand
        width = 2 * expand
    return total + 512 * 1000 + 1000


def mobilenet_v1_params(width: float) -> int:
    c = [int(channels * width) for channels in (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)]
    blocks = sum(9 * a + 2 * a + a * b + 2 * b for a, b in itertools.pairwise(c))
    return 27 * c[0] + 2 * c[0] + blocks + 1000 * c[-1] + 1000


def mobilenet_v2_params(classes: int) -> int:
    total, before = 27 * 32 + 2 * 32, 32
    for expansion, wide, blocks in (
        *((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4)),
        *((6, 96, 3), (6, 160, 3), (6, 320, 1)),
    ):
        for _ in range(blocks):
            hidden = before * expansion
            total += (before * hidden + 2 * hidden) * (expansion > 1) + 11 * hidden + hidden * wide + 2 * wide
            before = wide
    return total + 320 * 1280 + 2 * 1280 + 1280 * classes + classes


def se_params(blocks: int) -> int:
    return sum(blocks * (2 * c * hidden + hidden + c) for c, hidden in ((16, 4), (32, 4), (64, 4)))


def alexnet_params(side: int) -> int:
    c = (3, 64, 192, 384, 256, 256)
    convolutions = sum(9 * a * b + 2 * b for a, b in itertools.pairwise(c))
    inner = 256 * (side // 8) ** 2
    return convolutions + inner * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 10 + 10


@pytest.mark.parametrize(
    ("factory", "arguments", "by_hand", "known"),
    [
        ("squeezenet1_0", {}, squeezenet_params(7, 96), 1_248_424),
        ("squeezenet1_0", {"bypass": True}, squeezenet_params(7, 96), 1_248_424),
        ("squeezenet1_1", {}, squeezenet_params(3, 64), 1_235_496),
        ("mobilenet_v1", {}, mobilenet_v1_params(1), 4_231_976),
        ("mobilenet_v1", {"width": 0.75}, mobilenet_v1_params(0.75), 2_585_560),
        ("mobilenet_v2", {}, mobilenet_v2_params(1000), 3_504_872),
        ("mobilenet_v2", {"classes": 10, "strides": SMALL_STRIDES}, mobilenet_v2_params(10), 2_236_682),
        ("resnet20", {}, resnet20_params(16), 269_722),
        ("resnet20", {"width": 32}, resnet20_params(32), 1_073_962),
        ("se_resnet20", {}, 269_722 + se_params(3), 272_782),
        ("se_resnet20", {"shortcut": "conv"}, 272_474 + se_params(3), 275_534),
        ("se_resnet56", {}, 853_018 + se_params(9), 862_198),
        ("alexnet", {}, alexnet_params(32), 35_856_330),
        ("alexnet", {"size": 28}, alexnet_params(28), 28_516_298),
    ],
)
def test_parameters(factory: str, arguments: dict[str, Any], by_hand: int, known: int) -> None:
    model = build_base((f"compress.models.{factory}", arguments), allow=(), device="meta")
    assert sum(p.numel() for p in model.parameters()) == by_hand == known


@pytest.mark.parametrize(
    ("factory", "arguments", "side", "millions"),
    [
        ("squeezenet1_0", {"padding": 1}, 227, 861),  # "1.72 GFLOPs" in the authors' repository
        ("squeezenet1_1", {}, 224, 349),
        ("mobilenet_v1", {}, 224, 569),  # as in the paper's table
        ("mobilenet_v1", {"width": 0.75}, 224, 325),  # likewise
        ("mobilenet_v2", {}, 224, 301),
        ("mobilenet_v2", {"classes": 10, "strides": SMALL_STRIDES}, 32, 88),
    ],
)
def test_macs_are_those_published(factory: str, arguments: dict[str, Any], side: int, millions: int) -> None:
    counted = profile(getattr(compress.models, factory)(**arguments), torch.zeros(1, 3, side, side))
    assert (round(counted.macs / 1e6), counted.uncounted) == (millions, ())


def test_a_fire_module_is_two_convolutions_side_by_side() -> None:
    torch.manual_seed(0)
    fire, x = Fire(8, 3, 4, bypass=False), torch.randn(2, 8, 5, 5)
    bypassed = Fire(8, 3, 4, bypass=True)
    bypassed.load_state_dict(fire.state_dict())
    y = F.relu(F.conv2d(x, fire.squeeze.weight, fire.squeeze.bias))
    near = F.conv2d(y, fire.expand1x1.weight, fire.expand1x1.bias)
    wide = F.conv2d(y, fire.expand3x3.weight, fire.expand3x3.bias, padding=1)
    expected = torch.cat((near, wide), 1).relu()
    torch.testing.assert_close(fire(x), expected)
    torch.testing.assert_close(bypassed(x), expected + x)


def test_squeezenet_pools_round_up_and_every_second_fire_is_bypassed() -> None:
    model = compress.models.squeezenet1_0(bypass=True, padding=1).to("meta")
    x, sides = torch.zeros(1, 3, 227, 227, device="meta"), []
    for layer in model.features:
        x = layer(x)
        sides += [x.shape[-1]] * isinstance(layer, nn.Conv2d | nn.MaxPool2d)
    assert sides == [111, 55, 27, 13]
    assert model.classifier[1](x).shape[-1] == 15
    # fire3, fire5, fire7 and fire9
    assert [i for i, m in enumerate(model.features) if isinstance(m, Fire) and m.bypass] == [4, 7, 9, 12]
    even = compress.models.squeezenet1_0().to("meta").features[:3](torch.zeros(1, 3, 230, 230, device="meta"))
    assert even.shape[-1] == 56  # of 112: 55 if rounded down


@pytest.mark.parametrize("side", [32, 64, 224])
def test_mobilenet_v1_pads_as_tensorflow_does(side: int) -> None:
    torch.manual_seed(0)
    model = compress.models.mobilenet_v1(width=0.25).eval()
    x = torch.randn(1, 3, side, side)
    total = max((math.ceil(side / 2) - 1) * 2 + 3 - side, 0)  # tf.nn's "SAME"
    before, after = total // 2, total - total // 2
    convolution, norm, _ = model.stem
    expected = F.conv2d(F.pad(x, (before, after, before, after)), convolution.weight, stride=2)
    assert norm.eps == 1e-3
    expected = F.batch_norm(expected, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3)
    torch.testing.assert_close(model.stem(model.pad(x)), expected.clamp(0, 6))
    assert model.blocks(expected).shape == (1, 256, side // 32, side // 32)


def test_mobilenet_v2_rounds_channels_and_adds_where_shapes_are_the_same() -> None:
    model = compress.models.mobilenet_v2(width=0.35)
    # 0.35 times 32, 16, 24, 32, 64, 96, 160, 320: to multiples of 8, none below nine tenths
    widths = [layer[0].out_channels if i in (0, 18) else layer.conv[-1].num_features
              for i, layer in enumerate(model.features)]  # fmt: skip
    assert widths == [16, 8, *[8] * 2, *[16] * 3, *[24] * 4, *[32] * 3, *[56] * 3, 112, 1280]
    residual = [i for i, layer in enumerate(model.features) if getattr(layer, "residual", False)]
    assert residual == [3, 5, 6, 8, 9, 10, 12, 13, 15, 16]
    small = compress.models.mobilenet_v2(strides=SMALL_STRIDES).to("meta")
    assert small.features(torch.zeros(1, 3, 32, 32, device="meta")).shape == (1, 1280, 4, 4)
    names = {"features.0.0.weight", "features.1.conv.1.weight", "features.2.conv.3.running_mean", "classifier.1.bias"}
    assert names < set(small.state_dict())


def test_se_resnet_scales_each_branch_before_the_addition() -> None:
    torch.manual_seed(0)
    block = compress.models.se_resnet20().eval().layer1[0]
    x = torch.randn(2, 16, 6, 6)
    y = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    hidden = F.relu(y.mean((2, 3)) @ block.se.fc1.weight[..., 0, 0].T + block.se.fc1.bias)
    gate = 1 / (1 + torch.exp(-(hidden @ block.se.fc2.weight[..., 0, 0].T + block.se.fc2.bias)))
    torch.testing.assert_close(block(x), F.relu(y * gate[..., None, None] + x))
    assert gate.std() > 0.01


@pytest.mark.parametrize("name", QUICK)
def test_every_network_is_built_by_name_traced_and_folded(name: str) -> None:
    model, x = quick(name)
    trace(model)
    assert model(x).shape == (2, 5)
    lowered = lower(model, "onnxruntime")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in lowered.modules())
    torch.testing.assert_close(lowered(x), model(x), rtol=1e-4, atol=1e-4)
    build = (f"compress.models.{name}", {"classes": 5, "channels": 1, **QUICK[name][0]})
    grey = build_base(build, allow=(), device="meta")
    assert grey(x[:, :1].to("meta")).shape == (2, 5)


@pytest.mark.parametrize("export", [export_onnx, export_pt2])
def test_padding_on_one_side_is_exported(export: Callable[..., Any], tmp_path: Path) -> None:
    model, x = quick("mobilenet_v1")
    settings = {"input": {}} if export is export_onnx else {}
    told = export(model, x, tmp_path / "model", **settings)
    assert {row["batch"] for row in told["parity"]} == {1, 2, 7}
    assert max(row["max_abs"] for row in told["parity"]) < 1e-4


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("mobilenet_v1", {"width": 0}, r"`width` \(=0\) must be a finite number above 0"),
        ("mobilenet_v2", {"width": math.inf}, r"`width` \(=inf\) must be a finite number above 0"),
        ("mobilenet_v2", {"strides": [2, 2]}, r"`strides` \(=\[2, 2\]\) must be 8 times 1 or 2"),
        ("mobilenet_v2", {"strides": [3] * 8}, r"must be 8 times 1 or 2: for the first convolution and the 7 groups"),
        ("resnet56", {"width": 0}, r"`width` \(=0\) must be at least 1; the paper has 16"),
        ("se_resnet20", {"reduction": 0}, r"`reduction` \(=0\) must be at least 1"),
        ("alexnet", {"size": 7}, r"`size` \(=7\) must be at least 8 pixels"),
    ],
)
def test_arguments_are_checked(factory: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        getattr(compress.models, factory)(**arguments)


def real(data_root: Path, per_class: int, side: int, **described: Any) -> tuple[Tensor, Tensor]:
    """The first images of each of the ten classes of imagenette-mini's val/, and their numbers among ImageNet's."""
    pixels, labels = [], []
    for folder, number in IMAGENETTE.items():
        files = sorted((data_root / "imagenette-mini" / "val" / folder).iterdir())[:per_class]
        pixels += [torch.from_numpy(decode(str(file), (side, side), side)) for file in files]
        labels += [number] * len(files)
    return normalise(torch.stack(pixels), described), torch.tensor(labels)


def test_the_deep_compressed_squeezenet(data_root: Path) -> None:
    model = compress.models.squeezenet1_0(padding=1).eval()
    load_weights(model, data_root / "weights" / "squeezenet_v1.0-deep-compressed.pt")
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    assert (sum(w.numel() for w in weights), sum(int(w.count_nonzero()) for w in weights)) == (1_244_448, 415_921)
    assert max(len(w.unique()) for w in weights) <= 256
    x, labels = real(data_root, 2, 227, order="bgr", scale=1, mean=[104, 117, 123], std=[1, 1, 1])
    with torch.no_grad():
        found = model(x).topk(5).indices
    right = (found == labels[:, None]).any(1)
    assert int(right.sum()) >= 12, (found, labels)  # of 20, the class among the first five of 1000


def test_the_published_mobilenet_v1(data_root: Path) -> None:
    model: MobileNetV1 = compress.models.mobilenet_v1(width=0.75).eval()
    load_weights(model, data_root / "weights" / "mobilenet_v1_0.75_224.pt")
    x, labels = real(data_root, 3, 224, order="rgb", scale=127.5, mean=[1, 1, 1], std=[1, 1, 1])
    with torch.no_grad():
        right = model(x).argmax(1) == labels
    assert int(right.sum()) >= 17, right  # of 30; 72.8 % of all are expected
