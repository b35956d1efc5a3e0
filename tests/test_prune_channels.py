"""Channels really removed: every structure they go through, what is computed afterwards, and the amounts."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from awkward import noise_task
from thin_nets import NETS, net, silence_odd_channels
from torch import Tensor, nn

import compress
from compress import checkpoint
from compress.errors import ConfigError
from compress.lower import export_onnx
from compress.measure import profile
from compress.models import resnet20, se_resnet20
from compress.nn.masked import mask_of
from compress.nn.shift import ShiftConv2d
from compress.stage import Edit
from compress.stages import Fire, Prune, PruneChannels, Quantize, Separable, Shift
from compress.task import Work

SHAPE = (2, 8, 8)


def thin(model: nn.Module, folder: Path, images: int = 32, **settings: Any) -> Edit:
    task = noise_task(SHAPE, images=images)
    return PruneChannels(**{"images": images, **settings})(model, task, Work(folder))


def answers(model: nn.Module, images: int = 32) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in noise_task(SHAPE, images=images).calibration])


@pytest.mark.parametrize("name", NETS)
def test_channels_that_are_zero_are_removed_without_a_trace(name: str, tmp_path: Path) -> None:
    model = net(name)
    silence_odd_channels(model)
    wanted, before = answers(model), profile(model, torch.randn(2, *SHAPE))
    for refit in (False, True):
        edit = thin(copy.deepcopy(model), tmp_path, macs=0.75, by="l1", allocation="uniform", refit=refit)
        torch.testing.assert_close(answers(edit.model), wanted, rtol=1e-3, atol=1e-4 if refit else 1e-5)
        after = profile(edit.model, torch.randn(2, *SHAPE))
        assert after.macs <= 0.75 * before.macs and after.params < before.params
        assert abs(edit.notes["macs"]["achieved"] - after.macs / before.macs) < 1e-4  # type: ignore[index,call-overload]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("amount", ["macs", "params", "bytes"])
def test_amounts_are_what_is_counted(name: str, amount: str, tmp_path: Path) -> None:
    model = net(name)

    def cost(model: nn.Module) -> int:
        if amount == "bytes":
            tensors = [t for t in model.state_dict().values() if t.dim()]
            return sum(t.numel() * t.element_size() for t in tensors)
        return int(getattr(profile(model, torch.randn(2, *SHAPE)), amount))

    before = cost(model)
    edit = thin(model, tmp_path, **{amount: 0.7, "by": "l2", "refit": False, "allocation": "uniform"})
    assert cost(edit.model) / before == pytest.approx(edit.notes[amount]["achieved"], abs=2e-3)  # type: ignore[index,call-overload]
    assert 0.5 < cost(edit.model) / before <= 0.7 + 2e-3


def test_widths_change_where_they_depend_on_each_other(tmp_path: Path) -> None:
    edit = thin(net("concatenated"), tmp_path, macs=0.5, allocation="uniform")
    model: Any = edit.model
    assert model.one.out_channels + model.three.out_channels == model.bn.num_features == model.last.in_channels < 20
    assert model.one.in_channels == model.three.in_channels == model.stem.out_channels < 8
    model = thin(net("gated"), tmp_path, macs=0.5, allocation="uniform").model
    assert model.conv1.out_channels == model.fc1.in_channels == model.fc2.out_channels == model.conv2.in_channels < 12
    model = thin(net("grouped"), tmp_path, macs=0.5, allocation="uniform").model
    assert model[0].out_channels == model[2].in_channels < 12 and model[2].groups == 2
    assert model[2].weight.shape[1] * 2 == model[2].in_channels and model[7].in_features == 16 * model[4].out_channels
    depthwise = [m for m in thin(net("mobile"), tmp_path, macs=0.6).model.modules() if getattr(m, "groups", 1) > 1]
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)


def test_sites_tell_what_was_kept_and_why(tmp_path: Path) -> None:
    task = noise_task((3, 16, 16))
    edit = PruneChannels(macs=0.7, images=16, exclude=["layer3.*"])(resnet20(3).eval(), task, Work(tmp_path))
    sites = {site.name: site for site in edit.sites}
    assert sites["layer1.0.conv1"].after is not None
    assert sites["conv1"].why == "a padded or cut shortcut ties 16 channels to 32 of layer2.0.conv2"
    assert sites["layer3.0.conv1"].why == "excluded by 'layer3.*'"
    assert sites["linear"].why == "its channels are the network's answers"
    edit = PruneChannels(macs=0.7, images=16)(se_resnet20(3, shortcut="conv").eval(), task, Work(tmp_path))
    assert (
        "SqueezeExcitation(16, reduction=16, largest=1) has no setting" in {s.name: s for s in edit.sites}["conv1"].why
    )


def test_multiple_and_floor(tmp_path: Path) -> None:
    edit = thin(net("residual"), tmp_path, macs=0.5, multiple=8, floor=8)
    widths = dict(edit.notes["channels"])  # type: ignore[call-overload]
    assert all(left % 8 == 0 and left >= 8 for left, _ in widths.values())
    for name, module in edit.model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels % 8 == 0, name
    with pytest.raises(ConfigError, match=r"`macs` \(=0.1\) cannot be reached: .* is left; that is the closest"):
        thin(net("residual"), tmp_path, macs=0.1, floor=0.8)


@pytest.mark.parametrize("name", NETS)
def test_what_is_refit_is_nearer_to_the_original(name: str, tmp_path: Path) -> None:
    model = net(name)
    wanted = answers(model, 64)
    off = {}
    for refit in (False, True):
        settings = {"macs": 0.7, "by": "l1", "allocation": "uniform", "images": 64, "refit": refit}
        off[refit] = float(
            (answers(thin(copy.deepcopy(model), tmp_path, **settings).model, 64) - wanted).square().sum()
        )
    assert off[True] < 0.7 * off[False]


def test_very_wide_readers_are_judged_by_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.channels.thinning.MOST_FEATURES", 10)
    model: Any = net("flat")
    x = torch.cat([x for x, _ in noise_task(SHAPE).calibration])
    with torch.no_grad():
        met = model[:5](x).square().mean(0) * model[6].weight.square().sum(0)
    kept = met.view(8, 9).sum(1).argsort()[2:].sort().values
    edit = thin(copy.deepcopy(model), tmp_path, macs=0.9, include=["0"], floor=6, multiple=6)
    assert torch.equal(edit.model[0].weight, model[0].weight[kept])  # type: ignore[index]


def test_by_reconstruction_a_copy_of_a_channel_goes_first(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = model[0].weight[1], model[0].bias[1]  # type: ignore[index,operator]
    wanted = answers(model)
    edit = thin(model, tmp_path, macs=0.95, include=["0"], ridge=1e-9)
    assert edit.model[0].out_channels == 5  # type: ignore[index]
    torch.testing.assert_close(answers(edit.model), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("by", ["l1", "l2", "bn", "fpgm", "taylor"])
def test_scores_by_hand(by: str, tmp_path: Path) -> None:
    model = net("residual")
    block: Any = model.layer1[0]  # type: ignore[index]
    if by == "taylor":  # Molchanov et al.: squared for each of the batches, of which there are two
        score, batches = torch.zeros(24), list(noise_task(SHAPE).calibration)
        assert len(batches) == 2
        for x, y in batches:
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            score += (block.conv1.weight.detach() * block.conv1.weight.grad).sum((1, 2, 3)).square()
        model.zero_grad()
    elif by == "bn":
        score = block.bn1.weight.abs()
    elif by == "fpgm":
        flat = block.conv1.weight.flatten(1)
        score = (flat.unsqueeze(0) - flat.unsqueeze(1)).norm(dim=2).sum(1)
    else:
        score = block.conv1.weight.flatten(1).norm(p=int(by[1]), dim=1)
    kept_scale = block.bn1.weight.detach()[score.detach().argsort()[6:].sort().values]
    edit = thin(model, tmp_path, macs=0.97, by=by, refit=False, include=["layer1.0.conv1"], multiple=6, floor=18)
    assert edit.notes["channels"] == {"layer1.0.conv1": [18, 24]}
    assert torch.equal(edit.model.layer1[0].bn1.weight, kept_scale)  # type: ignore[index,union-attr]


class SharedNorm(nn.Module):
    """One batch norm behind two convolutions, of which one reads channels that can go."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.other, self.norm, self.linear = nn.Conv2d(2, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.norm(self.conv2(self.conv1(x).relu())), self.norm(self.other(x))
        out: Tensor = self.linear((one.relu() + other.relu()).mean((2, 3)))
        return out


