"""Channels filled up with zeros: the same answers from more channels, and a file that has them where they pay."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from awkward import noise_task
from torch import Tensor, nn

from compress.lower import fill, lower, write_file
from compress.lower.fill import FILLED, PLAIN, block, fillable
from compress.lower.forms import Choice
from compress.stages import Quantize
from compress.task import Work

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.second = nn.Conv2d(5, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.second(torch.relu(self.norm(self.first(x))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def chain(*between: nn.Module, groups: int = 1) -> nn.Sequential:
    layers = nn.Conv2d(3, 10, 3, stride=(1, 2), padding_mode="reflect", padding=1), *between
    return nn.Sequential(*layers, nn.Conv2d(10, 20, 3, dilation=2, groups=groups), nn.Flatten(1)).eval()


def same(model: nn.Module, filling: fill.Filling) -> nn.Module:
    plain = lower(model, "onnxruntime")
    filled = filling(plain)
    torch.testing.assert_close(filled(IMAGES), plain(IMAGES))
    return filled


def test_only_what_one_convolution_reads_is_filled() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    nn.init.uniform_(model.norm.bias, 0.5, 1.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    filling = fillable(lower(model, "onnxruntime"), IMAGES, 8)
    assert filling.readers == {"first": "second"}
    filled = same(model, filling)
    shapes = {name: tuple(layer.weight.shape) for name, layer in filled.named_modules() if hasattr(layer, "weight")}
    assert shapes == {"stem": (6, 3, 3, 3), "first": (8, 6, 3, 3), "second": (6, 8, 1, 1), "head": (4, 6)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_chain_is_filled_with_every_setting_of_its_convolutions() -> None:
    model = nn.Sequential(*chain(nn.ReLU6())[:-1], nn.MaxPool2d(2), nn.Conv2d(20, 4, 1), nn.Flatten(1)).eval()
    filling = fillable(model, IMAGES, 16)
    assert filling.readers == {"0": "2", "2": "4"}
    filled = same(model, filling)
    assert [layer.out_channels for layer in filled.modules() if isinstance(layer, nn.Conv2d)] == [16, 32, 4]


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(chain(nn.PReLU(10)), id="a slope for each channel"),
        pytest.param(chain(nn.Sigmoid()), id="a function that makes something of zeros"),
        pytest.param(chain(nn.ReLU(), groups=2), id="groups"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 10, 12), nn.Flatten(1), nn.Linear(10, 4)), id="a linear layer reads"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 5, 3), nn.Flatten(1)), id="a multiple already"),
    ],
)
def test_what_cannot_be_filled_is_left(model: nn.Module) -> None:
    assert not fillable(model.eval(), IMAGES, 16).readers


@pytest.mark.parametrize(
    ("features", "target", "channels"),
    [
        (["avx2", "avx512f"], "onnxruntime", 16),
        (["avx2"], "onnxruntime", 8),
        ([], "onnxruntime", 1),
        (["avx2", "avx512f"], "openvino", 1),
    ],
)
def test_blocks_are_those_of_the_runtime_on_this_processor(
    monkeypatch: pytest.MonkeyPatch, features: list[str], target: str, channels: int
) -> None:
    monkeypatch.setattr("compress.machine.hardware", lambda: {"features": features})
    assert block(target) == channels


@pytest.mark.parametrize("winner", [PLAIN, FILLED])
def test_a_file_takes_the_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winner: str) -> None:
    monkeypatch.setattr(fill, "block", lambda target: 16)
    monkeypatch.setattr(fill, "answer", lambda *_, **__: Choice(winner, {PLAIN: 2.0, FILLED: 1.0}))
    path = tmp_path / "model.onnx"
    written = write_file(Residual(), IMAGES, path, input={}, forms="measured")
    assert written["forms"] == {"first": {"form": winner, "ms": {PLAIN: 2.0, FILLED: 1.0}}}
    assert max(row["max_abs"] for row in written["parity"]) < 1e-4
    file = onnx.load(path)
    outputs = {tensor.dims[0] for tensor in file.graph.initializer if len(tensor.dims) == 4}
    assert outputs == ({6, 16} if winner == FILLED else {6, 5})
    assert ("forms" in {entry.key for entry in file.metadata_props}) is (winner == FILLED)


def test_nothing_is_measured_by_default_or_for_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "block", lambda target: 16)
    monkeypatch.setattr(fill, "answer", lambda *_, **__: pytest.fail("measured"))
    assert not write_file(Residual(), IMAGES, tmp_path / "plain.onnx", input={})["forms"]
    task = noise_task((3, 12, 12), classes=4)
    quantized = Quantize()(Residual().eval(), task, Work(tmp_path, "quantize")).model
    assert not write_file(quantized, IMAGES, tmp_path / "int8.onnx", input={}, forms="measured")["forms"]
