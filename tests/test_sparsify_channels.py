"""Training that empties channels: the penalty against its formula, what it does to a network, killed and resumed."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from awkward import noise_task
from test_prune_channels_refused import Normed
from test_train import Breaks, Killed, state
from thin_nets import net
from torch import Tensor, nn

from compress.channels.groups import MAKERS, removable
from compress.channels.lasso import ChannelLasso
from compress.errors import ConfigError, TrainingError
from compress.nn.masked import mask_of
from compress.nn.shift import ShiftConv2d
from compress.stage import ORDER, Edit
from compress.stages import FineTune, FoldBatchNorm, Prune, PruneChannels, Quantize, SparsifyChannels
from compress.surgery import layers
from compress.task import Work

TASK = noise_task((2, 8, 8), apart=3.0)


class Coupled(nn.Module):
    """A residual connection ties the channels of two convolutions, each with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 3)
        for number, norm in enumerate((self.bn0, self.bn1, self.bn2)):
            torch.manual_seed(number)
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x))
        x = x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out: Tensor = self.linear(F.relu(x).mean((2, 3)))
        return out


def sparsify(model: nn.Module, folder: Path, **settings: Any) -> Edit:
    folder.mkdir(exist_ok=True)
    return SparsifyChannels(**{"epochs": 1, "lr": 0.01, **settings})(model.eval(), TASK, Work(folder, lineage="k"))


def lasso(model: nn.Module, l1: float) -> ChannelLasso:
    found = layers(model, MAKERS)
    groups, _ = removable(model.eval(), found, dict.fromkeys(found, ""), TASK.example)
    return ChannelLasso(model, [group for group in groups if not group.undone], l1)


def length(*parts: Tensor) -> float:
    """The root of the sum of all squares in these."""
    return math.sqrt(sum(float(part.detach().double().square().sum()) for part in parts))


def test_coupled_channels_share_one_group_over_their_norms() -> None:
    model = Coupled()
    wanted = sum(length(model.bn0.weight[u], model.bn2.weight[u]) for u in range(4))
    wanted += sum(length(model.bn1.weight[u]) for u in range(3))
    penalty = lasso(model, 0.3).penalty()
    assert float(penalty.detach()) == pytest.approx(0.3 * wanted, rel=1e-5)
    penalty.backward()  # type: ignore[no-untyped-call]  # untyped in torch
    for u in range(4):
        own = 0.3 * float(model.bn2.weight[u].detach()) / length(model.bn0.weight[u], model.bn2.weight[u])
        assert model.bn2.weight.grad is not None and float(model.bn2.weight.grad[u]) == pytest.approx(own, rel=1e-5)
    assert model.stem.weight.grad is None and model.bn0.bias.grad is None


def test_a_scale_of_zero_has_a_finite_gradient() -> None:
    model = Coupled()
    nn.init.zeros_(model.bn1.weight)
    lasso(model, 1.0).penalty().backward()  # type: ignore[no-untyped-call]  # untyped in torch
    assert model.bn1.weight.grad is not None and torch.equal(model.bn1.weight.grad, torch.zeros(3))


