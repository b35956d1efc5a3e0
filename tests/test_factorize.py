"""The stage that takes layers apart: ranks, budgets and fits inside whole networks."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from awkward import AWKWARD, SHAPE, noise_task
from torch import Tensor, nn

import compress.time_budget
from compress import checkpoint
from compress.constructors import named
from compress.errors import ConfigError
from compress.lowrank.decompose import vbmf_rank
from compress.lowrank.factors import Shape
from compress.lowrank.harm import harms
from compress.lowrank.ranks import Basis
from compress.measure import counted, profile
from compress.models import resnet20
from compress.models.weights import load_weights
from compress.nn.lowrank import LowRankConv2d, LowRankLinear
from compress.stages import Factorize, Quantize
from compress.surgery import layers
from compress.task import Task, Work


class Net(nn.Module):
    """Wide enough to have ranks; a grouped layer, linear ones on one axis and on two, activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 24, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.mid = nn.Conv2d(24, 32, 3, stride=2, padding=1, groups=2)
        self.tokens = nn.Linear(32, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.mid(self.relu(self.stem(x))))
        x = self.tokens(x.flatten(2).mT).relu()
        out: Tensor = self.head(x.mean(1))
        return out


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    model.eval()
    return model


def weights(model: nn.Module, name: str) -> int:
    return sum(p.numel() for n, p in model.get_submodule(name).named_parameters() if n.endswith("weight"))


