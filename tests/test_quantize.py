"""Low precision: the grids, the places, batch norm folding, and the stage."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from random_task import quantize, task, warm
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.data import cifar10, make_task
from compress.errors import ConfigError, DataError
from compress.models import resnet20, small
from compress.models.weights import load_weights
from compress.nn.places import place_quantizers, quantizer_places, trace
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight
from compress.nn.shift import ShiftConv2d
from compress.stages.finetune import FineTune
from compress.stages.quantize import Quantize
from compress.task import Work


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_scale_times_integer_and_come_back_the_same(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 8, 3, 3) * torch.logspace(-4, 2, 16).view(-1, 1, 1, 1)
    grid = FakeQuantizeWeight(bits, 16)
    quantized = grid(weight)
    grid.eval()
    integers = grid.integers(weight)
    limit = 2 ** (bits - 1) - 1
    scale = weight.abs().amax((1, 2, 3)) / limit
    kept = scale > scale.max() * 2.0**-12  # smaller channels share the smallest scale
    torch.testing.assert_close(grid.scale[kept], scale[kept])
    again = integers.float() * grid.scale.view(-1, 1, 1, 1)
    assert torch.equal(again, quantized)
    assert torch.equal(grid.integers(again), integers) and torch.equal(grid(again), again)
    assert int(integers.min()) >= -limit and int(integers.max()) == limit
    assert float((quantized - weight).abs().amax() / grid.scale.max()) <= 0.5001


def test_a_channel_of_zeros_keeps_a_usable_scale() -> None:
    weight = torch.zeros(2, 3, 1, 1)
    grid = FakeQuantizeWeight(8, 2)
    assert not grid(weight).any() and bool((grid.scale > 0).all())
    weight[1] = 1.0
    assert not grid(weight)[0].any() and float(grid.scale[0]) == pytest.approx(2**-12 / 127)


def test_scales_follow_in_training_and_stand_still_in_evaluation() -> None:
    grid = FakeQuantizeWeight(8, 4)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    grid(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    before = grid.scale.clone()
    grid.eval()(weight * 2)
    assert torch.equal(grid.scale, before)
    grid.train()(weight * 2)
    torch.testing.assert_close(grid.scale, before * 2)


def test_activations_lie_on_the_grid_and_zero_stays_zero() -> None:
    quantizer = FakeQuantize(4)
    quantizer.set_range(0.25, 5)
    x = torch.linspace(-3, 4, 101)
    expected = ((x / 0.25).round() + 5).clamp(0, 15).sub(5) * 0.25
    assert torch.equal(quantizer(x), expected)
    assert float(quantizer(torch.zeros(1))) == 0.0


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"`bits` \(={bits}\) must be between 2 and 8"):
        FakeQuantize(bits)
    with pytest.raises(ConfigError, match=rf"`weight_bits` \(={bits}\) must be between 2 and 8"):
        Quantize(weight_bits=bits)


def test_settings_are_checked_and_make_the_same_stage_again() -> None:
    stage = Quantize(weight_bits=4, exclude=["conv1"])
    assert Quantize(**asdict(stage)) == stage
    with pytest.raises(ConfigError, match=r"`calibration_images` \(=0\) must be at least 1"):
        Quantize(calibration_images=0)
    with pytest.raises(ConfigError, match=r"`observer` \(='max'\) must be one of histogram, minmax"):
        Quantize(observer="max")


def test_places_are_named_after_the_code() -> None:
    places = [node.meta["place"] for node in trace(resnet20()).nodes if node.op != "output"]
    assert places[:4] == ["x:input:0", "conv1:call:0", "bn1:call:0", ":relu:0"]
    assert {"layer1.0:add:0", "layer1.0:relu:1", "layer2.0.shortcut:pad:0", ":flatten:0", "linear:call:0"} <= set(
        places
    )
    assert len(set(places)) == len(places)


def test_placing_keeps_the_tree_and_survives_copy_and_state() -> None:
    model = warm(resnet20())
    model.input = {"scale": 255}
    names = [name for name, _ in model.named_modules()]
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    quantizer = FakeQuantize()
    quantizer.set_range(10.0, 0)
    placed = place_quantizers(model, {"layer1.0:relu:1": quantizer, "x:input:0": nn.Identity()})
    assert isinstance(placed, torch.fx.GraphModule) and type(placed.layer1[0]).__name__ == "Block"
    assert "quantizers" not in dict(model.named_children())
    assert [n for n, _ in placed.named_modules() if not n.startswith("quantizers")] == names
    assert not torch.equal(placed(x), expected) and torch.equal(model(x), expected)
    twin = copy.deepcopy(placed)
    assert quantizer_places(twin) == quantizer_places(placed) and twin.input == model.input
    assert [n for n, _ in twin.named_modules()] == [n for n, _ in placed.named_modules()]
    assert torch.equal(twin(x), placed(x))
    twin.conv1.weight.data.zero_()
    assert not torch.equal(twin(x), placed(x))
    twin.load_state_dict(placed.state_dict())
    assert torch.equal(twin(x), placed(x))
    assert twin.train().layer1[0].bn1.training and not twin.eval().layer1[0].bn1.training
    assert quantizer_places(model) == {}


def test_a_place_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"'layer9:add:0', which is not in the traced model"):
        place_quantizers(resnet20(), {"layer9:add:0": FakeQuantize()})


class Dropping(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 8, 3), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.how == "dropout":
            return F.dropout(x, 0.5, self.training)
        if self.how == "branch":
            return x + 1 if self.training else x
        if self.how == "values":
            return x if x.sum() > 0 else -x
        F.relu_(x)
        return x.mean((2, 3))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("dropout", ":dropout:0 is a function that depends on the training mode"),
        ("branch", "computes something else in training mode"),
        ("values", "cannot be traced"),
        ("in place", "relu_:0 changes a tensor in place that is read again later"),
    ],
)
def test_what_a_trace_would_freeze_is_refused_and_only_weights_are_quantized(
    how: str, message: str, tmp_path: Path
) -> None:
    model = Dropping(how).eval()
    with pytest.raises(ValueError, match=message):
        trace(model)
    assert not model.training and not model.conv.training
    edit = quantize(model, tmp_path)
    (site,) = edit.sites
    assert site.after == "int8 weights per channel" and message in site.why
    assert message in edit.notes["activations"]
    assert parametrize.is_parametrized(edit.model.conv, "weight")


def test_quantize_resnet20_close_to_float_one_quantizer_per_tensor(tmp_path: Path) -> None:
    model = warm(resnet20())
    original = copy.deepcopy(model)
    edit = quantize(model, tmp_path)
    assert len(edit.sites) == 20 and all(s.after == "int8 weights per channel, uint8 activations" for s in edit.sites)
    places = quantizer_places(edit.model)
    # the input, 19 convolutions (each behind its ReLU, the second of a block before the addition), 9 sums, the pool
    assert len(places) == len(edit.model.quantizers._modules) == 1 + 19 + 9 + 1
    assert "linear:call:0" not in places and "layer1.0:add:0" not in places and "layer2.0.shortcut:pad:0" not in places
    x = torch.randn(8, 3, 16, 16)
    error = (edit.model(x) - original(x)).detach().std() / original(x).detach().std()
    assert float(error) < 0.05
    assert set(map(int, [q.zero_point for n, q in edit.model.quantizers.named_children() if "relu" in n])) == {0}
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(edit.model, tmp_path)


def test_excluded_layers_and_what_only_they_read_stay_float(tmp_path: Path) -> None:
    edit = quantize(warm(resnet20()), tmp_path, exclude=["conv1", "linear"])
    by_name = {site.name: site for site in edit.sites}
    assert by_name["conv1"].after is None and by_name["conv1"].why == "excluded by 'conv1'"
    places = quantizer_places(edit.model)
    assert "x:input:0" not in places and ":adaptive_avg_pool2d:0" not in places and ":relu:0" in places
    with pytest.raises(ConfigError, match="which matches no layer"):
        quantize(warm(resnet20()), tmp_path, exclude=["conv7"])
    with pytest.raises(ConfigError, match="would change nothing"):
        quantize(warm(resnet20()), tmp_path, exclude=["*"])


def test_layers_of_ours_are_quantized_inside_and_refused_where_they_move_by_fractions(tmp_path: Path) -> None:
    model = nn.Sequential(
        ShiftConv2d(3, 8, 3, 4, padding=1),
        nn.ReLU(),
        ShiftConv2d(8, 8, 3, 2, padding=1, learn=True, quantize=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
        nn.Identity(),
    )
    model[2].displacement.data.add_(0.3)
    with pytest.raises(ConfigError, match=r"2: displaced by fractions of a pixel.*or put the names into `exclude`"):
        quantize(model.eval(), tmp_path)
    edit = quantize(model.eval(), tmp_path, exclude=["2"])
    assert isinstance(edit.model.get_submodule("0").pointwise.parametrizations.weight[0], FakeQuantizeWeight)
    assert edit.sites[1].after is None


def test_nan_in_calibration_names_the_place(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"NaN or infinity at x:input:0"):
        Quantize()(warm(small(channels=3)), task(broken=True), Work(tmp_path))


def test_training_goes_on_after_quantizing_and_is_repeatable(tmp_path: Path) -> None:
    def run() -> Tensor:
        torch.manual_seed(0)
        model = quantize(warm(small(channels=3)), tmp_path, weight_bits=4).model.train()
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        x, y = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.arange(8)
        losses = []
        for _ in range(5):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        return model.eval()(x)

    assert torch.equal(run(), run())


def test_biases_are_whole_units_of_integer_kernels_after_training_too(tmp_path: Path) -> None:
    def farthest(model: nn.Module) -> float:
        """The largest distance of a bias of conv1 from a whole number of units."""
        convolution, grid = model.get_submodule("conv1"), model.get_submodule("quantizers.x_input_0")
        unit = grid.scale * convolution.parametrizations.weight[0].finest_scale
        units = convolution.bias.detach().double() / unit.double()
        return float((units - units.round()).abs().max())

    model = quantize(warm(small(channels=3)), tmp_path).model
    assert farthest(model) < 1e-3
    with torch.no_grad():
        model.get_submodule("conv1").bias.add_(0.01234)
    assert farthest(model) > 0.1
    trained = FineTune(epochs=1, lr=1e-3)(model, task(), Work(tmp_path)).model
    assert farthest(trained) < 1e-3


def test_cifar10_resnet20_loses_next_to_nothing(tmp_path: Path, data_root: Path) -> None:
    real = make_task(cifar10(data_root, download=False, limit=1000), calibration_images=256)
    model = resnet20()
    load_weights(model, data_root / "weights/resnet20-12fca82f.th")
    model.eval()
    original = copy.deepcopy(model)
    quantized = Quantize(calibration_images=256)(model, real, Work(tmp_path)).model
    pairs = [(original(x).argmax(1) == y, quantized(x).argmax(1) == y) for x, y in real.test]
    before, after = (torch.cat(part).float().mean() for part in zip(*pairs, strict=True))
    assert float(before) > 0.9 and float(before - after) <= 0.005
