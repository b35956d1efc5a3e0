"""Channels filled up with zeros: the same answers from more channels, and a file that has them where they pay."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from awkward import noise_task
from torch import Tensor, nn
from torch.nn import functional

from compress.lower import fill, lower, write_file
from compress.lower.fill import FILLED, PLAIN, block, choose_filling, fillable
from compress.lower.forms import Choice
from compress.nn.shift import ShiftConv2d
from compress.stages import Quantize
from compress.task import Work
from compress.wording import filling_text

IMAGES = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def blocks_of_sixteen_for_every_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "LEAST_MACS", 0)
    monkeypatch.setattr(fill, "block", lambda target: 16)


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


class Slopes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.linspace(0.1, 0.5, 10))

    def forward(self, x: Tensor) -> Tensor:
        return functional.prelu(x, self.slopes)


class Counting(nn.Module):
    """A convolution behind another, and a forward pass that looks at how many channels there are."""

    def __init__(self, look: Callable[[Counting, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 4, 3)
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        between = self.first(x).relu()
        return self.look(self, between, self.second(between)).mean((2, 3))


def chain(*between: nn.Module, groups: int = 1) -> nn.Sequential:
    layers = nn.Conv2d(3, 10, 3, stride=(1, 2), padding_mode="reflect", padding=1), *between
    return nn.Sequential(*layers, nn.Conv2d(10, 20, 3, dilation=2, groups=groups), nn.Flatten(1)).eval()


def same(model: nn.Module, filling: fill.Filling) -> nn.Module:
    filled = filling(lower(model, "onnxruntime"))
    torch.testing.assert_close(filled(IMAGES), model(IMAGES))
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
        pytest.param(chain(Slopes()), id="a function with a slope for each channel"),
        pytest.param(Counting(lambda _, between, after: after + between.mT.mean()), id="something else reads"),
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


class Masked(Counting):
    """What a trace follows the mask's way of, which is not the one that is taken."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        between = self.first(x).relu()
        return super().forward(x) if mask is None else self.second(between * mask)


def refuse(counting: Counting, between: Tensor, after: Tensor) -> Tensor:
    torch._assert(between.shape[1] == 10, "ten channels")
    return after


@pytest.mark.parametrize(
    "look",
    [
        pytest.param(lambda _, between, after: after / between.size(1), id="size"),
        pytest.param(lambda _, between, after: after / between.shape[1], id="shape"),
        pytest.param(lambda counting, _, after: after / counting.first.out_channels, id="the layer's number"),
        pytest.param(lambda counting, _, after: after * counting.first.weight.std(), id="the layer's weights"),
        pytest.param(refuse, id="an assertion"),
    ],
)
def test_a_forward_pass_that_looks_at_the_channels_is_left(
    monkeypatch: pytest.MonkeyPatch, look: Callable[[Counting, Tensor, Tensor], Tensor]
) -> None:
    monkeypatch.setattr(fill, "answer", lambda *_, **__: pytest.fail("measured"))
    torch.manual_seed(0)
    assert choose_filling(lower(Counting(look), "onnxruntime"), IMAGES, "onnxruntime") is None


@pytest.mark.parametrize("model", [Counting, Masked])
def test_a_way_that_a_trace_does_not_take_is_left(monkeypatch: pytest.MonkeyPatch, model: type[Counting]) -> None:
    monkeypatch.setattr(fill, "answer", lambda *_, **__: Choice(PLAIN))
    found = choose_filling(lower(model(lambda _, between, after: after), "onnxruntime"), IMAGES, "onnxruntime")
    assert (found is None) is (model is Masked)


def test_a_small_network_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "LEAST_MACS", 1_000_000)
    assert choose_filling(lower(Residual(), "onnxruntime"), IMAGES, "onnxruntime") is None


def test_images_that_are_not_float32_are_left() -> None:
    assert choose_filling(chain(nn.ReLU()).double(), IMAGES.double(), "onnxruntime") is None


