"""Bias correction: the means of a quantized network's layers come back to those of the float one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, Noise, noise_task
from torch import Tensor, nn

import compress.stages.correct_bias
from compress import checkpoint
from compress.errors import ConfigError
from compress.nn.separable import SeparableConv2d
from compress.nn.shift import ShiftConv2d
from compress.stage import Edit
from compress.stages import CorrectBias, Quantize
from compress.task import Work


def quantized(model: nn.Module, bits: int = 3) -> nn.Module:
    return Quantize(weight_bits=bits, calibration_images=32)(model.eval(), noise_task(), Work(Path())).model


def correct(model: nn.Module, **settings: Any) -> Edit:
    return CorrectBias(**settings)(model, noise_task(), Work(Path()))


def net(bias: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(8, 12, 3, stride=(2, 1), padding=1, bias=bias), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=bias), nn.ReLU()),
        *(nn.Conv2d(12, 8, (1, 3), groups=2, bias=bias), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        nn.Linear(32, 3, bias=bias),
    )


LAYERS = ("0", "2", "4", "8")


def latent(model: nn.Module) -> nn.Sequential:
    """A float `net` with the latent weights and the biases of a quantized one."""
    plain = net(bias=True).eval()
    with torch.no_grad():
        for name in LAYERS:
            layer, to = model.get_submodule(name), plain.get_submodule(name)
            to.weight.copy_(layer.parametrizations.weight.original)
            to.bias.copy_(torch.zeros_like(to.bias) if layer.bias is None else layer.bias)
    return plain


@torch.no_grad()
def means(model: nn.Module, name: str) -> Tensor:
    """By channel, the mean output of a layer over all images."""
    found: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, __, output: found.append(output))
    model(Noise().x)
    hook.remove()
    return found[0].movedim(1, -1).flatten(0, -2).double().mean(0)


def units(model: nn.Module, name: str) -> Tensor:
    """One unit of the layer's integer biases: the step of its input times that of its weights."""
    reads = {"0": "input_input_0", "2": "1_call_0", "4": "3_call_0", "8": "6_call_0"}[name]
    grid = model.get_submodule(name).parametrizations.weight[-1]
    return (model.quantizers.get_submodule(reads).scale * grid.finest_scale).double()


@pytest.mark.parametrize("bias", [False, True])
def test_means_are_those_of_the_float_network(bias: bool) -> None:
    model = quantized(net(bias))
    plain, before = latent(model), copy.deepcopy(model)
    edit = correct(model, images=32)
    for name in LAYERS:
        wanted = means(plain, name)
        off = (means(edit.model, name) - wanted).abs()
        assert bool((off <= 0.51 * units(edit.model, name) + 1e-5).all()), name
        told = edit.notes["mean_shift"][name]
        assert told["before"] == pytest.approx(float((means(before, name) - wanted).abs().mean()), rel=0.01)
        assert told["after"] == pytest.approx(float(off.mean()), rel=0.05, abs=1e-6)
        assert told["before"] > 20 * told["after"]
        integers = edit.model.get_submodule(name).bias.double() / units(edit.model, name)
        torch.testing.assert_close(integers, integers.round(), rtol=1e-6, atol=1e-3)
    assert edit.notes["images"] == 32 and not edit.model.training


def test_weights_that_all_round_down() -> None:
    model = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.Identity())
    with torch.no_grad():
        model[0].weight.fill_(0.49)
        model[0].weight[:, 0] = 3.0  # the grid's largest integer at 3 bits, so that its step is 1
    model = quantized(model)
    shifted = noise_task()
    shifted.calibration.x += 2.0
    assert model.get_submodule("0").weight.unique().tolist() == [0.0, 3.0]
    edit = CorrectBias(method="analytic")(model, shifted, Work(Path()))
    wanted = 0.49 * shifted.calibration.x[:, 1:].sum(1).mean()
    torch.testing.assert_close(edit.model.get_submodule("0").bias.detach(), wanted.expand(4), rtol=0, atol=0.02)


def test_a_network_that_cannot_be_walked_through_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise ValueError("cannot be traced")

    at_once = correct(quantized(net())).model
    monkeypatch.setattr(compress.stages.correct_bias, "Walk", refused)
    one_by_one = correct(quantized(net())).model
    for name in LAYERS:
        off = (at_once.get_submodule(name).bias - one_by_one.get_submodule(name).bias).detach().abs()
        unit = units(at_once, name)
        assert bool((off <= 1.01 * unit).all()) and float((off / unit).mean()) < 0.1


