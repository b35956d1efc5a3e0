"""A quantizer behind a layer rounds as onnxruntime's integer kernel does, which is asked itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_task import quantize, warm
from test_lower import INPUT, fused, run_file
from torch import Tensor, nn

from compress.lower import export_onnx, export_pt2, lower
from compress.models import mobilenet_v1, resnet20
from compress.nn.places import place_quantizers, quantizer_places, trace
from compress.nn.quantized import FakeQuantize
from compress.nn.shift import ShiftConv2d
from compress.nn.straight_through import requantized
from compress.nn.units import known_units

SETTINGS: list[dict[str, Any]] = [
    {},
    {"granularity": "tensor"},
    {"symmetric": False},
    {"weight_bits": 4, "activation_bits": 4},
    {"weight_bits": 4, "grid": "power_of_two"},
    {"symmetric_activations": True, "observer": "minmax"},
]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Conv2d(8, 32, 3, padding=1),
    "strided": lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 32, 3, 2)),
    "groups": lambda: nn.Conv2d(8, 32, (3, 1), groups=4, padding=(2, 0), dilation=(2, 1)),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "pointwise": lambda: nn.Conv2d(8, 32, 1, bias=False),
    "pooled": lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 64, 3, padding=1)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(2048, 500)),
    "shift": lambda: ShiftConv2d(8, 32, 3, 3, padding=1),
}


def images(number: int = 128, channels: int = 8, size: int = 16) -> Tensor:
    """Images with few different levels, so that those of the input round alike everywhere."""
    noise = torch.randn(number, channels, size, size, generator=torch.Generator().manual_seed(3))
    return (noise * 20).round() / 20


def net(layer: nn.Module, clip: Callable[[], nn.Module]) -> nn.Module:
    """One layer on integers, whose every output shows in the logits."""
    head = [layer, clip(), nn.Flatten()]
    width = nn.Sequential(*head)(images(1)).shape[1]
    return nn.Sequential(*head, nn.Linear(width, 10)).eval()


def on_grids(model: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    return quantize(model, folder, (8, 16, 16), **settings).model.eval()


def require_same(model: nn.Module, folder: Path, rounded: int) -> None:
    """onnxruntime computes the file of the model on integers, and gives the same; one other rounding would show."""
    path = folder / "model.onnx"
    export_onnx(model, images(2), path, input=INPUT)
    operators = fused(path)
    assert operators["QLinearConv"] + operators["QGemm"] == rounded
    assert operators["Conv"] + operators["Gemm"] == 0
    with torch.no_grad():
        expected = model(images())
    torch.testing.assert_close(run_file(path, images()), expected, rtol=0, atol=5e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("layer", LAYERS)
def test_every_number_rounds_as_in_onnxruntime(layer: str, tmp_path: Path) -> None:
    require_same(on_grids(net(LAYERS[layer](), nn.ReLU), tmp_path), tmp_path, 2)


@pytest.mark.parametrize(
    ("clip", "settings"), [(nn.ReLU6, {}), *((nn.Identity, settings) for settings in SETTINGS)], ids=str
)
def test_on_every_grid(clip: Callable[[], nn.Module], settings: dict[str, Any], tmp_path: Path) -> None:
    require_same(on_grids(net(LAYERS["dense"](), clip), tmp_path, **settings), tmp_path, 2)


@pytest.mark.parametrize(
    ("factory", "convolutions"),
    [(resnet20, 19), (lambda: mobilenet_v1(10, width=0.25), 27)],
    ids=["resnet", "mobilenet"],
)
def test_whole_networks_give_the_same_answers(
    factory: Callable[[], nn.Module], convolutions: int, tmp_path: Path
) -> None:
    model = quantize(warm(factory(), (3, 32, 32)), tmp_path, (3, 32, 32)).model.eval()
    x = images(256, 3, 32)
    export_onnx(model, x[:2], tmp_path / "model.onnx", input=INPUT)
    assert fused(tmp_path / "model.onnx")["QLinearConv"] == convolutions
    with torch.no_grad():
        expected = model(x)
    given = run_file(tmp_path / "model.onnx", x)
    assert float((given.argmax(1) == expected.argmax(1)).float().mean()) > 0.995  # additions are float sums in both


def test_whole_units_are_multiplied_and_rounded_in_float32() -> None:
    generator = np.random.default_rng(0)
    whole = generator.integers(-400_000, 400_000, (64, 16, 20, 20))
    weights, (read, step) = generator.uniform(1e-3, 1e-2, 16).astype(np.float32), np.float32([0.021, 0.37])
    factor = (read * weights / step).reshape(-1, 1, 1)
    expected = (np.clip(np.rint(whole.astype(np.float32) * factor) + 7, 0, 255) - 7) * step
    unit = torch.from_numpy(read * weights).view(-1, 1, 1)
    noise = 1 + 2e-7 * torch.randn(whole.shape)
    sums = torch.from_numpy(whole).float() * unit * noise  # as float convolutions have them
    quantizer = FakeQuantize().eval()
    quantizer.set_range(float(step), 7)
    assert torch.equal(quantizer(sums, unit), torch.from_numpy(expected))
    assert not torch.equal(quantizer(sums), torch.from_numpy(expected))


def test_the_gradient_passes_through_inside_the_range() -> None:
    quantizer = FakeQuantize().eval()
    quantizer.set_range(0.1, 10)
    x = torch.linspace(-2, 30, 999, requires_grad=True)
    unit = torch.tensor(0.003)
    quantizer(x, unit).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, ((x >= -1) & (x <= 24.5)).float())
    with torch.no_grad():
        zero = quantizer.zero_point  # on a GPU the bounds are tensors
        assert torch.equal(quantizer(x, unit), requantized(x, unit, quantizer.scale, -zero, 255 - zero))
    assert torch.equal(quantizer.train()(x, unit), quantizer(x))  # training knows no units


def test_what_a_layer_gives_and_what_a_trace_shows_stays_as_it_is(tmp_path: Path) -> None:
    model = on_grids(net(LAYERS["dense"](), nn.ReLU6), tmp_path)
    layer: Any = model.get_submodule("0")
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0], output)))
    with torch.no_grad():
        model(images(2))
        assert torch.equal(seen[1], F.conv2d(seen[0], layer.weight, layer.bias, padding=1))
    hook.remove()
    assert {node.op for node in trace(model).nodes} == {"placeholder", "call_module", "output"}
    assert torch.equal(copy.deepcopy(model)(images()), model(images()))


def test_what_is_cut_off_is_no_whole_number_of_units(tmp_path: Path) -> None:
    model = on_grids(net(LAYERS["dense"](), nn.ReLU6), tmp_path)
    name = f"quantizers.{quantizer_places(model)['1:call:0']}"
    quantizer: Any = model.get_submodule(name)
    assert list(known_units(model)) == [name]
    quantizer.set_range(8 / 255, 0)
    assert known_units(model) == {}
    quantizer.set_range(6 / 255, 0)
    assert list(known_units(model)) == [name]


def test_a_quantizer_in_two_places_and_layers_without_a_grid_have_no_unit() -> None:
    shared = FakeQuantize()
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU()).eval()
    placed = place_quantizers(model, {"1:call:0": shared, "3:call:0": shared}).eval()
    assert known_units(placed) == {}
    x = images(2, 3)
    with torch.no_grad():
        assert torch.equal(placed(x), shared(F.relu(model[2](shared(F.relu(model[0](x)))))))


def test_the_torch_file_rounds_alike(tmp_path: Path) -> None:
    model = on_grids(net(LAYERS["dense"](), nn.ReLU6), tmp_path)
    with torch.no_grad():
        expected = model(images())
        torch.testing.assert_close(lower(model, "torch")(images()), expected, rtol=0, atol=1e-5)
    export_pt2(model, images(2), tmp_path / "model.pt2")
    file = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(file(images()), expected, rtol=0, atol=1e-5)


def test_torch_compile_takes_the_model_whole(tmp_path: Path) -> None:
    model = on_grids(net(LAYERS["dense"](), nn.ReLU6), tmp_path)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert float((compiled(images()) - model(images())).abs().mean()) < 1e-4
