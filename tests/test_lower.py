"""Lowering and export: the same function in plain torch, in ONNX with integer kernels, in a torch.export file."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from random_task import quantize, warm
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.lower import export_onnx, export_pt2, lower
from compress.lower.parity import parity
from compress.models import resnet20, small
from compress.nn.shift import ShiftConv2d

INPUT = {"order": "rgb", "scale": 255.0, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "size": [16, 16]}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def fused(path: Path) -> Counter[str]:
    """How often each operator stands in the graph that onnxruntime makes of the file."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path) + ".fused"
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(str(path) + ".fused").graph.node)


def run_file(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"input": x.numpy()})[0])


def shifted(taps: int) -> nn.Module:
    torch.manual_seed(0)
    shift = ShiftConv2d(16, 16, 3, taps, stride=2, padding=1, bias=False)
    with torch.no_grad():
        shift.displacement[:8, 0] = -1
    return warm(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            shift,
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 10),
        )
    )


def test_lowering_leaves_the_model_and_computes_the_same(tmp_path: Path) -> None:
    model = shifted(3)
    x = torch.randn(4, 3, 16, 16)
    plain = lower(model, "torch")
    kinds = {type(module) for module in plain.modules()}
    assert ShiftConv2d not in kinds and nn.BatchNorm2d not in kinds
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    quantized = quantize(model, tmp_path).model
    expected = quantized(x)
    for _ in range(2):  # baking a copy must not touch the class it shares with its original
        plain = lower(quantized, "torch")
        assert not any(parametrize.is_parametrized(module) for module in plain.modules())
        torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-5)
    assert torch.equal(quantized(x), expected)


def test_float_model_to_onnx(tmp_path: Path) -> None:
    model = warm(small(channels=3))
    x = torch.randn(5, 3, 16, 16)
    report = export_onnx(model, x[:2], tmp_path / "model.onnx", input=INPUT)
    assert [row["batch"] for row in report["parity"]] == [1, 2, 7]
    assert max(row["max_abs"] for row in report["parity"]) < 1e-4 and report["float_layers"] == {}
    assert report["bytes"] == (tmp_path / "model.onnx").stat().st_size
    torch.testing.assert_close(run_file(tmp_path / "model.onnx", x), model(x), rtol=1e-3, atol=1e-4)
    file = onnx.load(tmp_path / "model.onnx")
    assert json.loads({p.key: p.value for p in file.metadata_props}["input"]) == {**INPUT, "normalized_by_file": False}
    assert str(Path.cwd()).encode() not in (tmp_path / "model.onnx").read_bytes()


def test_normalisation_goes_into_the_file(tmp_path: Path) -> None:
    model = warm(small(channels=3))
    raw = torch.randint(0, 256, (3, 3, 16, 16)).float()
    mean, std = torch.tensor(INPUT["mean"]).view(3, 1, 1), torch.tensor(INPUT["std"]).view(3, 1, 1)
    x = (raw / 255 - mean) / std
    report = export_onnx(model, x, tmp_path / "model.onnx", input=INPUT, normalize=True)
    assert max(row["max_abs"] for row in report["parity"]) < 1e-4
    torch.testing.assert_close(run_file(tmp_path / "model.onnx", raw), model(x), rtol=1e-3, atol=1e-4)


def test_quantized_resnet20_runs_on_integers(tmp_path: Path) -> None:
    model = quantize(warm(resnet20()), tmp_path).model
    x = torch.randn(64, 3, 16, 16)
    path = tmp_path / "model.onnx"
    report = export_onnx(model, x[:2], path, input=INPUT)
    assert report["float_layers"] == {} and report["bytes"] < 330_000
    kinds = Counter(tensor.data_type for tensor in onnx.load(path).graph.initializer)
    assert kinds[onnx.TensorProto.INT8] == 21 and kinds[onnx.TensorProto.INT32] == 20  # one is a zero point
    operators = fused(path)
    assert operators["QLinearConv"] == 19 and operators["QLinearAdd"] == 9 and operators["Conv"] == 0
    assert operators["QLinearGlobalAveragePool"] == operators["QGemm"] == 1 and operators["Relu"] == 0
    expected = model(x).detach()
    difference = (run_file(path, x) - expected).abs().mean() / expected.std()
    assert difference.item() < 2e-3