def test_a_norm_that_another_branch_calls_too_keeps_its_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = SharedNorm().eval()
    before = copy.deepcopy(model.norm.state_dict())
    edit = thin(model, tmp_path, macs=0.8, include=["conv1"])
    assert edit.model.conv1.out_channels < 12
    for name, tensor in edit.model.norm.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("shift", ["Shift2d", "ShiftConv2d"])
def test_networks_in_float64(shift: str, tmp_path: Path) -> None:
    task = noise_task(SHAPE)
    model = net("shifted" if shift == "Shift2d" else "residual")
    if shift == "ShiftConv2d":
        model = Shift(taps=3, images=16, include=["layer1*"])(model, task, Work(tmp_path)).model
    assert shift in {type(module).__name__ for module in model.modules()}
    batches: Any = task.calibration
    batches.x = batches.x.double()
    task = replace(task, example=task.example.double())
    edit = PruneChannels(macs=0.7, images=16)(model.double(), task, Work(tmp_path))
    assert edit.model(task.example).dtype == torch.float64
    assert edit.notes["macs"]["achieved"] <= 0.7  # type: ignore[index,call-overload,operator]


def test_masks_stay_on_what_is_left(tmp_path: Path) -> None:
    task = noise_task(SHAPE)
    model = Prune(amount=0.5, images=16, include=["layer1*"])(net("residual"), task, Work(tmp_path)).model
    edit = thin(model, tmp_path, macs=0.7)
    layer: Any = edit.model.layer1[0].conv2  # type: ignore[index,union-attr]
    mask = mask_of(layer)
    assert mask is not None and mask.mask.shape == layer.weight.shape
    assert 0.3 < float((layer.weight == 0).float().mean()) < 0.7
    assert bool((layer.weight[~mask.mask] == 0).all())


