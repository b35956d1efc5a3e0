"""Dynamic layers in torchao's kernels and in files: against the layers that `compress.load` gives."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import noise_task
from test_quantize_dynamic import SHAPE, layers, quantized, relative
from torch import nn

import compress
from compress import checkpoint
from compress.errors import ConfigError
from compress.lower import export_onnx, export_pt2
from compress.lower.torchao import LEAST_CAPABILITY, to_torchao
from compress.measure import latency
from compress.nn.dynamic import FakeQuantizeDynamic
from compress.stages import FineTune, QuantizeDynamic

BUILD = ("compress.models.small", {"classes": 8, "channels": 2})
HAS_FLOAT8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= LEAST_CAPABILITY


def test_int8_runs_in_torchaos_kernels() -> None:
    from torchao.quantization import Int8Tensor

    model = quantized().model
    images = torch.randn(9, *SHAPE, generator=torch.Generator().manual_seed(1))
    theirs = to_torchao(model)
    for ours, place in zip(layers(model), layers(theirs), strict=True):
        assert isinstance(place.linear.weight, Int8Tensor) and isinstance(place.round, nn.Identity)
        torch.testing.assert_close(place.linear.weight.dequantize(), ours.linear.weight)  # rounded no second time
    assert relative(theirs(images), model(images)) < 1e-5
    assert len(layers(model)) == 4 and isinstance(layers(model)[0].round, FakeQuantizeDynamic)


def test_float8_runs_in_torchaos_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(dtype="float8").model
    with pytest.raises(
        ConfigError, match="`model` is on the cpu, and float8 products need a GPU of compute capability"
    ):
        to_torchao(model)
    # A CPU has the product too, only torchao refuses to use it.
    from torchao.quantization import Float8Tensor, quant_api

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    monkeypatch.setattr("compress.lower.torchao._require_float8", lambda device: None)
    theirs = to_torchao(model)
    for ours, place in zip(layers(model), layers(theirs), strict=True):
        assert isinstance(place.linear.weight, Float8Tensor)
        assert torch.equal(place.linear.weight.dequantize(), ours.linear.weight)
    images = torch.randn(9, *SHAPE, generator=torch.Generator().manual_seed(1))
    assert relative(theirs(images), model(images)) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "dtype", ["int8", pytest.param("float8", marks=pytest.mark.skipif(not HAS_FLOAT8, reason="needs float8 products"))]
)
def test_on_a_gpu(dtype: str) -> None:
    model = quantized(dtype=dtype).model.cuda()
    images = torch.randn(32, *SHAPE).cuda()
    assert relative(to_torchao(model)(images), model(images)) < 1e-2  # a rounding may go the other way


def test_latency_of_a_checkpoint_is_that_of_torchaos_kernels(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    said: dict[str, Any] = {"build": ("compress.models.small", {"classes": 8, "channels": 2}), "input": {}}
    model = quantized(compress.models.small(8, 2).eval()).model  # type: ignore[attr-defined]  # loaded by then
    checkpoint.save(model, path, provenance={}, results={}, **said)
    measured = latency({"m": path}, torch.randn(2, 2, 8, 8), target="torch", rounds=1, seconds=0.01, threads=1)["m"]
    assert "torchao" in measured.runtime and measured.p50_ms > 0


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_an_onnx_file_computes_the_same_and_says_in_what(dtype: str, tmp_path: Path) -> None:
    model = quantized(dtype=dtype).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = export_onnx(model, torch.randn(14, *SHAPE), tmp_path / "m.onnx", input={})
    assert all(row["max_abs"] < 0.02 for row in said["parity"])
    stored = "as integers" if dtype == "int8" else "in 32 bits"
    reason = f"its input finds its own scale each time: stored {stored}, computed in float"
    assert said["float_layers"] == {f"{place}.linear.weight": reason for place in ("0", "3", "5", "8")}
    weights = sum(layer.linear.weight.numel() for layer in layers(model))
    assert (said["bytes"] < 2 * weights + 9000) == (dtype == "int8")


def test_a_pt2_file_computes_the_same(tmp_path: Path) -> None:
    said = export_pt2(quantized(dtype="float8").model, torch.randn(14, *SHAPE), tmp_path / "m.pt2")
    assert all(row["max_abs"] < 1e-5 for row in said["parity"])


def test_a_run_measures_checkpoints_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(
        "compress.measure.latency", lambda paths, example, **more: asked.update(more, paths=paths) or {}
    )
    stages = {"train": FineTune(epochs=1), "int8": QuantizeDynamic()}
    settings: dict[str, Any] = {"out": tmp_path / "run", "cache": None, "target": "cuda", "measure": "all"}
    compress.run(stages, noise_task((2, 8, 8), classes=8), build=BUILD, **settings)
    suffixes = {name: path.suffix for name, path in asked["paths"].items()}
    assert suffixes == {"base": ".pt2", "train": ".pt2", "int8": ".safetensors", "result": ".safetensors"}
    assert asked["target"] == "cuda" and asked["allow"] == ["compress.models"]
    with pytest.raises(ConfigError, match=r"`stages.int8` \(QuantizeDynamic\) is measured from a checkpoint"):
        compress.run(stages, noise_task((2, 8, 8), classes=8), model=nn.Linear(8, 8), **settings)
