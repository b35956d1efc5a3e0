"""Pooled heads: the layer, where heads end and begin however they are written, and what the start is solved to."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, SHAPE, noise_task
from torch import Tensor, nn

import compress
from compress import checkpoint
from compress.errors import ConfigError
from compress.lower import export_onnx
from compress.measure import profile
from compress.models import alexnet, resnet20, squeezenet1_1
from compress.nn.pooled import PooledLinear
from compress.stage import Edit
from compress.stages import PoolHead, Quantize
from compress.stages.fire import empty_fire
from compress.surgery import describe, layers
from compress.task import Task, Work

OUTPUTS = 3


def flat(classes: int = 3, channels: int = 2) -> nn.Module:
    """A network with a fully connected head, for 8x8 images."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Dropout(0.1), nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, classes)),
    )


def pooled(model: nn.Module, task: Task | None = None, **settings: Any) -> Edit:
    return PoolHead(**settings)(model.eval(), task or noise_task(SHAPE), Work(Path()))


def changed(edit: Edit) -> dict[str, str]:
    return {site.name: site.after for site in edit.sites if site.after is not None}


def solved(features: Tensor, logits: Tensor) -> Tensor:
    """The least-squares answers to `logits` from the means of `features` (N, C, H, W), by torch's own solver."""
    ones = torch.ones(len(features), 1, dtype=torch.double)
    means = torch.cat((features.double().flatten(2).sum(2) / features[0, 0].numel(), ones), 1)
    answers: Tensor = means @ torch.linalg.lstsq(means, logits.double()).solution
    return answers


def output_of(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """What the module gives when it is first called."""
    outputs: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, __, output: outputs.append(output.detach()))
    model(images)
    hook.remove()
    return outputs[0]


def test_layer_is_the_plain_formula_at_any_size() -> None:
    torch.manual_seed(0)
    layer = PooledLinear(6, 4).double()
    for size in ((5, 7), (1, 1), (3, 2)):
        x = torch.randn(2, 6, *size, dtype=torch.double)
        means = torch.stack([torch.stack([channel.sum() / channel.numel() for channel in image]) for image in x])
        torch.testing.assert_close(layer(x.flatten(1)), means @ layer.linear.weight.T + layer.linear.bias)
    assert describe(layer) == "PooledLinear(6, 4)"
    assert describe(PooledLinear(**layer.config())) == describe(layer)


def test_counts_by_hand() -> None:
    counted = profile(nn.Sequential(nn.Flatten(), PooledLinear(6, 4)), torch.zeros(1, 6, 5, 7))
    assert (counted.params, counted.macs, counted.uncounted) == (6 * 4 + 4, 6 * 4, ())


@pytest.mark.parametrize("arguments", [(0, 4), (6, 0)])
def test_arguments_are_checked(arguments: tuple[int, int]) -> None:
    name = "in_channels" if arguments[0] == 0 else "out_features"
    with pytest.raises(ValueError, match=rf"`{name}` \(=0\) must be at least 1"):
        PooledLinear(*arguments)


class Apart(nn.Module):
    """Layers as attributes, functions between them, one ReLU for all of the network, a gate with a `Linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.gate = nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Linear(6, 6)
        self.drop, self.dropout = nn.Dropout(), nn.Dropout()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6 * 7 * 9, 20), nn.Linear(20, 10), nn.Linear(10, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        x = x * self.gate(x.mean((2, 3)))[..., None, None].sigmoid()
        x = self.dropout(x.view(x.size(0), -1))
        x = self.relu(self.fc1(x))
        x = F.relu(self.fc2(self.drop(x)))
        return F.log_softmax(self.fc3(self.dropout(x)), 1)


class Averaged(nn.Module):
    def __init__(self, *layers: nn.Module, how: str = "mean") -> None:
        super().__init__()
        self.conv, self.head, self.how = nn.Conv2d(8, 6, 3), nn.Sequential(*layers), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "mean":
            return self.head(x.mean((2, 3)))
        if self.how == "permute":
            return self.head(x.permute(0, 2, 3, 1).flatten(1))
        return self.head(torch.cat((x.flatten(1), x.flatten(1)), 1))


def vgg() -> nn.Module:
    """A head as torchvision's VGG and AlexNet have it."""
    head = (nn.Linear(6 * 9, 20), nn.ReLU(True), nn.Dropout(), nn.Linear(20, 20), nn.ReLU(True), nn.Dropout())
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(True)),
        nn.AdaptiveAvgPool2d(3),
        nn.Sequential(nn.Flatten(), *head, nn.Linear(20, OUTPUTS)),
    )


