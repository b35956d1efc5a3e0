"""What `PruneChannels` refuses, what it keeps, and its search for a latency."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import Twice, noise_task
from thin_nets import net
from torch import Tensor, nn

import compress.time_budget
from compress.channels.unread import without_unread
from compress.errors import ConfigError
from compress.measure import profile
from compress.nn.shift import ShiftConv2d
from compress.stage import ORDER
from compress.stages import Cluster, PruneChannels
from compress.task import Work

TASK = noise_task((2, 8, 8))


def thin(model: nn.Module, folder: Path, **settings: Any) -> Any:
    return PruneChannels(**{"images": 16, "macs": 0.7, **settings})(model.eval(), TASK, Work(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of `macs`, `params`, `bytes`, `latency` must be given, not 0"),
        ({"macs": 0.5, "bytes": 0.5}, "must be given, not 2"),
        ({"macs": 1.5}, r"`macs` \(=1.5\) must be the share to come down to, between 0 and 1"),
        ({"params": -0.5}, r"`params` \(=-0.5\) must be the share"),
        ({"macs": 0.5, "by": "size"}, r"`by` \(='size'\) must be one of reconstruction, l1"),
        ({"macs": 0.5, "allocation": "fair"}, r"`allocation` \(='fair'\) must be one of sensitivity, uniform"),
        ({"macs": 0.5, "multiple": 0}, r"`multiple` \(=0\) must be at least 1"),
        ({"macs": 0.5, "floor": -1.0}, r"`floor` \(=-1.0\) must be a finite number"),
        ({"macs": 0.5, "ridge": float("nan")}, r"`ridge` \(=nan\) must be a finite number"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneChannels(**settings)


def test_bn_needs_a_batch_norm(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`by` \(='bn'\) finds nothing to go by in the channels of 0"):
        thin(net("grouped"), tmp_path, by="bn")


class Switching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mean((2, 3))
        out: Tensor = self.linear(x if x.sum() > 0 else -x)
        return out


class Reshaped(nn.Module):
    """Counts on 8 channels in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(F.relu(self.conv(x)).reshape(-1, 8, 36).mean(2))
        return out


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8)
        self.conv2, self.linear = nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(F.relu(self.conv2(F.relu(self.norm(self.conv1(x))))).mean((2, 3)))
        return out


class Silent(nn.Module):
    """Leaves autograd, where no graph follows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.conv(x).relu().numpy())


def inside(module: nn.Module) -> nn.Module:
    """A network of which the module is `1.odd`."""
    return nn.Sequential(nn.Identity(), nn.Sequential(OrderedDict(first=nn.Identity(), odd=module)), nn.Identity())


def test_networks_that_cannot_be_followed(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot be traced \(TraceError: .*\); .*`Prune` takes single weights and works"
    ):
        thin(Switching(), tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be traced \(TraceError: .*, in `1.odd`\); `PruneChannels` follows"):
        thin(inside(Switching()), tmp_path)
    said = (
        r"the channels of Sequential cannot be followed through its forward pass \(RuntimeError: Can't call numpy\(\) "
        r"on Tensor that requires grad. .*, in `1.odd`\); what works without: `Prune` \(single weights\), `Factorize`"
    )
    with pytest.raises(ConfigError, match=said):
        thin(inside(Silent()), tmp_path)
    with pytest.raises(ConfigError, match=r"does not run .* counts on a fixed width; put conv into `exclude`"):
        thin(Reshaped(), tmp_path)


class Hidden(nn.Module):
    """Puts the channels of a convolution where the graph sees none of them, and answers in small numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.linear = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        out: Tensor = self.linear(F.relu(self.conv2(x)).mean((2, 3))) * 1e-4
        return out + 1e-5 * x.detach().mean((1, 2, 3)).unsqueeze(1)


def test_small_answers_that_change_are_changed_answers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"changed the answers by .*e-\d+: some of them are read in a way"):
        thin(Hidden(), tmp_path, by="l1", allocation="uniform", refit=False, include=["conv1"])


def test_layers_that_stay_say_why(tmp_path: Path) -> None:
    sites = {site.name: site for site in thin(Normed(), tmp_path).sites}
    assert sites["conv1"].after is None
    assert sites["conv1"].why.startswith("GroupNorm(2, 8,") and sites["conv1"].why.endswith(
        "of no kind that can be thinned"
    )
    assert sites["conv2"].after is not None
    model = nn.Sequential(nn.Conv2d(2, 8, 3), Twice(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 3))
    sites = {site.name: site for site in thin(model, tmp_path, macs=0.95).sites}
    assert sites["1.conv"].why == "1.conv is called 2 times in a forward pass"
    assert sites["2"].after == f"Conv2d(8, {model[2].out_channels}, 3x3)"
    said = r"closest. These keep all their channels: 0 \(1.conv is called 2 times in a forward pass\), 1.conv \("
    with pytest.raises(ConfigError, match=said):
        thin(model, tmp_path, macs=0.1)
    with pytest.raises(ConfigError, match=r"the stage would change nothing.*the network's answers"):
        thin(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), tmp_path)


