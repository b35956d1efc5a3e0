"""Every grid that weights can be put on, in the ONNX file: the same numbers, few bytes, and which kernels run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from random_task import quantize, warm
from test_lower import INPUT, fused, run_file, shifted
from torch import Tensor, nn

from compress.lower import export_onnx
from compress.lower.onnx_weights import packed
from compress.lower.plain import Steps

CASES: dict[str, tuple[dict[str, Any], int, int]] = {  # settings; weights to a byte; layers of four in float
    "tensor": ({"granularity": "tensor"}, 1, 0),
    "2 bits": ({"weight_bits": 2}, 4, 0),
    "powers": ({"weight_bits": 4, "grid": "power_of_two"}, 2, 0),
    "affine 8": ({"symmetric": False}, 1, 0),
    "affine 4": ({"weight_bits": 4, "symmetric": False}, 2, 0),
    "groups": ({"granularity": "group", "group_size": 9, "weight_bits": 4}, 2, 4),
    "affine groups": ({"granularity": "group", "group_size": 9, "weight_bits": 4, "symmetric": False}, 2, 4),
    "4 and 4": ({"weight_bits": 4, "activation_bits": 4}, 2, 0),
}
SCALES = {"tensor": [], "groups": [36, 18, 1], "affine groups": [36, 18, 1]}
Exported = tuple[nn.Module, Path, dict[str, Any]]


def net() -> nn.Module:
    layers = [nn.Conv2d(3, 36, 3), nn.ReLU6(), nn.Conv2d(36, 36, 3, 2, groups=2), nn.ReLU(), nn.Conv2d(36, 36, 1)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(36, 10)).eval()
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                lopsided = torch.linspace(-2, 2, len(layer.weight)).view(-1, *[1] * (layer.weight.dim() - 1))
                layer.weight.add_(layer.weight.std() * lopsided)
                layer.bias.normal_()
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The quantized net of a case, its file and its report, made once."""
    made: dict[str, Exported] = {}

    def get(case: str) -> Exported:
        if case not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp("file")
            model = quantize(net(), folder, **CASES[case][0]).model
            report = export_onnx(model, images()[:2], folder / "model.onnx", input=INPUT)
            made[case] = (model, folder / "model.onnx", report)
        return made[case]

    return get


def images() -> Tensor:
    return torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def difference(given: Tensor, expected: Tensor) -> float:
    return float((given - expected).abs().mean() / expected.std())


@pytest.mark.parametrize("case", CASES)
def test_the_file_computes_what_the_model_does(case: str, exported: Callable[[str], Exported]) -> None:
    model, path, report = exported(case)
    assert difference(run_file(path, images()), model(images()).detach()) < 2e-3
    in_float = CASES[case][2]
    operators = fused(path)
    floating = operators["Conv"] + operators["FusedConv"]
    assert (operators["QLinearConv"], operators["QGemm"], floating) == ((0, 0, 3) if in_float else (3, 1, 0))
    reason = "a scale for every 9, which integer kernels do not take: stored as integers, computed in float"
    assert len(report["float_layers"]) == in_float
    assert all(reason in why for why in report["float_layers"].values())


@pytest.mark.parametrize("case", CASES)
def test_weights_and_biases_are_stored_as_they_should(case: str, exported: Callable[[str], Exported]) -> None:
    model, path, _ = exported(case)
    _, to_a_byte, in_float = CASES[case]
    initializers = {t.name: t for t in onnx.load(path).graph.initializer}
    numbers = [f"2.weight_{kind}" for kind in ("codes", "int8", "int4") if f"2.weight_{kind}" in initializers]
    assert [len(initializers[name].raw_data) for name in numbers] == [36 * 18 * 9 // to_a_byte]
    assert float_weights(path) == []
    assert ("2.weight_zero" in initializers) == (case in ("affine 8", "affine groups"))
    assert initializers["2.weight_scale"].dims == SCALES.get(case, [36])
    bias = model.get_submodule("2").bias.detach()
    if in_float:
        assert np.array_equal(array(initializers["2.bias"]), bias.numpy())
    else:
        again = array(initializers["2.bias_int32"]).astype(np.float64) * array(initializers["2.bias_scale"])
        np.testing.assert_allclose(again, bias.numpy(), rtol=1e-6, atol=0)


def float_weights(path: Path) -> list[str]:
    found = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1]
    return [t.name for t in found if not t.name.endswith(("_scale", "_zero"))]


def array(tensor: onnx.TensorProto) -> np.ndarray[Any, Any]:
    return onnx.numpy_helper.to_array(tensor)


@pytest.mark.parametrize("case", ["tensor", "2 bits", "powers", "affine 4", "4 and 4", "groups", "affine groups"])
def test_openvino_gives_the_same_on_integers(case: str, exported: Callable[[str], Exported]) -> None:
    openvino = pytest.importorskip("openvino")
    model, path, _ = exported(case)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    given = torch.from_numpy(compiled(images().numpy())[0].copy())
    assert difference(given, model(images()).detach()) < 2e-3
    said = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    kinds = [info["runtimePrecision"].astype(str) for info in said if info["layerType"].astype(str) == "Convolution"]
    assert len(kinds) == 3 and set(kinds) == ({"f32"} if CASES[case][2] else {"u8"})


