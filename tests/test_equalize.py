"""Cross-layer equalization: the same outputs, from weights whose channels have the same range on both sides."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, SHAPE, noise_task
from random_task import warm
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress import checkpoint
from compress.errors import ConfigError
from compress.models import mobilenet_v1, resnet20
from compress.nn.displace import Shift2d
from compress.stage import Edit
from compress.stages import Equalize
from compress.task import Work


def equalize(model: nn.Module, shape: tuple[int, ...] = SHAPE, **settings: Any) -> Edit:
    return Equalize(**settings)(model.eval(), noise_task(shape), Work(Path()))


def uneven(model: nn.Module) -> nn.Module:
    """The model with output channels of very different ranges."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                factor = torch.logspace(-1, 1, len(module.weight))[torch.randperm(len(module.weight))]
                module.weight *= factor.view(-1, *[1] * (module.weight.dim() - 1))
    return model


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.LeakyReLU(0.2)),
        *(nn.ZeroPad2d(1), nn.Conv2d(12, 16, 1), nn.PReLU(16), nn.MaxPool2d(2), nn.Dropout(0.1)),
        *(nn.Conv2d(16, 8, 3, stride=(2, 1), padding=1, groups=2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(8 * 2 * 4, 6), nn.ReLU(), nn.Linear(6, 3)),
    )


def outgoing(layer: nn.Module) -> Tensor:
    return torch.stack([channel.abs().max() for channel in layer.weight])


def incoming(layer: nn.Module, channels: int) -> Tensor:
    """By input channel, the largest weight that reads it, one by one."""
    if isinstance(layer, nn.Linear):
        each = layer.in_features // channels
        return torch.stack([layer.weight[:, c * each : (c + 1) * each].abs().max() for c in range(channels)])
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    found = []
    for c in range(channels):
        group = c // inputs
        found.append(layer.weight[group * outputs : (group + 1) * outputs, c % inputs].abs().max())
    return torch.stack(found)


def test_outputs_stay_and_ranges_become_equal() -> None:
    model = warm(uneven(chain()), SHAPE)
    x = torch.randn(4, *SHAPE)
    expected = model(x)
    edit = equalize(model, iterations=1000)
    torch.testing.assert_close(edit.model(x), expected, rtol=1e-4, atol=1e-5)
    assert edit.notes["pairs"] == ["0 -> 3", "3 -> 7", "7 -> 11", "11 -> 14", "14 -> 16"]
    for pair in edit.notes["pairs"]:
        first, second = (edit.model.get_submodule(name) for name in pair.split(" -> "))
        makes = outgoing(first)
        torch.testing.assert_close(makes, incoming(second, len(makes)), rtol=2e-3, atol=0)
    assert edit.notes["range_ratio_before"] > 50 > edit.notes["range_ratio_after"]
    assert edit.notes["sweeps"] < 1000 and edit.notes["last_change"] <= 1e-4
    assert edit.notes["batch_norms_folded"] == 2
    by_name = {site.name: site for site in edit.sites}
    assert by_name["3"].after == "inputs equalized with 0, outputs equalized with 7"
    assert by_name["16"].after == "inputs equalized with 14"
    assert by_name["16"].why == "its outputs stay: it is what the model returns"


def test_one_pair_has_the_scales_of_the_paper() -> None:
    torch.manual_seed(0)
    model = uneven(nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)))
    before = copy.deepcopy(model)
    edit = equalize(model)
    r1, r2 = outgoing(before[0]), incoming(before[2], 6)
    s = (r1 * r2).sqrt() / r2
    torch.testing.assert_close(edit.model[0].weight, before[0].weight / s.view(-1, 1, 1, 1))
    torch.testing.assert_close(edit.model[0].bias, before[0].bias / s)
    torch.testing.assert_close(edit.model[2].weight, before[2].weight * s.view(1, -1, 1, 1))
    assert torch.equal(edit.model[2].bias, before[2].bias) and edit.notes["sweeps"] == 2


@pytest.mark.parametrize("name", AWKWARD)
def test_the_awkward_list(name: str) -> None:
    torch.manual_seed(0)
    model = uneven(AWKWARD[name]()).eval()
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    if name in ("used twice", "at the root"):
        with pytest.raises(ConfigError, match=r"called several times|who reads what is not known: the model is a"):
            equalize(model)
        return
    edit = equalize(model)
    assert len(edit.notes["pairs"]) == 1
    torch.testing.assert_close(edit.model(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outgoing(edit.model[0]), incoming(edit.model[-2 if len(model) == 4 else -1], 8))


def dead_ends(biases: float) -> nn.Sequential:
    """Channel 1 is never made but read with large weights; channel 4 is made with large weights but never read."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, biases
        model[2].weight[:, 1] *= 1000
        model[0].weight[4] *= 1000
        model[2].weight[:, 4] = 0
    return model.eval()  # type: ignore[return-value]


def test_dead_channels_do_not_set_the_range() -> None:
    model = dead_ends(-0.1)
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    edit = equalize(model)
    torch.testing.assert_close(edit.model(x), expected)
    alive = [0, 2, 3, 5]
    makes, reads = outgoing(model[0]), incoming(model[2], 6)
    torch.testing.assert_close(makes[alive], reads[alive])
    torch.testing.assert_close(makes[4], makes[alive].max())
    torch.testing.assert_close(reads[1], reads[alive].max())
    assert edit.notes["dead_channels"] == 2


def test_a_channel_that_always_gives_the_same_keeps_its_scale() -> None:
    """Scaled as one that gives nothing, it would give a thousand times as much."""
    model = dead_ends(0.1)
    before, x = copy.deepcopy(model), torch.randn(2, *SHAPE)
    torch.testing.assert_close(equalize(model).model(x), before(x))
    assert torch.equal(model[0].bias[1], before[0].bias[1])
    assert torch.equal(model[2].weight[:, 1], before[2].weight[:, 1])


class Forks(nn.Module):
    """Layers that have a neighbour, and one for each reason why not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(8, 8, 1) for _ in range(4))
        self.e, self.f, self.g, self.h = (nn.Conv2d(8, 8, 1) for _ in range(4))
        self.clip, self.shift = nn.ReLU6(), Shift2d(8, 3)
        self.fc, self.spare = nn.Linear(8, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.sigmoid(self.a(x)))
        x = self.c(x) + x
        x = self.e(self.clip(self.d(x)))
        x = torch.cat((self.f(self.clip(x)), x), 1)[:, :8]
        x = self.h(self.shift(F.relu(self.g(x))))
        x = F.adaptive_avg_pool2d(F.pad(x, (1, 1)), 1)
        return self.fc(x.view(x.size(0), -1))  # type: ignore[no-any-return]