def shifted() -> nn.Module:
    first = (ShiftConv2d(2, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU())
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("name", ["grouped", "gated", "concatenated", "flat", "shifted"])
def test_without_batch_norm_the_weights_that_make_a_unit_count(name: str) -> None:
    model: Any = shifted() if name == "shifted" else net(name)
    if name == "grouped":
        both = [length(model[i].weight[u], model[i].weight[u + 6]) for i in (0, 2) for u in range(6)]
        wanted = sum(both) + sum(length(row) for row in model[4].weight)
    elif name == "gated":
        wanted = sum(length(model.conv1.weight[u], model.fc2.weight[u]) for u in range(12))
        wanted += sum(length(row) for layer in (model.fc1, model.conv2) for row in layer.weight)
    elif name == "concatenated":
        wanted = float(model.bn.weight.detach().abs().sum()) + sum(
            length(u) for x in (model.stem, model.last) for u in x.weight
        )
    elif name == "flat":
        wanted = float(model[1].weight.detach().abs().sum()) + sum(length(row) for row in model[6].weight)
    else:
        wanted = sum(length(row) for row in model[0].pointwise.weight)  # the scaleless norm makes good for model[2]
    assert float(lasso(model, 2.0).penalty().detach()) == pytest.approx(2 * wanted, rel=1e-5)


def test_the_images_own_channels_do_not_shrink(tmp_path: Path) -> None:
    first = (nn.Conv2d(2, 2, 3, groups=2), nn.ReLU(), nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Flatten())
    sites = {s.name: s for s in sparsify(nn.Sequential(*first, nn.Linear(288, 3)), tmp_path).sites}
    assert sites["0"].why == "its channels are the network's input" and sites["2"].after is not None


def test_what_went_wrong_is_named_as_in_the_model(tmp_path: Path) -> None:
    task = noise_task((2, 8, 8), images=8)  # one step
    with pytest.raises(TrainingError, match=r"^`conv1.weight` is no longer finite after epoch 1, step 1"):
        SparsifyChannels(epochs=1, lr=1e45, warmup_epochs=0.0)(net("residual"), task, Work(tmp_path, lineage="k"))


def test_scales_fall_at_the_pace_that_the_card_says(tmp_path: Path) -> None:
    model = Coupled()
    nn.init.zeros_(model.linear.weight)
    model.linear.requires_grad_(False)  # the images have no say then
    before = copy.deepcopy(model)
    settings = {"lr": 0.1, "l1": 1.0, "momentum": 0.0, "warmup_epochs": 0.0}
    after: Any = sparsify(model, tmp_path, **settings).model
    # Two steps, the second at half the rate.
    torch.testing.assert_close(after.bn1.weight, before.bn1.weight - 0.1 * 1.5)
    for u in range(4):
        was, now = ((m.bn0.weight[u].detach(), m.bn2.weight[u].detach()) for m in (before, after))
        assert length(*now) == pytest.approx(length(*was) - 0.1 * 1.5, rel=1e-4)
        assert float(now[0] / now[1]) == pytest.approx(float(was[0] / was[1]), rel=1e-4)


def test_with_next_to_no_pull_it_trains_as_fine_tune_does(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    settings: dict[str, Any] = {"epochs": 2, "lr": 0.05, "clip": 1.0}
    plain: Any = FineTune(**settings)(net("residual"), TASK, Work(tmp_path / "a", lineage="k"))
    pulled: Any = sparsify(net("residual"), tmp_path / "b", l1=1e-30, **settings)
    assert state(pulled.model) == state(plain.model)
    assert [r["lr"] for r in pulled.notes["history"]] == [r["lr"] for r in plain.notes["history"]]


def test_what_is_emptied_is_what_prune_channels_takes(tmp_path: Path) -> None:
    edits = {l1: sparsify(net("residual"), tmp_path / str(l1), epochs=30, lr=0.05, l1=l1) for l1 in (1e-9, 0.1)}
    start: Any = net("residual")
    off = {}
    for l1, edit in edits.items():
        model: Any = copy.deepcopy(edit.model)
        sizes = model.layer1[0].bn1.weight.detach().abs()
        bound = 0.01 * start.layer1[0].bn1.weight.detach().median()
        told: Any = edit.notes["near_zero"]
        assert told["layer1.0.conv1"] == {"before": 0, "after": int((sizes <= bound).sum()), "of": 24}
        assert (told["layer1.0.conv1"]["after"] > 12) == (l1 > 1e-9)
        smallest, silent = sizes.argsort(stable=True), copy.deepcopy(model)
        with torch.no_grad():
            silent.layer1[0].bn1.weight[smallest[:12]] = 0
            off[l1] = float((silent(TASK.example) - model(TASK.example)).norm() / model(TASK.example).norm())
        settings: dict[str, Any] = {"by": "bn", "allocation": "uniform", "refit": False, "images": 16}
        thin: Any = PruneChannels(macs=0.5, **settings)(copy.deepcopy(model), TASK, Work(tmp_path)).model
        kept = smallest[24 - thin.layer1[0].bn1.num_features :].sort().values
        assert torch.equal(thin.layer1[0].bn1.weight, model.layer1[0].bn1.weight[kept])
    assert off[0.1] < 0.05 * off[1e-9]


@pytest.mark.parametrize("settings", [{}, {"average": 0.9, "optimizer": "adamw"}, {"keep": "best"}])
@pytest.mark.parametrize("name", ["residual", "flat"])
def test_killed_and_resumed_ends_in_the_same_bytes(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = net(name)
    names = [name for name, _ in model.named_modules()]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    stage, work = SparsifyChannels(epochs=3, lr=0.01, l1=0.01, **settings), Work(tmp_path / "b", lineage="k")
    whole = stage(copy.deepcopy(model), TASK, Work(tmp_path / "a", lineage="k"))
    broken = copy.deepcopy(model)
    with pytest.raises(Killed):
        stage(broken, replace(TASK, train=Breaks(TASK.train, 2)), work)
    again = stage(copy.deepcopy(model), TASK, work)
    assert state(again.model) == state(whole.model) and again.sites == whole.sites
    assert again.notes["near_zero"] == whole.notes["near_zero"]
    assert [[name for name, _ in m.named_modules()] for m in (broken, again.model)] == [names, names]
    assert list(again.model.state_dict()) == list(model.state_dict()) and not again.model.training


def test_masked_and_folded_weights_shrink_too(tmp_path: Path) -> None:
    model: Any = FoldBatchNorm()(net("flat"), TASK, Work(tmp_path)).model
    model = Prune(amount=0.5, images=16)(model, TASK, Work(tmp_path)).model
    zeros = model[0].weight == 0
    before = sum(length(row) for row in (*model[0].weight, *model[6].weight))
    assert float(lasso(model, 1.0).penalty().detach()) == pytest.approx(before, rel=1e-3)
    twin = copy.deepcopy(model)
    after: Any = sparsify(model, tmp_path, l1=0.5).model
    assert mask_of(after[0]) is not None and torch.equal(after[0].weight == 0, zeros)
    assert sum(length(row) for row in (*after[0].weight, *after[6].weight)) < 0.99 * before
    PruneChannels(macs=0.8, images=16)(after, TASK, Work(tmp_path))
    assert twin(TASK.example).shape == (2, 3)  # what is baked in one copy stays as it was in another


def test_sites_say_what_was_emptied_or_why_not(tmp_path: Path) -> None:
    sites = {site.name: site for site in sparsify(net("residual"), tmp_path, exclude=["layer2.0.shortcut.0"]).sites}
    assert sites["conv1"].after == "Conv2d(2, 24, 3x3), 0 of 24 channels near zero"
    assert sites["layer2.0.shortcut.0"].why == "excluded by 'layer2.0.shortcut.0'"
    assert sites["layer2.0.conv2"].why.startswith("its channels go with those of a layer that is left out")
    assert sites["linear"].why == "its channels are the network's answers"
    sites = {site.name: site for site in sparsify(Normed(), tmp_path / "normed").sites}
    assert sites["conv1"].why.endswith("of no kind that can be thinned") and sites["conv2"].after is not None
    model = Coupled()
    model.bn1.requires_grad_(False)
    sites = {site.name: site for site in sparsify(model, tmp_path / "frozen").sites}
    assert sites["conv1"].why == "nothing that trains scales its channels" and sites["conv2"].after is not None


class Untold(nn.Module):
    """Computes where no graph can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(torch.from_numpy(self.conv(x).numpy()).mean((2, 3)))
        return out


def test_models_that_it_cannot_take(tmp_path: Path) -> None:
    quantized = Quantize(calibration_images=16)(net("residual"), TASK, Work(tmp_path)).model
    with pytest.raises(ConfigError, match=r"the model is quantized.*before `Quantize`"):
        sparsify(quantized, tmp_path)
    assert ORDER["quantize"]["channels"] and not ORDER["channels"]["quantize"] and not ORDER["prune"]["channels"]
    with pytest.raises(ConfigError, match=r"the stage would change nothing.*the network's answers"):
        sparsify(nn.Sequential(nn.Flatten(), nn.Linear(128, 3)), tmp_path)
    with pytest.raises(
        ConfigError, match=r"the channels of Sequential cannot be followed.*, in `0`\).*`Prune` \(single weights\)"
    ):
        sparsify(nn.Sequential(Untold()), tmp_path)
    with pytest.raises(ConfigError, match=r"`include` has the pattern 'conv9', which matches no layer"):
        sparsify(net("residual"), tmp_path, include=["conv9"])


@pytest.mark.parametrize("l1", [0.0, -1.0, math.inf, math.nan])
def test_a_pull_that_is_none(l1: float) -> None:
    with pytest.raises(ConfigError, match=rf"`l1` \(={l1}\) must be a finite number above 0"):
        SparsifyChannels(l1=l1)


def test_training_is_set_as_for_fine_tune() -> None:
    own = asdict(SparsifyChannels())
    falls = own["l1"] * own["lr"] * 390 * own["epochs"] / (2 * (1 - own["momentum"]))
    assert falls == pytest.approx(1, rel=0.05)  # as the card says; scales are about 1
    assert list(own)[-3:] == ["l1", "include", "exclude"]
    assert list(own.items())[:-3] == list(asdict(FineTune()).items())
    with pytest.raises(ConfigError, match=r"`lr` \(=0.0\) must be above 0.\n`l1` \(=0.0\) must be"):
        SparsifyChannels(lr=0.0, l1=0.0)