class Beside(nn.Module):
    """The image meets what a convolution makes of it: added, as such or through a depthwise layer, or side by side."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.depthwise = how, nn.Conv2d(2, 2, 3, padding=1, groups=2)
        self.conv = nn.Conv2d(2, 6 if how == "cat" else 2, 3, padding=1)
        self.last, self.linear = nn.Conv2d(8 if how == "cat" else 2, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "cat":
            x = torch.cat((x, self.conv(x)), 1)
        else:
            x = (x if self.how == "add" else self.depthwise(x)) + self.conv(x)
        out: Tensor = self.linear(F.relu(self.last(x)).mean((2, 3)))
        return out


def test_the_images_own_channels_stay(tmp_path: Path) -> None:
    answers = (nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))
    first = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.ReLU(inplace=True), nn.Conv2d(2, 8, 1), *answers)
    for model, names in ((first, "0"), (Beside("add"), "conv"), (Beside("depthwise"), "conv depthwise")):
        edit = thin(model, tmp_path, by="l1", allocation="uniform")
        for name in names.split():
            assert {site.name: site.why for site in edit.sites}[name] == "its channels are the network's input"
        assert profile(edit.model, TASK.example).macs < profile(Beside("add"), TASK.example).macs
        assert edit.model(TASK.example).shape == (2, 3)


def test_beside_the_image_the_right_channels_go(tmp_path: Path) -> None:
    model = Beside("cat")
    with torch.no_grad():
        model.conv.weight[4:], model.conv.bias[4:] = 0, 0  # type: ignore[index]  # it has one
    wanted = model(TASK.example).detach()
    edit = thin(model, tmp_path, macs=0.9, by="l1", allocation="uniform", refit=False, include=["conv"])
    assert edit.model.conv.out_channels in (4, 5)
    torch.testing.assert_close(edit.model(TASK.example), wanted)


def test_channels_of_the_image_that_nothing_reads_stay() -> None:
    shift = ShiftConv2d(2, 8, 3, 2)
    with torch.no_grad():
        shift.pointwise.weight[:, : shift.pointwise.in_channels // 2] = 0  # the copies of the first channel
    model = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), shift, nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).eval()
    thin, widths, kept = without_unread(model, ["1"], {}, TASK.example)
    assert thin is model and not widths
    assert kept == {"1": "1 of 2 input channels that it does not read stay: its channels are the network's input"}


def test_other_ways_to_compute_weights_are_refused(tmp_path: Path) -> None:
    model = Cluster(bits=4)(net("residual"), TASK, Work(tmp_path)).model
    with pytest.raises(ConfigError, match="has weights that are computed from others"):
        thin(model, tmp_path)
    assert ORDER["cluster"]["channels"] and ORDER["quantize"]["channels"] and not ORDER["prune"]["channels"]


def test_a_latency_is_reached_by_steps_and_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def timed(models: dict[str, nn.Module], *_: object) -> dict[str, Any]:
        macs = {name: profile(model, TASK.example).macs for name, model in models.items()}
        asked.append(macs["after"] / macs["before"])
        return {name: SimpleNamespace(p50_ms=0.2 + 0.8 * count / macs["before"]) for name, count in macs.items()}

    monkeypatch.setattr(compress.time_budget, "timed", timed)
    settings = {"macs": 0.0, "latency": 0.77, "by": "l1", "allocation": "uniform", "refit": False}
    edit = thin(net("residual"), tmp_path, **settings)
    assert [round(share, 1) for share in asked] == [0.9, 0.8, 0.7]
    assert edit.notes["latency"]["requested"] == 0.77 and 0.7 < edit.notes["latency"]["achieved"] <= 0.77
    assert len(json.loads((tmp_path / "latency.json").read_text())) == 3
    again = thin(net("residual"), tmp_path, **settings)
    assert len(asked) == 3
    torch.testing.assert_close(again.model(TASK.example), edit.model(TASK.example))
    with pytest.raises(ConfigError, match=r"`latency` \(=0.1\) cannot be reached: .* of the time in onnxruntime"):
        thin(net("residual"), tmp_path, **{**settings, "latency": 0.1})
