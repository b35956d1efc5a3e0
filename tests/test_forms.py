"""Layers with several equal plain forms, and the choice between them: equal to the layer, measured once, replayed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, SHAPE, noise_task
from random_task import quantize, warm
from torch import Tensor, nn

from compress import gate
from compress.errors import ConfigError
from compress.lower import export_onnx, export_pt2, lower
from compress.lower.forms import Choice, choose
from compress.nn.displace import Shift2d
from compress.nn.shift import ShiftConv2d
from compress.run import run
from compress.stages import Shift
from compress.surgery import layers
from compress.wording import forms_text


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def dense(layer: ShiftConv2d, x: Tensor) -> Tensor:
    """torch's own convolution with the layer's dense kernel."""
    shape: dict[str, Any] = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    plain = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, padding_mode=layer.padding_mode, **shape
    )
    with torch.no_grad():
        plain.weight.copy_(layer.kernel())
        assert layer.pointwise.bias is not None and plain.bias is not None
        plain.bias.copy_(layer.pointwise.bias)
    return plain(x)


def scattered(channels: int = 32, taps: int = 2, **settings: Any) -> ShiftConv2d:
    layer = ShiftConv2d(channels, channels, 3, taps, padding=1, **settings)
    places = torch.stack([torch.randperm(9)[:taps] for _ in range(channels)])
    with torch.no_grad():
        layer.displacement.copy_(torch.stack((places // 3 - 1, places % 3 - 1), -1))
    return layer.eval()


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("taps", [1, 2])
def test_every_form_is_the_convolution(name: str, taps: int) -> None:
    x = torch.randn(2, *SHAPE)
    for old in layers(AWKWARD[name](), (nn.Conv2d,)).values():
        assert isinstance(old, nn.Conv2d)
        settings = {k: getattr(old, k) for k in ("stride", "padding", "dilation", "groups", "padding_mode")}
        positions = old.kernel_size[0] * old.kernel_size[1]
        layer = ShiftConv2d(old.in_channels, old.out_channels, old.kernel_size, min(taps, positions), **settings)
        grid = layer._grid()
        for places in (torch.stack([torch.randperm(positions)[: layer.taps] for _ in range(old.in_channels)]), None):
            with torch.no_grad():  # None: nothing moves, where the window has a centre
                layer.displacement.copy_(grid[places] if places is not None else torch.zeros_like(layer.displacement))
            expected = dense(layer, x[:, : old.in_channels])
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
            forms = layer.forms("onnxruntime")
            for form in forms.values():
                torch.testing.assert_close(form(x), expected, rtol=0, atol=1e-5)
            if places is not None and positions > 1:
                assert set(forms) == {"dense", "depthwise", "slices"}


def test_the_default_is_the_first_and_follows_the_copies() -> None:
    assert list(scattered(taps=1).forms("onnxruntime")) == ["depthwise", "dense", "slices"]
    assert list(scattered(taps=2).forms("onnxruntime")) == ["dense", "depthwise", "slices"]
    assert next(iter(scattered(taps=1, groups=32).forms("onnxruntime"))) == "dense"  # that is a depthwise one already
    between = ShiftConv2d(4, 4, 3, 2, padding=1, quantize=False)
    with torch.no_grad():
        between.displacement.uniform_(-1, 1)
    assert list(between.forms("onnxruntime")) == ["dense", "depthwise"]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (5, 2), (5, 3), ((3, 5), "same")])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_without_displacements_only_the_pointwise_form_is_left(
    kernel: Any, padding: Any, stride: int, mode: str
) -> None:
    if padding == "same" and stride > 1:
        return
    layer = ShiftConv2d(4, 6, kernel, 1, stride, padding, padding_mode=mode)
    forms = layer.forms("onnxruntime")
    assert list(forms) == ["pointwise"]
    (form,) = forms.values()
    assert isinstance(form, nn.Conv2d) and form.kernel_size == (1, 1)
    x = torch.randn(1, 4, 8, 9)
    torch.testing.assert_close(form(x), dense(layer, x), rtol=0, atol=1e-5)
    if padding == 1:
        expected = F.conv2d(x, layer.pointwise.weight, layer.pointwise.bias, stride)
        torch.testing.assert_close(form(x), expected, rtol=0, atol=1e-5)


def test_a_wide_window_is_cut_to_what_is_used() -> None:
    layer = ShiftConv2d(4, 6, 7, 2, padding=3, dilation=2, groups=2)
    with torch.no_grad():
        layer.displacement.copy_(torch.tensor([[0.0, 0.0], [-1.0, 1.0]]))
    x = torch.randn(2, 4, 15, 14)
    # Two positions off on each side are 4 pixels less to pad; 3 pixels leave room for one, 6 for both.
    for layer.padding, size, left in (((3, 3), (5, 5), (1, 1)), ((6, 6), (3, 3), (2, 2)), ((0, 6), (7, 3), (0, 2))):
        forms = layer.forms("onnxruntime")
        form = forms["dense"]
        assert isinstance(form, nn.Conv2d) and form.kernel_size == size and form.padding == left
        for form in forms.values():
            torch.testing.assert_close(form(x), dense(layer, x), rtol=0, atol=1e-5)


def test_a_standalone_shift_moves_only_what_moves() -> None:
    layer = Shift2d(12, 5)
    layer.displacement.copy_(torch.zeros(12, 2))
    layer.displacement[3:5] = torch.tensor([[1.0, -2.0], [0.0, 2.0]])
    layer.displacement[9] = torch.tensor([-1.0, 0.0])
    x = torch.randn(2, 12, 7, 6)
    expected = x.clone()
    for channel, (dy, dx) in ((3, (1, -2)), (4, (0, 2)), (9, (-1, 0))):
        padded = F.pad(x[:, channel], (2, 2, 2, 2))
        expected[:, channel] = padded[:, 2 + dy : 9 + dy, 2 + dx : 8 + dx]
    forms = layer.forms("onnxruntime")
    assert list(forms) == ["depthwise", "moving"]
    assert all(torch.equal(form(x), expected) for form in forms.values())
    assert list(Shift2d(12, 5, stride=2).forms("onnxruntime")) == ["depthwise"]
    assert list(Shift2d(4).forms("onnxruntime")) == ["nothing"]


def test_exports_take_the_form_they_are_told(tmp_path: Path) -> None:
    layer, x = nn.Sequential(scattered(8)), torch.randn(2, 8, 9, 9)
    for form, convolutions in (("depthwise", 2), ("slices", 1)):
        report = export_onnx(layer, x, tmp_path / "m.onnx", input={}, forms={"0": form})
        assert all(row["max_abs"] < 1e-4 for row in report["parity"])
        file = onnx.load(tmp_path / "m.onnx")
        operators = [node.op_type for node in file.graph.node]
        assert operators.count("Conv") == convolutions and ("Concat" in operators) == (form == "slices")
        assert json.loads({p.key: p.value for p in file.metadata_props}["forms"]) == {"0": form}
    report = export_pt2(layer, x, tmp_path / "m.pt2", forms={"0": "slices"})
    assert all(row["max_abs"] < 1e-4 for row in report["parity"])


def test_a_form_or_a_layer_that_there_is_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), scattered())
    with pytest.raises(ValueError, match=r"`forms\['1'\]` \(='sparse'\) must be one of dense, depthwise, slices"):
        lower(model, "onnxruntime", {"1": "sparse"})
    with pytest.raises(ValueError, match="`forms` names '0': no layer that has several forms"):
        lower(model, "onnxruntime", {"0": "dense"})


class Watch:
    """Stands for the clock: the depthwise form takes `share` of the dense one's time in its slowest round."""

    def __init__(self, share: float) -> None:
        self.share, self.asked = share, list[tuple[list[str], tuple[int, ...]]]()

    def __call__(self, forms: Mapping[str, nn.Module], shape: tuple[int, ...], *_: Any) -> dict[str, Any]:
        self.asked.append((list(forms), tuple(shape)))
        ratios = [1.0, self.share]
        return {
            name: SimpleNamespace(p50_ms=ratio, ratio=ratio - 0.05, ratio_high=ratio)
            for name, ratio in zip(forms, ratios, strict=True)
        }