def test_analytic_is_the_formula() -> None:
    model = quantized(net())
    plain = latent(model)
    edit = correct(model, method="analytic")
    for name in LAYERS:
        inputs: list[Tensor] = []
        layer, source = edit.model.get_submodule(name), plain.get_submodule(name)
        hook = source.register_forward_hook(lambda _, given, __, inputs=inputs: inputs.append(given[0]))
        plain(Noise().x)
        hook.remove()
        mean = inputs[0].detach().movedim(1, -1).flatten(0, -2).double().mean(0)
        error = (source.weight - layer.weight).detach().double()
        for o in range(len(error)):
            first = o // (len(error) // getattr(source, "groups", 1)) * error.shape[1]
            wanted = sum(float(error[o, i].sum() * mean[first + i]) for i in range(error.shape[1]))
            assert abs(float(layer.bias[o].detach()) - wanted) <= 0.51 * float(units(edit.model, name)[o]) + 1e-6


@pytest.mark.parametrize("name", AWKWARD)
def test_the_awkward_list(name: str) -> None:
    torch.manual_seed(0)
    model = AWKWARD[name]().eval()
    last = [n for n, module in model.named_modules() if isinstance(module, nn.Conv2d)][-1]
    wanted = means(model, last)
    model = quantized(model, bits=4)
    if name == "used twice":
        with pytest.raises(ConfigError, match=r"every layer was kept: called several times, with a mean each time"):
            correct(model)
        return
    before = (means(model, last) - wanted).abs().mean()
    edit = correct(model)
    assert float((means(edit.model, last) - wanted).abs().mean()) < 0.1 * before
    assert all(site.after == "bias corrected" for site in edit.sites)


def test_layers_of_ours_by_the_bias_of_their_convolution() -> None:
    def shifts() -> nn.Module:
        torch.manual_seed(0)
        return quantized(nn.Sequential(ShiftConv2d(8, 6, 3, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 1)))

    before = shifts().get_submodule("0")
    edit = correct(shifts())
    layer = edit.model.get_submodule("0")
    assert layer.config()["bias"] and before.pointwise.bias is None
    x = Noise().x
    seen = edit.model.quantizers.get_submodule("input_input_0")(x)
    wanted = F.conv2d(x, float_kernel(layer), padding=1).mean((0, 2, 3))
    torch.testing.assert_close(layer(seen).mean((0, 2, 3)), wanted, rtol=0, atol=2e-3)
    analytic = correct(shifts(), method="analytic")
    assert [site.after for site in analytic.sites] == [None, "bias corrected"]
    assert "`method: empirical` corrects it" in analytic.sites[0].why


def float_kernel(layer: nn.Module) -> Tensor:
    """The dense kernel of three copies a channel, one by one, with the latent weights."""
    kernel = torch.zeros(6, 8, 3, 3)
    weight = layer.pointwise.parametrizations.weight.original.detach()
    for c in range(8):
        for t in range(3):
            y, x = (int(d) + 1 for d in layer.displacement[c, t].tolist())
            kernel[:, c, y, x] += weight[:, c * 3 + t, 0, 0]
    return kernel


@pytest.mark.parametrize("method", ["empirical", "analytic"])
def test_new_biases_come_back_from_the_file(method: str, tmp_path: Path) -> None:
    edit = correct(quantized(net()), method=method)
    path = tmp_path / "model.safetensors"
    checkpoint.save(
        edit.model, path, build=("test_correct_bias.net", {}), input=noise_task().input, provenance={}, results={}
    )
    loaded = checkpoint.load(path, allow=["test_correct_bias"])
    assert torch.equal(loaded(Noise().x), edit.model(Noise().x))


def test_what_is_left_alone() -> None:
    stage = Quantize(weight_bits=3, calibration_images=32, exclude=["8"])
    model = stage(net().eval(), noise_task(), Work(Path())).model
    edit = correct(model, exclude=["0"])
    assert [site.why for site in edit.sites] == ["excluded by '0'", "", "", "it has no quantized weights"]
    assert edit.model.get_submodule("0").bias is None and edit.model.get_submodule("8").bias is None


def test_an_operator_without_a_place_for_a_bias() -> None:
    model = nn.Sequential(SeparableConv2d(8, 4, 3, 1), nn.ReLU()).eval()
    why = {site.name: site.why for site in correct(quantized(model)).sites}
    assert why["0.depthwise"].startswith("it has no bias, and it is a part of SeparableConv2d(8, 4, 3x3")
    assert why["0.pointwise"] == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "exact"}, r"`method` \(='exact'\) must be one of empirical, analytic"),
        ({"images": 0}, r"`images` \(=0\) must be at least 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CorrectBias(**settings)


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="weights are not quantized; put `CorrectBias` behind `Quantize`"):
        correct(net().eval())