@pytest.mark.parametrize(("levels", "to_a_byte"), [(1, 8), (2, 8), (3, 5), (4, 4), (6, 3), (7, 2), (16, 2), (17, 0)])
def test_numbers_come_back_from_their_codes(levels: int, to_a_byte: int) -> None:
    generator = np.random.default_rng(0)
    values = generator.permutation(np.arange(-100, 100))[:levels].astype(np.int8)
    numbers = np.concatenate((values, values[generator.integers(0, levels, 840 - levels)])).reshape(7, 12, 10)
    assert packed(numbers.reshape(-1)[:839]) is None  # a prime: the last byte were not full
    found = packed(numbers)
    if found is None:
        assert to_a_byte == 0
        return
    codes, table = found
    assert codes.dtype == np.uint8 and codes.size == 840 // to_a_byte and table.shape[1] == to_a_byte
    assert np.array_equal(table[codes].reshape(numbers.shape), numbers)


def test_weights_on_no_grid_are_told_apart() -> None:
    scale = torch.tensor([0.5, 0.25])
    weight = torch.tensor([[1.5, -2.0, 0.0], [31.75, 0.25, -31.75]])
    expected = torch.tensor([[3, -4, 0], [127, 1, -127]], dtype=torch.int16)
    found = Steps(scale).integers(weight)
    assert found is not None and torch.equal(found, expected)
    assert Steps(scale).integers(weight + 0.1) is None and Steps(scale).integers(weight * 2) is None
    assert Steps(scale[:1].expand(3)).integers(weight) is None
    lopsided = torch.tensor([[0.0, 50.0, 127.5], [0.0, 0.25, 0.5]])
    found = Steps(scale, torch.tensor([-128, 0])).integers(lopsided)
    assert found is not None and found[0].tolist() == [0, 100, 255]


@pytest.mark.parametrize("taps", [1, 4])
def test_groups_in_layers_of_ours_are_integers_or_told(taps: int, tmp_path: Path) -> None:
    settings = {"granularity": "group", "group_size": 4 if taps == 1 else 2, "exclude": ["0"]}
    model = quantize(shifted(taps), tmp_path, **settings).model
    path = tmp_path / "model.onnx"
    report = export_onnx(model, images()[:2], path, input=INPUT)
    assert difference(run_file(path, images()), model(images()).detach()) < 2e-3
    told = {name: why for name, why in report["float_layers"].items() if "mixed" in why}
    assert list(told) == ([] if taps == 1 else ["3.weight"])
    assert len(report["float_layers"]) == 2
    assert float_weights(path) == (["0.weight"] if taps == 1 else ["0.weight", "3.weight"])


def test_four_bits_without_activations_are_the_formats_own_int4(tmp_path: Path) -> None:
    model = quantize(net(), tmp_path, weight_bits=4, activation_bits=None).model
    path = tmp_path / "model.onnx"
    report = export_onnx(model, images()[:2], path, input=INPUT)
    initializers = {t.name: t for t in onnx.load(path).graph.initializer}
    for name in ("0", "2", "4", "8"):
        weight = initializers[f"{name}.weight_int4"]
        count = model.get_submodule(name).weight.numel()
        assert weight.data_type == onnx.TensorProto.INT4 and len(weight.raw_data) == (count + 1) // 2
    assert float_weights(path) == [] and report["float_layers"] == {}
    expected = model(images()).detach()
    assert difference(run_file(path, images()), expected) < 1e-5
    openvino = pytest.importorskip("openvino")
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}  # else inputs are rounded
    compiled = openvino.Core().compile_model(path, "CPU", exact)
    assert difference(torch.from_numpy(compiled(images().numpy())[0].copy()), expected) < 1e-5


def test_an_excluded_layer_keeps_its_float_weights_in_the_runtime(tmp_path: Path) -> None:
    model = quantize(warm(net()), tmp_path, exclude=["2"]).model
    path = tmp_path / "model.onnx"
    report = export_onnx(model, images()[:2], path, input=INPUT)
    assert report["float_layers"] == {} and fused(path)["QLinearConv"] == 2
    assert difference(run_file(path, images()), model(images()).detach()) < 2e-3


def test_openvino_computes_zero_points_of_eight_bits_in_float_which_is_told(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    model = quantize(net(), tmp_path, symmetric=False).model
    path = tmp_path / "model.onnx"
    report = export_onnx(model, images()[:2], path, input=INPUT, target="openvino")
    told = "its weights have zero points: stored as integers, computed in float"
    assert set(report["float_layers"].values()) == {told}
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    given = torch.from_numpy(compiled(images().numpy())[0].copy())
    assert difference(given, model(images()).detach()) < 2e-3