def one_linear() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Dropout(), nn.Linear(6 * 7 * 9, OUTPUTS), nn.Softmax(1))


def normed() -> nn.Module:
    inner = (nn.Linear(378, 20, bias=False), nn.BatchNorm1d(20), nn.Tanh(), nn.Flatten(), nn.Linear(20, 9))
    head = (*inner, nn.LayerNorm(9), nn.GELU(), nn.Linear(9, OUTPUTS, bias=False))
    return nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), *head)


# name -> (network, its map: module that makes it, the `Linear` layers of its head, what else goes)
HEADS: dict[str, tuple[Callable[[], nn.Module], str, list[str], list[str]]] = {
    "one linear layer": (one_linear, "0", ["3"], []),
    "as in VGG": (vgg, "1", ["2.1", "2.4", "2.7"], ["2.2", "2.3", "2.5", "2.6"]),
    "norms": (normed, "0", ["2", "6", "9"], ["3", "4", "7", "8"]),
    "attributes": (Apart, "dropout", ["fc1", "fc2", "fc3"], ["drop"]),
    "averaged, two layers": (
        lambda: Averaged(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, OUTPUTS)),
        "conv",
        ["head.0", "head.2"],
        ["head.1"],
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_however_they_are_written(name: str) -> None:
    torch.manual_seed(0)
    factory, source, linears, others = HEADS[name]
    model, task = factory().eval(), noise_task(SHAPE)
    images = torch.cat([x for x, _ in task.calibration])
    logits = output_of(model, linears[-1], images)
    features = output_of(model, source, images).view(len(images), 6, *((7, 9), (3, 3))[name == "as in VGG"])
    expected, text = solved(features, logits), describe(model.get_submodule(linears[0]))
    edit = pooled(model, task, ridge=0.0)
    assert changed(edit) == dict.fromkeys(linears[:-1], "Identity()") | {linears[-1]: "PooledLinear(6, 3)"}
    assert next(site.before for site in edit.sites if site.name == linears[0]) == text
    assert edit.notes["replaced"] == linears + others
    assert all(isinstance(edit.model.get_submodule(each), nn.Identity) for each in linears[:-1] + others)
    torch.testing.assert_close(output_of(edit.model, linears[-1], images).double(), expected, rtol=1e-3, atol=1e-4)
    error = (expected - logits).square().sum() / logits.double().square().sum()
    assert edit.notes["relative_error"] == {linears[-1]: pytest.approx(float(error), abs=1e-3)}
    assert edit.notes["map"] == [6, *((1, 1) if name.startswith("averaged") else features.shape[2:])]


def test_what_is_not_the_head_is_kept() -> None:
    edit = pooled(Apart())
    kept = {site.name: site.why for site in edit.sites if site.after is None}
    assert kept == {"gate": "it is not in the head, which is what follows the last spatial map"}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch says so of plain ones too
@pytest.mark.parametrize("name", AWKWARD)
def test_a_head_that_averages_already_keeps_its_outputs(name: str) -> None:
    torch.manual_seed(0)
    front, task = AWKWARD[name]().eval(), noise_task(SHAPE)
    channels, height, width = front(task.example).shape[1:]
    linear = nn.Linear(channels * height * width, OUTPUTS)
    with torch.no_grad():
        linear.weight.copy_(linear.weight.view(OUTPUTS, channels, -1).mean(2).repeat_interleave(height * width, 1))
    model = nn.Sequential(front, nn.Flatten(), linear).eval()
    expected = model(task.example)
    edit = pooled(model, task, ridge=0.0)
    assert edit.notes["map"] == [channels, height, width]
    torch.testing.assert_close(edit.model(task.example), expected, rtol=1e-3, atol=1e-4)
    assert edit.notes["relative_error"] == {"2": 0.0}


def test_the_start_is_fitted_to_the_base_model_on_what_is_left_of_it() -> None:
    torch.manual_seed(0)
    base = one_linear().eval()
    model, task = copy.deepcopy(base), replace(noise_task(SHAPE), teacher=base)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
        model[3].weight.zero_()
    images = torch.cat([x for x, _ in task.calibration])[:24]
    expected = solved(model[0](images), base[:4](images))
    edit = pooled(model, task, images=24, ridge=0.0)
    torch.testing.assert_close(edit.model[:4](images).double(), expected, rtol=1e-3, atol=1e-4)


def test_networks_with_a_pooled_head() -> None:
    task = noise_task((3, 32, 32))
    with pytest.raises(ConfigError, match=r"one linear layer \(linear\) behind a map of one position: nothing is left"):
        pooled(resnet20(), task)
    with pytest.raises(ConfigError, match="there is no `Linear` through which everything in the output goes"):
        pooled(squeezenet1_1(10), task)
    once = pooled(flat(), noise_task((2, 8, 8))).model
    with pytest.raises(ConfigError, match=r"8\.linear stays, since it is a part of PooledLinear\(8, 3\)"):
        pooled(once, noise_task((2, 8, 8)))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"`images` \(=0\) must be at least 1"):
        PoolHead(images=0)
    with pytest.raises(ConfigError, match=r"`ridge` \(=-1\) must be a finite number, 0 or more"):
        PoolHead(ridge=-1)
    with pytest.raises(ConfigError, match="there is no `Linear`"):
        PoolHead().check(squeezenet1_1(10))


