"""`Cluster`: which value each weight gets, what stays zero, what a file takes, which layers are kept."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from awkward import AWKWARD, SHAPE, noise_task
from random_task import quantize, task, warm
from torch import Tensor, nn
from torch.nn.utils import parametrize

import compress
from compress import checkpoint
from compress.errors import ConfigError, DataError
from compress.lower import lower
from compress.lower.fold import fold_batch_norm
from compress.models import resnet20, small
from compress.nn.clustered import ClusteredWeight, share_weight
from compress.nn.quantized import FakeQuantizeWeight
from compress.nn.shift import ShiftConv2d
from compress.stage import Edit
from compress.stages import Cluster, FineTune
from compress.task import Work

INPUT = {"order": "rgb", "size": [16, 16], "mean": [0.0, 0.0, 0.0]}


def cluster(model: nn.Module, **settings: object) -> Edit:
    return Cluster(**settings)(model, noise_task(), Work(Path()))  # type: ignore[arg-type]


def book(layer: nn.Module) -> ClusteredWeight:
    found = next(part for part in layer.modules() if isinstance(part, ClusteredWeight))
    return found


@pytest.mark.parametrize("settings", [{}, {"start": "density"}, {"iterations": 1}, {"bits": 1}, {"bits": 8}])
def test_every_weight_takes_the_nearest_of_the_values(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    before = layer.weight.detach().clone()
    edit = cluster(nn.Sequential(layer), **settings)
    values = book(layer).values().detach()
    assert len(values) == 2 ** int(settings.get("bits", 5))  # type: ignore[call-overload]  # a number
    distances = (before.unsqueeze(-1) - values).abs()
    torch.testing.assert_close((before - layer.weight).abs(), distances.amin(-1), rtol=0, atol=1e-7)
    share = float((before - layer.weight.detach()).square().sum() / before.square().sum())
    assert edit.notes["relative_error"]["0"] == pytest.approx(share, abs=1e-6)  # type: ignore[index,call-overload]
    index = layer.parametrizations.weight.original
    assert torch.equal(index, index.round()) and not index.requires_grad and index.amax() == len(values) - 1


def test_zeros_stay_zero_in_training() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 32)
    pruned = torch.rand(32, 32) < 0.9
    layer.weight.data[pruned] = 0
    assert cluster(nn.Sequential(layer), bits=3).sites[0].after == "8 shared weights, zero among them"
    assert torch.equal(layer.weight == 0, pruned) and book(layer).zero and len(book(layer).table) == 7
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        F.mse_loss(layer(torch.randn(8, 32)), torch.randn(8, 32)).backward()
        optimizer.step()
    assert not layer.weight[pruned].any() and not torch.equal(layer.weight, before)


class Mask(nn.Module):
    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_a_mask_stays_in_front_and_other_parametrizations_are_kept_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    kept = torch.rand(8, 8, 3, 3) < 0.5
    parametrize.register_parametrization(model[0], "weight", Mask(kept))
    parametrize.register_parametrization(model[2], "weight", Halved())
    warm(model, (8, 9, 9))
    before = model[0].weight.detach().clone()
    edit = cluster(model, bits=4)
    assert edit.sites[1].after is None and "indices do not pass unchanged" in edit.sites[1].why
    with pytest.raises(ValueError, match="weight computed by Halved, which indices do not pass unchanged"):
        share_weight(model[2], torch.linspace(-0.1, 0.1, 4))
    assert [type(part) for part in model[0].parametrizations.weight] == [Mask, ClusteredWeight]
    assert torch.equal(model[0].weight == 0, before == 0)
    assert float((model[0].weight.detach() - before).abs().max()) < 0.05
    x = torch.randn(2, 8, 9, 9)
    expected = model(x)
    assert fold_batch_norm(model) == [("0", "1")]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    fewer = model[0].parametrizations.weight[0].kept & (torch.rand(8, 8, 3, 3) < 0.5)
    model[0].parametrizations.weight[0].kept.copy_(fewer)
    assert not model[0].weight[~fewer].any()


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_convolutions(name: str) -> None:
    torch.manual_seed(0)
    model = AWKWARD[name]().eval()
    plain = copy.deepcopy(model)
    edit = cluster(model, bits=3)
    assert all(site.after or "too few" in site.why for site in edit.sites)
    for module, other in zip(
        (m for m in edit.model.modules() if isinstance(m, nn.Conv2d)),
        (m for m in plain.modules() if isinstance(m, nn.Conv2d)),
        strict=True,
    ):
        other.weight.data.copy_(module.weight.detach())
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(edit.model(x), plain(x))
    torch.testing.assert_close(lower(edit.model, "onnxruntime")(x), plain(x))


@pytest.mark.parametrize(("form", "int8"), [("packed", False), ("packed", True), ("training", True)])
def test_saved_and_loaded_bit_for_bit(form: str, int8: bool, tmp_path: Path) -> None:
    model = cluster(warm(small(channels=3)), linear_bits=3).model
    model = FineTune(epochs=1, lr=0.01)(model, task(), Work(tmp_path)).model
    if int8:
        model = quantize(model, tmp_path).model
    build = ("compress.models.small", {"classes": 10, "channels": 3})
    path = tmp_path / "model.safetensors"
    about = {"input": INPUT, "provenance": {}, "results": {}}
    checkpoint.save(model, path, build=build, form=form, **about)  # type: ignore[arg-type]
    loaded = compress.load(path)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), model.eval()(x))
    chain = loaded.conv1.parametrizations.weight
    assert [type(part) for part in chain] == [ClusteredWeight] + int8 * [FakeQuantizeWeight]
    assert chain[0].config() == model.conv1.parametrizations.weight[0].config()
    (tmp_path / "state.safetensors").unlink()
    trained = FineTune(epochs=1, lr=1e-3)(loaded, task(), Work(tmp_path)).model
    assert torch.equal(trained.conv1.parametrizations.weight.original, model.conv1.parametrizations.weight.original)
    assert not torch.equal(trained.conv1.weight, model.conv1.weight)


def written(model: nn.Module, path: Path) -> int:
    """Bytes of a checkpoint."""
    build = ("torch.nn.Conv2d", {"in_channels": 64, "out_channels": 64, "kernel_size": 3, "bias": False})
    return checkpoint.save(model, path, build=build, input={}, provenance={}, results={})


def test_a_file_holds_the_bits_of_the_indices(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3, bias=False)
    weights = layer.weight.numel()
    plain = copy.deepcopy(layer)
    layer = cluster(layer, bits=4).model
    assert written(layer, tmp_path / "clustered") < weights / 2 + 1500
    plain.weight.data[torch.rand_like(plain.weight) < 0.9] = 0
    pruned = cluster(plain, bits=4).model
    assert written(pruned, tmp_path / "pruned") < 0.1 * weights / 2 + weights / 8 + 1500  # values and a bitmap
    assert torch.equal(compress.load(tmp_path / "pruned").weight, pruned.weight)


def test_int8_follows_on_the_grid(tmp_path: Path) -> None:
    model = warm(resnet20())
    before = copy.deepcopy(model)
    cluster(model, bits=6)
    edit = quantize(model, tmp_path)
    assert edit.notes["batch_norms_folded"] == 19
    chain = edit.model.get_submodule("layer1.0.conv1").parametrizations.weight
    integers = chain[1].integers(chain())
    assert torch.equal(integers * chain[1].scale.view(-1, 1, 1, 1), chain())
    assert len(chain[0].values()) == 64
    x = torch.randn(8, 3, 16, 16)
    off = (edit.model(x) - before(x)).detach().std() / before(x).detach().std()
    assert float(off) < 0.2


def test_bits_by_pattern_kind_and_default(tmp_path: Path) -> None:
    model = resnet20()
    edit = cluster(model, bits=4, linear_bits=2, layers={"layer1.0*": 3, "layer1*": 6, "linear": 5}, exclude=["conv1"])
    entries = edit.notes["entries"]
    assert entries["layer1.0.conv2"] == 8 and entries["layer1.1.conv2"] == 64 and entries["layer3.0.conv1"] == 16  # type: ignore[index,call-overload]
    assert entries["linear"] == 32 and "conv1" not in entries  # type: ignore[index,call-overload,operator]
    assert cluster(resnet20(), linear_bits=2).notes["entries"]["linear"] == 4  # type: ignore[index,call-overload]
    (kept,) = [site for site in edit.sites if site.after is None]
    assert (kept.name, kept.before, kept.why) == ("conv1", "Conv2d(3, 16, 3x3)", "excluded by 'conv1'")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.own = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight = self.one.weight


def test_layers_that_are_kept_say_why() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 3))
    nn.init.zeros_(model[2].weight)
    sites = cluster(model).sites
    assert sites[0].after == "32 shared weights"
    assert sites[1].why == "its 32 weights are too few for a table of 32"
    assert sites[2].why == "all its weights are zero, and zeros stay zero in training; train it first"
    tied = Tied()
    before = tied.one.weight.clone()
    whys = {site.name: site.why for site in cluster(tied).sites}
    assert whys["one"] == whys["two"] == "it has a parameter that is another layer's too" and not whys["own"]
    assert torch.equal(tied.one.weight, before)


def test_one_bit_is_not_enough_beside_zeros() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
    model[0].weight.data[:, ::2] = 0
    model[1].weight.data.copy_(torch.where(model[1].weight > 0, 0.5, 0.0))
    before = [layer.weight.detach().clone() for layer in model]
    sites = cluster(model, bits=1).sites
    assert sites[0].why == "zero takes one of 2 values, which leaves a single one for all other weights; take `bits: 2`"
    assert [site.after for site in sites] == [None, "2 shared weights, zero among them", "2 shared weights"]
    assert torch.equal(model[0].weight, before[0]) and torch.equal(model[1].weight, before[1])
    with pytest.raises(ConfigError, match="would change nothing; every layer was kept: zero takes one of 2 values"):
        cluster(nn.Sequential(model[0]), bits=1)
    assert cluster(nn.Sequential(model[0]), bits=2).sites[0].after == "4 shared weights, zero among them"


def test_layers_of_ours_are_clustered_inside_after_settling() -> None:
    torch.manual_seed(0)
    layer = ShiftConv2d(8, 16, 3, 3, padding=1, learn=True)
    other = ShiftConv2d(16, 8, 3, 3, learn=True)
    layer.displacement.data[:, 1] = layer.displacement.data[:, 0]  # two copies meet
    model = nn.Sequential(layer, other)
    edit = cluster(model, bits=4, exclude=["1"])
    assert edit.sites[0].after == "16 shared weights, zero among them" and not layer.learn and other.learn
    assert parametrize.is_parametrized(layer.pointwise, "weight")
    layer.settle()
    x = torch.randn(2, 8, 9, 9)
    torch.testing.assert_close(lower(model, "onnxruntime")(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_mistakes_are_told() -> None:
    for settings, message in (
        ({"bits": 0}, r"`bits` \(=0\) must be between 1 and 8"),
        ({"linear_bits": 9}, r"`linear_bits` \(=9\) must be between 1 and 8"),
        ({"layers": {"fc*": 12}}, r"`layers.fc\*` \(=12\) must be between 1 and 8"),
        ({"start": "forgy"}, r"`start` \(='forgy'\) must be one of linear, density"),
        ({"iterations": 0}, r"`iterations` \(=0\) must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            Cluster(**settings)  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"`layers` has the pattern 'fc\*', which matches no layer; the layers are: 0\."
    ):
        cluster(nn.Sequential(nn.Linear(32, 32)), layers={"fc*": 4})
    with pytest.raises(ValueError, match=r"`entries` \(=1\) must be between 2 and 256"):
        ClusteredWeight(1, 4, 4, zero=True)
    with pytest.raises(ValueError, match=r"`channels` \(=0\) must be at least 1"):
        ClusteredWeight(4, 0, 4)
    broken = nn.Sequential(nn.Linear(32, 32))
    broken[0].weight.data[3, 4] = float("nan")
    with pytest.raises(DataError, match="the weights of `0` hold NaN or infinity"):
        cluster(broken)
    with pytest.raises(ConfigError, match="would change nothing"):
        cluster(nn.Sequential(nn.Linear(4, 4)))


def test_a_model_is_clustered_once_and_before_it_is_quantized(tmp_path: Path) -> None:
    model = cluster(warm(small(channels=3))).model
    with pytest.raises(ConfigError, match="the model is clustered already; keep one of the two"):
        cluster(model)
    with pytest.raises(ConfigError, match="the model is quantized already; put `Cluster` before `Quantize`"):
        cluster(quantize(warm(small(channels=3)), tmp_path).model)