def test_every_layer_without_a_neighbour_has_its_reason() -> None:
    model = uneven(Forks()).eval()
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    edit = equalize(model)
    torch.testing.assert_close(edit.model(x), expected, rtol=1e-4, atol=1e-4)
    assert edit.notes["pairs"] == ["g -> h", "h -> fc"]
    assert {site.name: site.why for site in edit.sites if site.after is None} == {
        "a": "`sigmoid` reads it, which does not let a scale through",
        "b": "c and `add` read its output",
        "c": "`add` reads it, which does not let a scale through",
        "d": "clip reads it, which clips at 6 in several places",
        "e": "clip and `cat` read its output",
        "f": "`cat` reads it, which does not let a scale through",
        "shift": "it only displaces its input: it has no weights to scale",
        "spare": "never reached by the forward pass",
        "clip": "it does not stand between two equalized layers",
    }


def test_patterns_and_parametrized_weights() -> None:
    def three() -> nn.Sequential:
        torch.manual_seed(0)
        return uneven(nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(3))))  # type: ignore[return-value]

    edit = equalize(three(), exclude=["2"])
    assert edit.notes["pairs"] == ["0 -> 1"]
    assert [site.why for site in edit.sites[1:]] == ["its outputs stay: 2 reads it: excluded by '2'", "excluded by '2'"]
    model = three()
    parametrize.register_parametrization(model[2], "weight", nn.Identity())
    assert "2 reads it: its weight is parametrized" in equalize(model).sites[1].why
    with pytest.raises(ConfigError, match="its ranges are those of 1 already"):
        equalize(equalize(three(), exclude=["2"]).model, exclude=["2"])
    with pytest.raises(ConfigError, match=r"`iterations` \(=0\) must be at least 1"):
        Equalize(iterations=0)


def test_absorbed_biases_change_nothing_where_everything_is_active() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    model = nn.Sequential(nn.Conv2d(8, 6, 1), norm, nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    model = warm(uneven(model), SHAPE)  # type: ignore[assignment]
    with torch.no_grad():
        norm.weight.fill_(0.1)
        norm.bias.copy_(torch.tensor([2.0, 3.0, 4.0, 0.2, 5.0, 6.0]))
    x = torch.randn(4, *SHAPE) * 0.3
    folded = model[0].weight.flatten(1).norm(dim=1) * 0.1 / (norm.running_var + norm.eps).sqrt()
    expected, plain = model(x), equalize(copy.deepcopy(model)).model
    edit = equalize(model, absorb=True)
    torch.testing.assert_close(edit.model(x), expected, rtol=1e-4, atol=1e-4)
    scale = folded / plain[0].weight.flatten(1).norm(dim=1)
    moved = (plain[0].bias - edit.model[0].bias) * scale
    torch.testing.assert_close(moved, torch.tensor([1.7, 2.7, 3.7, 0.0, 4.7, 5.7]), rtol=1e-4, atol=1e-4)
    assert edit.notes["absorbed"]["0"].startswith("5 of 6 channels")
    assert edit.notes["absorbed"]["3"] == "kept: no batch norm was folded into it, so its distribution is not known"
    padded = warm(nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)), SHAPE)
    assert equalize(padded, absorb=True).notes["absorbed"]["0"].startswith("kept: zeros are padded in front of 2")


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(-1)


def test_the_mean_over_positions_lets_scales_through() -> None:
    torch.manual_seed(0)
    model = uneven(nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), Mean(), nn.Linear(6, 3))).eval()
    x = torch.randn(2, *SHAPE)
    expected = model(x)
    edit = equalize(model)
    assert edit.notes["pairs"] == ["0 -> 3"]
    torch.testing.assert_close(edit.model(x), expected, rtol=1e-4, atol=1e-5)


def test_blocks_of_resnet20() -> None:
    edit = equalize(warm(resnet20()), (3, 16, 16))
    assert edit.notes["pairs"] == [f"layer{g}.{b}.conv1 -> layer{g}.{b}.conv2" for g in (1, 2, 3) for b in (0, 1, 2)]
    why = {site.name: site.why for site in edit.sites}
    assert why["layer1.0.conv2"].endswith("`add` in layer1.0 reads it, which does not let a scale through")


def test_a_mobilenet_is_one_chain_and_comes_back_from_its_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"classes": 3, "width": 0.25}
    model = warm(mobilenet_v1(**settings), (3, 32, 32))
    edit = equalize(model, (3, 32, 32))
    assert len(edit.notes["pairs"]) == 27 == len(edit.notes["channels_clipped"])
    path = tmp_path / "model.safetensors"
    build = ("compress.models.mobilenet_v1", settings)
    checkpoint.save(edit.model.eval(), path, build=build, input={}, provenance={}, results={})
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(checkpoint.load(path)(x), edit.model(x))