def test_alexnet_has_fifty_times_fewer_parameters_with_fire() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        assert profile_params(alexnet()) == 35_856_330
    model, task = alexnet(size=8), noise_task((3, 8, 8), classes=10)
    for name, layer in list(layers(model.features[1:], (nn.Conv2d,)).items()):
        wide = layer.out_channels
        model.features[int(name)] = empty_fire(layer, wide // 4, wide // 2, wide // 2)
    edit = pooled(model, task)
    norms = 2 * (64 + 192 + 384 + 256 + 256)
    fires = 0
    for before, wide in ((64, 192), (192, 384), (384, 256), (256, 256)):
        squeeze, half = wide // 4, wide // 2
        fires += squeeze * (before + 1) + half * (squeeze + 1) + half * (9 * squeeze + 1)
    assert profile_params(edit.model) == 64 * 27 + norms + fires + 256 * 10 + 10 < 35_856_330 / 50
    assert list(changed(edit)) == ["classifier.1", "classifier.4", "classifier.6"]
    assert isinstance(edit.model.classifier[0], nn.Dropout)
    assert edit.model.train()(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def profile_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_quantizes_reloads_and_exports_on_integers(tmp_path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.manual_seed(0)
    task = noise_task((2, 8, 8))
    model = pooled(flat(), task).model
    expected = model(task.example).detach()
    edit = Quantize(calibration_images=32)(model, task, Work(tmp_path))
    assert {site.name: site.after for site in edit.sites} == dict.fromkeys(
        ["0", "8.linear"], "int8 weights per channel, uint8 activations"
    )
    assert F.mse_loss(edit.model(task.example), expected) < 0.01 * expected.square().mean()
    path = tmp_path / "model.safetensors"
    build = ("test_pool_head.flat", {})
    checkpoint.save(edit.model.eval(), path, build=build, input=task.input, provenance={}, results={})
    loaded = compress.load(path, allow=["test_pool_head"])
    assert torch.equal(loaded(task.example), edit.model(task.example))
    told = export_onnx(edit.model, task.example, tmp_path / "model.onnx", input=task.input)
    assert told["float_layers"] == {}