def test_layers_of_ours(tmp_path: Path) -> None:
    task = noise_task(SHAPE)
    model = Shift(taps=3, images=16, include=["layer1*"])(net("residual"), task, Work(tmp_path)).model
    before = profile(model, task.example)
    edit = thin(model, tmp_path, macs=0.6, allocation="uniform")
    layer: Any = edit.model.layer1[0].conv2  # type: ignore[index,union-attr]
    assert type(layer) is ShiftConv2d and layer.in_channels == len(layer.displacement) < 24
    assert profile(edit.model, task.example).macs <= 0.6 * before.macs
    masked = Prune(amount=0.5, images=16, include=["layer1*"])(edit.model, task, Work(tmp_path)).model
    layer = thin(masked, tmp_path, macs=0.8, allocation="uniform").model.layer1[0].conv2  # type: ignore[index,union-attr]
    mask: Any = mask_of(layer.pointwise)
    assert mask.mask.shape == layer.pointwise.weight.shape and layer.in_channels == len(layer.displacement)
    for stage in (Fire(images=16, include=["layer1*"]), Separable(images=16, include=["layer1*"])):
        model = stage(net("residual"), task, Work(tmp_path)).model
        edit = thin(model, tmp_path, macs=0.9)
        path = tmp_path / "model.safetensors"
        build = ("compress.models.small", {"classes": 3, "channels": 2})
        checkpoint.save(edit.model, path, build=build, input=task.input, provenance={}, results={})
        assert torch.equal(compress.load(path)(task.example), edit.model.eval()(task.example))


def test_another_process_loads_the_same(tmp_path: Path) -> None:
    for name, factory in NETS.items():
        model = thin(net(name), tmp_path, macs=0.7, allocation="uniform").model
        build = (f"thin_nets.{factory.__name__}", {})
        path = tmp_path / f"{name}.safetensors"
        checkpoint.save(model, path, build=build, input=noise_task(SHAPE).input, provenance={}, results={})
        torch.save(answers(model), tmp_path / f"{name}.pt")
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
torch.set_num_threads({torch.get_num_threads()})
import compress
from awkward import noise_task
for name in {list(NETS)}:
    model = compress.load({str(tmp_path)!r} + f"/{{name}}.safetensors", allow=["thin_nets"])
    with torch.no_grad():
        got = torch.cat([model(x) for x, _ in noise_task({SHAPE}).calibration])
    print(torch.equal(got, torch.load({str(tmp_path)!r} + f"/{{name}}.pt")), "torch_pruning" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"] * len(NETS)


@pytest.mark.parametrize("name", ["concatenated", "grouped"])
def test_it_exports_and_is_quantized(name: str, tmp_path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model, task = thin(net(name), tmp_path, macs=0.7, allocation="uniform").model, noise_task(SHAPE)
    export_onnx(model, task.example, tmp_path / "model.onnx", input={}, target="onnxruntime")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: task.example.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(task.example).detach(), rtol=1e-4, atol=1e-5)
    assert Quantize(calibration_images=16)(model, task, Work(tmp_path)).model(task.example).shape == (2, 3)