class Net(nn.Module):
    """Layers that are alike, one that is used twice, one at another shape, one that is not worth a measurement."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = scattered(), scattered()
        self.pool = nn.MaxPool2d(2)
        self.c, self.d, self.single = scattered(), scattered(taps=7), scattered(taps=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.single(self.d(self.c(self.pool(self.a(self.b(self.a(x)))))))
        return out


@pytest.mark.parametrize(("share", "form"), [(0.9, "depthwise"), (0.91, "dense")])
def test_the_choice_asks_the_gates_question_once_and_is_replayed(
    share: float, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(share)
    monkeypatch.setattr(gate, "timed", watch)
    model, x = Net(), torch.randn(2, 32, 20, 20)
    choices = choose(model, x, "onnxruntime", tmp_path, least_macs=0)
    assert watch.asked == [(["dense", "depthwise"], (32, 20, 20)), (["dense", "depthwise"], (32, 10, 10))]
    measured = {"dense": 1.0, "depthwise": share}
    assert choices["a"] == choices["b"] == choices["c"] == Choice(form, measured)
    assert choices["d"] == Choice("dense") and choices["single"] == Choice("depthwise")
    again = Watch(0.1)
    monkeypatch.setattr(gate, "timed", again)
    assert choose(Net(), x, "onnxruntime", tmp_path, least_macs=0) == choices and again.asked == []
    for file in tmp_path.iterdir():
        file.write_text("{")
    assert choose(model, x, "onnxruntime", tmp_path, least_macs=0)["a"].form == "depthwise" and len(again.asked) == 2


def test_small_layers_and_quantized_models_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "timed", lambda *_: pytest.fail("measured"))
    model = warm(nn.Sequential(nn.Conv2d(3, 8, 3), scattered(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)))
    assert choose(model, torch.randn(2, 3, 16, 16), "onnxruntime") == {"1": Choice("dense")}
    quantized = quantize(model, tmp_path).model
    assert choose(quantized, torch.randn(2, 3, 16, 16), "onnxruntime", least_macs=0) == {"1": Choice("dense")}


def test_really_measured_in_the_runtime(tmp_path: Path) -> None:
    (choice,) = choose(scattered(), torch.randn(2, 32, 8, 8), "onnxruntime", tmp_path, least_macs=0).values()
    assert choice.form in ("dense", "depthwise") and set(choice.ms) == {"dense", "depthwise"}
    assert all(ms > 0 for ms in choice.ms.values())
    (file,) = tmp_path.iterdir()
    stored = json.loads(file.read_text())
    assert stored["form"] == choice.form and stored["question"]["shape"] == [32, 8, 8]
    assert stored["question"]["target"] == "onnxruntime" and stored["question"]["hardware"]["cores"] >= 1


def test_a_run_reports_its_forms_and_a_second_run_takes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(0.5)
    monkeypatch.setattr(gate, "timed", watch)
    task = noise_task((2, 12, 12), images=16)

    def exports(name: str, **more: Any) -> list[dict[str, Any]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 32, 1), nn.ReLU(), nn.Conv2d(32, 40, 3), nn.Flatten(), nn.Linear(4000, 3))
        more = {"export": ["onnx"], "measure": "none", "cache": tmp_path / "cache"} | more
        report = run([Shift(taps=2, images=16)], task, model=model, out=tmp_path / name, **more).report
        return list(report["exports"])

    for name, more in (("a", {}), ("b", {"export": ["onnx", "pt2"]})):
        onnx_file, *others = exports(name, **more)
        assert onnx_file["forms"] == {"2": {"form": "depthwise", "ms": {"dense": 1.0, "depthwise": 0.5}}}
        assert all(export["forms"] == {} for export in others)  # onnxruntime, the target, does not run those
        assert "form depthwise (dense 1 ms, depthwise 0.5 ms): 2" in (tmp_path / name / "report.html").read_text()
    assert (tmp_path / "a/model.onnx").read_bytes() == (tmp_path / "b/model.onnx").read_bytes()
    assert len(watch.asked) == 1
    assert [export["forms"] for export in exports("c", forms="default", cache=None)] == [{}] and len(watch.asked) == 1
    with pytest.raises(ConfigError, match=r"`forms` \(='best'\) must be one of measured, default"):
        exports("d", forms="best")


def test_forms_in_words() -> None:
    measured = {"form": "dense", "ms": {"dense": 0.1234, "depthwise": 2.0}}
    forms = {"conv1": measured, "conv2": measured, "": {"form": "dense", "ms": {}}}
    assert forms_text(forms) == ["dense (dense 0.123 ms, depthwise 2 ms): conv1, conv2"]
    assert forms_text(None) == []