@pytest.mark.parametrize("method", ["tucker", "svd", "spatial", "cp"])
@pytest.mark.parametrize("name", sorted(AWKWARD))
def test_every_layer_comes_smaller_or_is_kept_with_a_reason(name: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AWKWARD[name]().eval()
    before, shape = copy.deepcopy(model), model(torch.randn(2, *SHAPE)).shape
    edit = Factorize(method=method, ratio=0.6, images=16)(model, noise_task(), Work(tmp_path))
    assert edit.model(torch.randn(2, *SHAPE)).shape == shape
    for site in edit.sites:
        new = edit.model.get_submodule(site.name)
        assert (site.after is None) == bool(site.why) == isinstance(new, nn.Conv2d)
        if site.after is not None:
            assert weights(edit.model, site.name) <= 0.6 * weights(before, site.name)


@pytest.mark.parametrize("method", ["tucker", "svd", "spatial"])
@pytest.mark.parametrize("way", ["params", "macs", "bytes"])
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_a_budget_is_reached_but_for_one_step(net: Net, method: str, way: str, share: float, tmp_path: Path) -> None:
    task = noise_task()
    before = counted(net, task.example)[way]
    largest = {"params": 24 * 32 * 9 / 2, "macs": 24 * 8 * 9 * 99, "bytes": 4 * 24 * 32 * 9 / 2}[way]
    edit = Factorize(method=method, **{way: share}, images=16)(net, task, Work(tmp_path))  # type: ignore[arg-type]
    after = counted(edit.model, task.example)[way]
    assert share * before - 0.1 * largest <= after <= share * before
    assert edit.notes["requested"] == {way: share}
    assert edit.notes["achieved"][way] == pytest.approx(after / before, abs=1e-4)  # type: ignore[call-overload,index]


def test_a_budget_out_of_reach_names_the_closest(net: Net, tmp_path: Path) -> None:
    task = noise_task()
    # stem: a Tucker rank of 1 in and out, mid the same in both groups, linear layers of rank 1; and the biases
    lowest = (8 + 9 + 24) + 2 * (12 + 9 + 16) + (32 + 32) + (32 + 3) + (24 + 32 + 32 + 3)
    share = -(-1000 * lowest // sum(p.numel() for p in net.parameters())) / 1000
    with pytest.raises(ConfigError, match=rf"`params` \(=0.02\) must be at least {share}: the lowest ranks leave"):
        Factorize(params=0.02, images=16)(net, task, Work(tmp_path))
    edit = Factorize(params=share, images=16)(net, task, Work(tmp_path))
    assert edit.notes["ranks"] == {"stem": [1, 1], "mid": [1, 1], "tokens": [1], "head": [1]}


def test_a_latency_is_reached_by_steps_and_replayed(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def timed(models: dict[str, nn.Module], *_: object) -> dict[str, Any]:
        macs = {name: profile(model, task.example).macs for name, model in models.items()}
        asked.append(macs["after"] / macs["before"])
        return {name: SimpleNamespace(p50_ms=0.2 + 0.8 * count / macs["before"]) for name, count in macs.items()}

    task = noise_task()
    monkeypatch.setattr(compress.time_budget, "timed", timed)
    edit = Factorize(latency=0.77, images=16)(copy.deepcopy(net), task, Work(tmp_path))
    assert [round(share, 1) for share in asked] == [0.9, 0.8, 0.7]
    assert edit.notes["requested"] == {"latency": 0.77}
    assert edit.notes["latency"]["achieved"] == pytest.approx(0.2 + 0.8 * asked[-1], abs=1e-4)  # type: ignore[call-overload,index]
    assert profile(edit.model, task.example).macs / profile(net, task.example).macs == pytest.approx(asked[-1])
    Factorize(latency=0.77, images=16)(copy.deepcopy(net), task, Work(tmp_path))
    assert len(asked) == 3
    with pytest.raises(ConfigError, match=r"`latency` \(=0.1\) cannot be reached: .* of the time in onnxruntime"):
        Factorize(latency=0.1, images=16)(net, task, Work(tmp_path))


def test_first_order_harm_is_what_small_changes_do() -> None:
    """A network that is linear in its weights moves exactly so far, in the mean over random directions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    layer = model[0]
    assert isinstance(layer, nn.Conv2d)
    x = torch.randn(64, 6, 7, 7) * torch.arange(1, 7).view(1, 6, 1, 1)
    found = harms(model, {"0": layer}, "tucker", [x] * 20, seed=0)["0"]
    kernel = layer.weight.detach().double().flatten(2).permute(1, 2, 0)
    covariance = torch.einsum("nchw,ndhw->cd", x.double(), x.double())
    basis = Basis.of(kernel, Shape.of(layer, "tucker"), covariance)
    assert basis.first is not None and basis.last is not None
    with torch.no_grad():
        wanted = model(x)
        for first, last in ((1, 1), (3, 2), (2, 8), (6, 5)):
            cut = basis.first[:, :first], basis.core[:first, :, :last], basis.last[:, :last]
            new = torch.einsum("cr,rpt,st->cps", cut[0], cut[1], cut[2]).permute(2, 0, 1)
            changed = copy.deepcopy(model)
            changed[0].weight.copy_(new.reshape(layer.weight.shape))  # type: ignore[operator,union-attr]
            moved = changed(x) - wanted
            direct = float((moved - moved.mean(1, keepdim=True)).square().sum(1).mean())
            assert float(found[first - 1, last - 1]) == pytest.approx(direct, rel=0.15)
    assert float(found[-1, -1]) < 1e-9
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not layer._forward_hooks


def test_linear_layers_are_regressions_of_reduced_rank(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.stages.factorize.ROWS", 1000)  # all there are
    task = noise_task()
    before = copy.deepcopy(net)
    edit = Factorize(method="svd", ranks={"tokens": [5]}, ridge=0.0, images=32)(net, task, Work(tmp_path))
    new = edit.model.get_submodule("tokens")
    assert isinstance(new, LowRankLinear) and new.rank == 5
    assert {s.why for s in edit.sites if s.name != "tokens"} == {"no pattern of `ranks` matches it"}
    with torch.no_grad():
        images = torch.cat([x for x, _ in task.calibration])
        hidden = before.relu(before.mid(before.relu(before.stem(images)))).flatten(2).mT
        wanted, given = (layer(hidden).flatten(0, 1).double() for layer in (before.tokens, new))
    centred = wanted - wanted.mean(0)
    best = float(torch.linalg.svdvals(centred)[5:].square().sum())
    assert float((given - wanted).square().sum()) == pytest.approx(best, rel=1e-3)
    assert edit.notes["relative_error"]["tokens"] == pytest.approx(best / float(wanted.square().sum()), abs=1e-4)  # type: ignore[call-overload,index]


def test_energy_and_multiples(net: Net, tmp_path: Path) -> None:
    values = torch.linalg.svdvals(net.stem.weight.detach().double().flatten(1)).square()  # type: ignore[operator,union-attr]
    wanted = int((values.cumsum(0) < 0.6 * values.sum()).sum()) + 1
    for multiple, rank in ((1, wanted), (4, -(-wanted // 4) * 4)):
        settings: dict[str, Any] = {"method": "svd", "energy": 0.6, "multiple": multiple, "include": ["stem"]}
        edit = Factorize(**settings, refine=False)(copy.deepcopy(net), noise_task(), Work(tmp_path))
        assert edit.notes["ranks"] == {"stem": [8, rank]}


def test_a_layer_that_would_not_get_smaller_is_kept_with_the_figures(net: Net, tmp_path: Path) -> None:
    edit = Factorize(ranks={"stem": [8, 24], "mid": [3, 4]}, images=16)(net, noise_task(), Work(tmp_path))
    why = {site.name: site.why for site in edit.sites}
    assert why["stem"] == "rank 8+24 has no fewer weights: 1,728 -> 1,728" and not why["mid"]


def test_quantized_afterwards_saved_and_loaded(tmp_path: Path) -> None:
    build = ("compress.models.small", {"classes": 3, "channels": 2})
    task = noise_task((2, 8, 8))
    torch.manual_seed(0)
    model = named(build[0])(**build[1]).eval()
    model = Factorize(ratio=0.5, images=16, exclude=["conv1"])(model, task, Work(tmp_path)).model
    assert any(isinstance(m, LowRankConv2d) for m in model.modules())
    edit = Quantize(calibration_images=16)(model, task, Work(tmp_path))
    quantized = {site.name for site in edit.sites if site.after is not None}
    assert any(name.endswith("parts.core") for name in quantized)
    path = tmp_path / "model.safetensors"
    checkpoint.save(edit.model.eval(), path, build=build, input=task.input, provenance={}, results={})
    assert torch.equal(compress.load(path)(task.example), edit.model(task.example))


@pytest.fixture
def trained(data_root: Path) -> nn.Module:
    model = resnet20().eval()
    load_weights(model, data_root / "weights/resnet20-12fca82f.th")
    return model


def shrunk(model: nn.Module, task: Task, folder: Path, **settings: Any) -> tuple[float, dict[str, Any]]:
    """How many times smaller the 3x3 convolutions but the first become, and the ranks."""

    def size(model: nn.Module) -> int:
        return sum(p.numel() for n, p in model.named_parameters() if p.dim() == 4 and not n.startswith("conv1"))

    before = size(model)
    stage = Factorize(vbmf=True, exclude=["conv1", "linear"], refine=False, **settings)
    edit = stage(copy.deepcopy(model), task, Work(folder))
    return before / size(edit.model), dict(edit.notes["ranks"])  # type: ignore[arg-type]


def test_ranks_of_a_trained_network_by_variational_bayes(trained: nn.Module, tmp_path: Path) -> None:
    task = noise_task((3, 32, 32))
    smaller, ranks = shrunk(trained, task, tmp_path)
    assert ranks["layer3.1.conv1"] == [9, 6] and ranks["layer3.2.conv2"] == [21, 26]  # in, out
    assert smaller == pytest.approx(11.3, abs=0.3)
    smaller, ranks = shrunk(trained, task, tmp_path, weaken=0.8, min_rank=21)
    assert smaller == pytest.approx(2.97, abs=0.05) and len(ranks) == 12
    assert vbmf_rank(trained.linear.weight) == 0  # type: ignore[arg-type]
    why = Factorize(vbmf=True, refine=False)(trained, task, Work(tmp_path)).sites[-1].why
    assert why == "no singular value stands out of the noise"
    assert not any(isinstance(m, LowRankLinear) for m in layers(trained, (LowRankLinear,)).values())