@pytest.mark.parametrize("taps", [1, 4])
def test_quantized_layers_of_ours_run_on_integers(taps: int, tmp_path: Path) -> None:
    model = quantize(shifted(taps), tmp_path).model
    x = torch.randn(16, 3, 16, 16)
    report = export_onnx(model, x[:2], tmp_path / "model.onnx", input=INPUT)
    operators = fused(tmp_path / "model.onnx")
    assert report["float_layers"] == {}
    assert operators["QLinearConv"] == (3 if taps == 1 else 2) and operators["Conv"] == 0
    torch.testing.assert_close(run_file(tmp_path / "model.onnx", x), model(x), rtol=0, atol=0.05)


class Mixed(nn.Module):
    """Pooling, concatenation, depthwise and strided pointwise convolutions, a gate, ReLU6, reflect padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(), nn.Conv2d(16, 16, 1))
        self.left, self.right = nn.Conv2d(16, 8, 1, 2), nn.Conv2d(16, 8, 3, 2, 1, padding_mode="reflect")
        self.squeeze, self.expand = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.pool, self.linear = nn.MaxPool2d(2), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.depthwise(x)
        x = torch.cat((torch.relu(self.left(x)), torch.relu(self.right(x))), 1)
        gate = torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        x = self.pool(x * torch.sigmoid(self.expand(gate)))
        return self.linear(torch.flatten(x.mean((2, 3)), 1))


def test_other_networks_fuse_too(tmp_path: Path) -> None:
    model = quantize(warm(Mixed()), tmp_path).model
    x = torch.randn(16, 3, 16, 16)
    path = tmp_path / "model.onnx"
    report = export_onnx(model, x[:2], path, input=INPUT)
    operators = fused(path)
    assert report["float_layers"] == {} and operators["Conv"] == 0 and operators["QLinearConv"] == 7
    assert operators["QLinearAdd"] == operators["QLinearConcat"] == operators["QLinearMul"] == 1
    assert operators["MaxPool"] == 1 and operators["Clip"] == 0
    torch.testing.assert_close(run_file(path, x), model(x), rtol=0, atol=0.05)


def test_every_attribute_of_a_convolution_survives(tmp_path: Path) -> None:
    convolutions = [
        nn.Conv2d(3, 8, 3, stride=(2, 1)),
        nn.Conv2d(8, 8, 3, padding=(1, 0), bias=False),
        nn.Conv2d(8, 8, 3, dilation=2, padding=2, groups=2),
        nn.Conv2d(8, 8, (1, 3), groups=8),
        nn.Conv2d(8, 16, 1, stride=2),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 16, 3, padding="same", padding_mode="circular"),
    ]
    layers = [layer for convolution in convolutions for layer in (convolution, nn.LeakyReLU(0.2))]
    model = nn.Sequential(*layers, nn.Flatten()).eval()
    x = torch.randn(8, 3, 16, 16)
    original = model(x).detach()
    model = quantize(model, tmp_path).model
    expected = model(x).detach()
    assert ((expected - original).std() / original.std()).item() < 0.1
    report = export_onnx(model, x[:2], tmp_path / "model.onnx", input=INPUT)
    assert report["float_layers"] == {} and fused(tmp_path / "model.onnx")["Conv"] == 0
    difference = (run_file(tmp_path / "model.onnx", x) - expected).abs().mean() / expected.std()
    assert difference.item() < 5e-3


def test_a_convolution_at_the_root(tmp_path: Path) -> None:
    edit = quantize(nn.Conv2d(3, 8, 3, padding=1).eval(), tmp_path)
    (site,) = edit.sites
    assert (site.name, site.after) == ("", "int8 weights per channel") and "single layer" in site.why
    x = torch.randn(3, 3, 16, 16)
    report = export_onnx(edit.model, x, tmp_path / "model.onnx", input=INPUT)
    assert report["float_layers"] == {} and max(row["max_abs"] for row in report["parity"]) < 1e-5


@pytest.mark.parametrize("bits", [2, 4])
def test_fewer_bits_are_cut_in_the_file_too(bits: int, tmp_path: Path) -> None:
    model = quantize(warm(small(channels=3)), tmp_path, weight_bits=bits, activation_bits=bits).model
    x = torch.randn(8, 3, 16, 16)
    export_onnx(model, x[:2], tmp_path / "model.onnx", input=INPUT)
    levels = max(
        len(np.unique(onnx.numpy_helper.to_array(t)))
        for t in onnx.load(tmp_path / "model.onnx").graph.initializer
        if t.data_type == onnx.TensorProto.INT8
    )
    assert levels == 2**bits - 1
    expected = model(x).detach()
    difference = (run_file(tmp_path / "model.onnx", x) - expected).abs().mean() / expected.std()
    assert difference.item() < 1e-3


def test_a_model_that_cannot_be_traced_exports_with_integer_weights(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

        def forward(self, x: Tensor) -> Tensor:
            if x.dim() == 4 and len(x.shape) == 4 and x.shape[2] > 0:  # control flow on a shape stops the tracer
                x = self.conv(x)
            return self.linear(x.mean((2, 3)))

    model = quantize(Odd().eval(), tmp_path).model
    x = torch.randn(4, 3, 16, 16)
    report = export_onnx(model, x[:2], tmp_path / "model.onnx", input=INPUT)
    assert report["float_layers"] == {} and max(row["max_abs"] for row in report["parity"]) < 1e-4
    kinds = Counter(tensor.data_type for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer)
    assert kinds[onnx.TensorProto.INT8] == 2


def test_pt2_runs_without_this_package_and_holds_integers(tmp_path: Path) -> None:
    model = quantize(shifted(4), tmp_path).model
    x = torch.randn(7, 3, 16, 16)
    path = tmp_path / "model.pt2"
    report = export_pt2(model, x[:2], path)
    assert max(row["max_abs"] for row in report["parity"]) < 1e-5 and report["bytes"] == path.stat().st_size
    torch.save((x, model(x).detach()), tmp_path / "x.pt")
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import torch\n"
        "program = torch.export.load('model.pt2'); x, y = torch.load('x.pt')\n"
        "assert torch.allclose(program.module()(x), y, rtol=0, atol=1e-5)\n"
        "assert sum(v.dtype == torch.int8 for v in program.state_dict.values()) == 3\n"
        "assert not any(n in sys.modules for n in ('compress', 'torchao', 'onnx'))\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_an_example_of_one_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`example` has 1 image; give at least 2"):
        export_pt2(warm(small(channels=3)), torch.randn(1, 3, 16, 16), tmp_path / "model.pt2")


def test_training_form_is_not_changed_by_exporting(tmp_path: Path) -> None:
    model = quantize(warm(small(channels=3)), tmp_path).model.train()
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, torch.randn(2, 3, 16, 16), tmp_path / "model.onnx", input=INPUT)
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_float_shift_has_float_weights(tmp_path: Path) -> None:
    layer = ShiftConv2d(4, 4, 3, 1, padding=1).eval()
    with torch.no_grad():
        layer.displacement[1] = 1
    export_onnx(layer, torch.randn(2, 4, 6, 6), tmp_path / "m.onnx", input={})
    operators = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert operators == ["Conv", "Conv"]  # integers would have to be converted back in every run


def test_parity_of_what_is_no_number() -> None:
    example = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    for wrong in (torch.nan, torch.inf):
        (row, *_) = parity(
            lambda x: torch.eye(3)[:1].expand(len(x), 3), lambda x, w=wrong: torch.full_like(x, w), example
        )
        assert row["max_abs"] == torch.inf and row["top1_agreement"] == 0
    (row, *_) = parity(*2 * [lambda x: torch.full_like(x, torch.nan)], example)
    assert row["max_abs"] == 0 and row["top1_agreement"] == 1
