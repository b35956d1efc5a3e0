"""Products whose inputs find their own scale: against torchao itself, the definition of float8, and plain layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, noise_task
from torch import Tensor, nn

import compress
from compress import checkpoint
from compress.errors import ConfigError
from compress.lower.pt2_x86 import pt2_x86_problems
from compress.lower.torchao import to_torchao, torchao_problems
from compress.nn.clustered import ClusteredWeight
from compress.nn.displace import Shift2d
from compress.nn.dynamic import DynamicLinear, DynamicPointwise, FakeQuantizeDynamic, Float8Weight, nearest_float8
from compress.nn.quantized import FakeQuantizeWeight
from compress.nn.separable import SeparableConv2d
from compress.nn.shift import ShiftConv2d
from compress.stage import Edit
from compress.stages import Cluster, CorrectBias, FineTune, FreezeRanges, Quantize, QuantizeDynamic
from compress.task import Work

SHAPE = (16, 6, 5)
TASK = noise_task(SHAPE)


def net(classes: int = 16, channels: int = 16) -> nn.Module:
    """Pointwise convolutions of every stride with batch norm between, and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 1, stride=(2, 1))),
        *(nn.ReLU(), nn.Conv2d(32, 16, 1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 2 * 3, classes)),
    )


def trained() -> nn.Module:
    """`net`, with statistics that say something."""
    torch.manual_seed(0)
    model = net()
    for _ in range(20):
        model(TASK.example * 2)
    return model.eval()


def quantized(model: nn.Module | None = None, **settings: Any) -> Edit:
    edit = QuantizeDynamic(**settings)(trained() if model is None else model, TASK, Work(Path()))
    edit.model.eval().requires_grad_(False)
    return edit


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, DynamicLinear | DynamicPointwise)]


def relative(given: Tensor, wanted: Tensor) -> float:
    return float((given - wanted).detach().norm() / wanted.detach().norm())