def test_weights_keep_their_type() -> None:
    half = lower(chain(nn.ReLU()).to(torch.bfloat16), "onnxruntime")
    filled = fill.Filling({"0": "2"}, 16)(half)
    assert {parameter.dtype for parameter in filled.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("ratio", "taken"), [(0.97, FILLED), (0.99, PLAIN)])
def test_zeros_have_to_win_two_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float, taken: str
) -> None:
    asked: list[dict[str, Any]] = []

    def timed(forms: Mapping[str, nn.Module], *_: object) -> dict[str, SimpleNamespace]:
        asked.append({name: model(IMAGES) for name, model in forms.items()})
        return {PLAIN: SimpleNamespace(ratio=1.0, p50_ms=1.0), FILLED: SimpleNamespace(ratio=ratio, p50_ms=ratio)}

    monkeypatch.setattr("compress.gate.timed", timed)
    plain = lower(Residual(), "onnxruntime")
    for _ in range(2):  # the second time from the store
        found = choose_filling(plain, IMAGES, "onnxruntime", tmp_path)
        assert found == (fill.Filling({"first": "second"}, 16), Choice(taken, {PLAIN: 1.0, FILLED: ratio}))
    assert len(asked) == 1
    torch.testing.assert_close(asked[0][PLAIN], asked[0][FILLED])


@pytest.mark.parametrize("winner", [PLAIN, FILLED])
def test_a_file_takes_the_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winner: str) -> None:
    monkeypatch.setattr(fill, "answer", lambda *_, **__: Choice(winner, {PLAIN: 2.0, FILLED: 1.0}))
    path = tmp_path / "model.onnx"
    written = write_file(Residual(), IMAGES, path, input={}, forms="measured")
    assert written["filling"] == {"layers": ["first"], "form": winner, "ms": {PLAIN: 2.0, FILLED: 1.0}}
    assert filling_text(written["filling"])[0].startswith(
        f"channels {winner} (as they are 2 ms, filled with zeros 1 ms"
    )
    assert max(row["max_abs"] for row in written["parity"]) < 1e-4
    file = onnx.load(path)
    outputs = {tensor.dims[0] for tensor in file.graph.initializer if len(tensor.dims) == 4}
    assert outputs == ({6, 16} if winner == FILLED else {6, 5})
    said = {entry.key: entry.value for entry in file.metadata_props}
    assert said.get("filled") == ('{"layers": ["first"], "to": 16}' if winner == FILLED else None)


def test_forms_and_zeros_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(ShiftConv2d(3, 10, 3, taps=3), nn.ReLU(), nn.Conv2d(10, 4, 3), nn.Flatten(1))
    monkeypatch.setattr(fill, "answer", lambda *_, **__: Choice(FILLED, {PLAIN: 2.0, FILLED: 1.0}))
    monkeypatch.setattr("compress.lower.file.choose", lambda *_: {"0": Choice("depthwise", {})})
    path = tmp_path / "model.onnx"
    written = write_file(model, IMAGES, path, input={}, forms="measured")
    assert written["forms"] == {"0": {"form": "depthwise", "ms": {}}}
    (layer,) = written["filling"]["layers"]
    assert layer.startswith("0.")
    assert max(row["max_abs"] for row in written["parity"]) < 1e-4
    said = {entry.key: json.loads(entry.value) for entry in onnx.load(path).metadata_props}
    assert said["forms"] == {"0": "depthwise"} and said["filled"]["layers"] == [layer]


@pytest.mark.parametrize(
    "settings",
    [{}, {"activation_bits": None}, {"activation_bits": None, "granularity": "group", "group_size": 3}],
)
def test_a_quantized_network_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    monkeypatch.setattr(fill, "answer", lambda *_, **__: pytest.fail("measured"))
    quantized = Quantize(**settings)(chain(nn.ReLU()), noise_task((3, 12, 12), classes=4), Work(tmp_path, "q")).model
    assert "filling" not in write_file(quantized, IMAGES, tmp_path / "int8.onnx", input={}, forms="measured")


def test_nothing_is_measured_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "answer", lambda *_, **__: pytest.fail("measured"))
    assert "filling" not in write_file(Residual(), IMAGES, tmp_path / "plain.onnx", input={})