def test_float8_is_what_a_cast_gives() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()].sort().values
    halves = (every[1:] + every[:-1]) / 2
    near = torch.cat([torch.nextafter(x, x + s) for x in (every, halves) for s in (-1.0, 1.0)]).clamp(-448, 448)
    random = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-15, 10).repeat(400)
    for x in (every, halves, near, random.clamp(-448, 448)):
        torch.testing.assert_close(nearest_float8(x), x.to(torch.float8_e4m3fn).float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_rounding_is_torchaos(dtype: str) -> None:
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow, PerTensor

    x = torch.randn(5, 7, 24, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 3, 7).view(1, 7, 1)
    x[0, 0] = 0.0
    if dtype == "int8":
        theirs = Int8Tensor.from_hp(x, PerRow()).dequantize()
    else:
        theirs = Float8Tensor.from_hp(x, granularity=PerTensor()).dequantize()
    ours = FakeQuantizeDynamic(dtype)
    torch.testing.assert_close(ours(x), theirs, rtol=1e-6, atol=0)
    assert not ours(torch.zeros(2, 3)).any()
    leaf = x.clone().requires_grad_()
    seen = ours(leaf)
    assert torch.equal(seen, ours(x))
    seen.backward(x)
    assert torch.equal(leaf.grad, x)  # straight through  # type: ignore[arg-type]  # it has one


@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
def test_a_pointwise_layer_is_the_convolution_on_rounded_pixels(stride: Any) -> None:
    convolution = nn.Conv2d(16, 24, 1, stride=stride)
    layer = DynamicPointwise(16, 24, stride)
    layer.linear.weight.data, layer.linear.bias.data = convolution.weight.data.flatten(1), convolution.bias.data  # type: ignore[union-attr]  # there is one
    x = torch.randn(3, *SHAPE)
    rounded = FakeQuantizeDynamic()(x.movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(layer(x), convolution(rounded), rtol=1e-5, atol=1e-6)
    assert layer(x).is_contiguous()


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_the_stage_changes_what_is_a_product(dtype: str) -> None:
    before = trained()
    wanted = copy.deepcopy(before)(TASK.example)
    edit = quantized(before, dtype=dtype)
    assert [(s.before, s.after) for s in edit.sites] == [
        ("Conv2d(16, 32, 1x1)", f"DynamicPointwise(16, 32, {dtype})"),
        ("Conv2d(32, 32, 1x1, stride=(2, 1))", f"DynamicPointwise(32, 32, stride=(2, 1), {dtype})"),
        ("Conv2d(32, 16, 1x1, stride=2)", f"DynamicPointwise(32, 16, stride=2, {dtype})"),
        ("Linear(96, 16)", f"DynamicLinear(96, 16, {dtype})"),
    ]
    assert edit.notes == {"dtype": dtype, "batch_norms_folded": 1}
    assert 0 < relative(edit.model(TASK.example), wanted) < (0.03 if dtype == "int8" else 0.1)
    weight = layers(edit.model)[0].linear.weight
    steps = weight / (weight.abs().amax(1, keepdim=True) / 127 if dtype == "int8" else weight.abs().max() / 448)
    on_grid = steps.round() if dtype == "int8" else steps.to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(steps, on_grid, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_layers_are_sites_and_go_on_computing(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), AWKWARD[name]()).eval()
    x = torch.randn(2, 8, 9, 11)
    wanted = copy.deepcopy(model)(x)
    convolutions = {n for n, m in model.named_modules() if type(m) is nn.Conv2d}
    edit = quantized(model)
    assert {site.name for site in edit.sites} == convolutions
    assert edit.sites[0].after == "DynamicPointwise(8, 8, int8)"
    kept = {site.why for site in edit.sites if site.after is None}
    assert kept <= {
        "torchao's quantize_ has no int8 convolution: use `Quantize`, or substitute the layer",
        "it has 8 inputs and 12 outputs, and int8 kernels take multiples of 8 only: torchao would take the rest to the "
        "CPU and back",
    }
    assert len(kept) == (2 if name.startswith("1x1,") or name == "1x1" else 1)
    assert relative(edit.model(x), wanted) < 0.03


def test_what_torchao_would_pass_over_says_why() -> None:
    model = nn.Sequential(
        nn.Conv2d(16, 16, 1, groups=2),
        nn.Conv2d(16, 16, 1, padding=1),
        SeparableConv2d(16, 16, 3, 1, padding=1),
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, 1),
        Shift2d(16, 3),
        ShiftConv2d(16, 16, 3, 2, padding=1),
        nn.Conv2d(16, 16, 1, padding="same"),
    )
    nn.init.zeros_(model[3].weight)  # type: ignore[arg-type]  # a tensor
    nn.utils.parametrizations.weight_norm(model[4])
    sites = {site.name: site for site in quantized(model).sites}
    for name, reason in {
        "0": "its 2 groups are as many products",
        "1": "its padding (1, 1) adds pixels",
        "2.depthwise": "it is a part of SeparableConv2d",
        "2.pointwise": "it is a part of SeparableConv2d",
        "3": "its weights are all zero",
        "4": "its weights are computed by _WeightNorm",
        "5": "it only displaces its input",
        "6": "torchao's quantize_ knows no layer of this kind",
    }.items():
        assert sites[name].after is None and sites[name].why.startswith(reason)
    assert [name for name, site in sites.items() if site.after] == ["7"]
    (odd, even) = quantized(nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 16)), dtype="float8").sites
    reason = (
        "it has 24 inputs and 16 outputs, and float8 kernels take multiples of 16 only: torchao would leave the rest "
    )
    assert (odd.why, even.why) == (reason + "in float without a word", "")


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match=r"`dtype` \(='int4'\) must be one of int8, float8"):
        QuantizeDynamic(dtype="int4")
    with pytest.raises(ValueError, match=r"`dtype` \(='int4'\) must be one of int8, float8"):
        FakeQuantizeDynamic("int4")
    with pytest.raises(ValueError, match=r"`stride` \(=0\) must be at least 1"):
        DynamicPointwise(8, 8, 0)
    with pytest.raises(
        ConfigError, match="would change nothing; every layer was kept: torchao's quantize_ has no int8"
    ):
        quantized(nn.Sequential(nn.Conv2d(16, 16, 3)))
    for dtype in ("int8", "float8"):
        for second in (QuantizeDynamic(), Quantize()):
            with pytest.raises(ConfigError, match="quantized already; keep one of the stages that quantize"):
                second(quantized(dtype=dtype).model, TASK, Work(Path()))
    with pytest.raises(ConfigError, match="`model` has no dynamic layer"):
        to_torchao(trained())
    (problem,) = torchao_problems({"a": QuantizeDynamic(), "b": Quantize()})
    assert problem.startswith("`stages.a` (QuantizeDynamic) is measured from a checkpoint, which needs `build`")
    assert "`QuantizeDynamic` is for GPUs" in pt2_x86_problems({"a": QuantizeDynamic()})[0]


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_training_follows_the_grid(dtype: str, tmp_path: Path) -> None:
    model = quantized(dtype=dtype).model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    labels = torch.arange(32) % 16
    images = torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1
    after = model(images)
    torch.testing.assert_close(model.eval()(images), after)
    weight = layers(model)[0].linear.weight
    assert len(weight.unique()) <= (255 * 32 if dtype == "int8" else 255)


@pytest.mark.parametrize("dtype", ["int8", "float8"])
@pytest.mark.parametrize("form", ["packed", "training"])
def test_a_checkpoint_holds_a_byte_for_each_weight(dtype: str, form: str, tmp_path: Path) -> None:
    model = quantized(dtype=dtype).model
    path = tmp_path / "m.safetensors"
    said: dict[str, Any] = {"build": ("test_quantize_dynamic.net", {}), "provenance": {}, "results": {}}
    size = checkpoint.save(model, path, input={"size": list(SHAPE[1:]), "mean": [0.0] * 16}, form=form, **said)
    loaded = compress.load(path, allow=["test_quantize_dynamic"])
    assert torch.equal(loaded(TASK.example), model(TASK.example))
    weights = sum(layer.linear.weight.numel() for layer in layers(model))
    assert weights > 3500 and (form == "training" or size < weights + 2500)
    assert [type(layer.linear.parametrizations.weight[0]) for layer in layers(loaded)] == [
        FakeQuantizeWeight if dtype == "int8" else Float8Weight
    ] * 4


def test_stages_before_and_after(tmp_path: Path) -> None:
    model = Cluster(bits=4)(trained(), TASK, Work(Path())).model
    values = layers(quantized(model).model)[0].linear
    assert [type(part) for part in values.parametrizations.weight] == [ClusteredWeight, FakeQuantizeWeight]
    assert len((values.weight / values.weight.abs().amax(1, keepdim=True)).unique()) <= 16 * 32
    for stage in (CorrectBias(images=16), FreezeRanges(), FineTune(epochs=1, lr=0.01)):
        edit = stage(quantized().model.requires_grad_(True), TASK, Work(tmp_path))
        assert edit.model(TASK.example).shape == (2, 16)
