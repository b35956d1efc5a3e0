"""What `PruneShifts` leaves: masks, channels taken out, files, and the stages that come before and after it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import noise_task
from test_prune_shifts import carrying, network, prune, shift
from torch import Tensor, nn
from torch.nn.utils import parametrize

import compress
from compress import checkpoint
from compress.errors import ConfigError
from compress.measure import profile
from compress.models import small
from compress.nn.masked import MaskedWeight, mask_of, put_mask
from compress.nn.shift import ShiftConv2d
from compress.stages import Cluster, FineTune, Prune, PruneChannels, PruneShifts, Quantize, Shift
from compress.surgery import layers
from compress.task import Work


def test_channels_that_nothing_reads_leave_the_layer_that_makes_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = shift([[(0, 1), (1, 0), (0, 0)]] * 6)
    model: Any = network(layer, 6)
    with torch.no_grad():
        layer.pointwise.weight[:, [0, 1, 2, 9, 10, 11, 5]] = 0  # all copies of channels 0 and 3, one of channel 1
    x = noise_task().example
    expected = model(x)
    edit = prune(copy.deepcopy(model), tmp_path, harm=0, zero=0)
    thin: Any = edit.model
    assert thin[0].out_channels == thin[1].num_features == thin[3].in_channels == 4
    assert torch.equal(thin[0].weight, model[0].weight[[1, 2, 4, 5]])
    torch.testing.assert_close(thin(x), expected)
    assert edit.notes["channels"] == {"left": {"0": [4, 6]}, "kept": {}}
    assert edit.notes["total"] == {"copies": [18, 11], "zeroed": 0, "channels": 2}
    assert [site.name for site in edit.sites] == ["0", "3"]
    assert thin[3].taps == 3 and int(mask_of(thin[3].pointwise).mask[0].sum()) == 11  # type: ignore[union-attr]
    assert not thin[3].pointwise.weight[:, ~mask_of(thin[3].pointwise).mask[0].flatten()].any()  # type: ignore[union-attr]
    wide: Any = prune(copy.deepcopy(model), tmp_path, harm=0, zero=0, channels=False).model
    assert wide[0].out_channels == 6
    torch.testing.assert_close(wide(x), expected)


class Residual(nn.Module):
    """A shift layer beside its own input, which is read without it too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.shift = shift([[(0, 1), (1, 0)]] * 8, outputs=8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y: Tensor = self.head((self.shift(x) + x).mean((2, 3)))
        return y


def test_channels_that_others_read_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    with torch.no_grad():
        model.shift.pointwise.weight[:, :4] = 0
    edit = prune(copy.deepcopy(model), tmp_path, harm=0, zero=0)
    assert edit.notes["channels"]["left"] == {}  # type: ignore[index,call-overload]
    assert edit.model.shift.in_channels == edit.model.conv.out_channels == 8  # type: ignore[union-attr]
    with torch.no_grad():
        model.head.weight[:, :2] = 0
    edit = prune(copy.deepcopy(model), tmp_path, harm=0, zero=0)
    thin: Any = edit.model
    assert thin.shift.in_channels == thin.shift.out_channels == thin.conv.out_channels == thin.head.in_features == 6
    x = noise_task().example
    torch.testing.assert_close(edit.model(x), model(x))
    assert edit.notes["total"]["channels"] == 2  # type: ignore[index,call-overload]


def test_what_cannot_be_followed_keeps_its_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = network(shift([[(0, 1), (1, 0)]] * 6), 6)
    first: Any = model[0]  # type: ignore[index]
    with torch.no_grad():
        model[3].pointwise.weight[:, :2] = 0  # type: ignore[index,union-attr]
    twice = nn.Sequential(first, nn.ReLU(), nn.Conv2d(6, 8, 1), *model).eval()  # the first convolution runs two times
    edit = prune(twice, tmp_path, harm=0, zero=0)
    assert edit.notes["channels"] == {
        "left": {},
        "kept": {"6": "1 of 6 input channels that it does not read stay: 0 is called 2 times in a forward pass"},
    }
    assert edit.notes["copies"] == {"6": [12, 10]}
    parametrize.register_parametrization(model[7], "weight", nn.Identity())  # type: ignore[index]  # has no part in it
    assert prune(copy.deepcopy(model), tmp_path, harm=0, zero=0).notes["channels"] == {
        "left": {"0": [5, 6]},
        "kept": {},
    }
    parametrize.register_parametrization(first, "weight", nn.Identity())
    edit = prune(model, tmp_path, harm=0, zero=0)
    assert edit.notes["channels"] == {
        "left": {},
        "kept": {"0": "1 of 6 channels that nothing reads stay: 0 has weights that are computed from others"},
    }
    assert edit.notes["copies"] == {"3": [12, 10]} and first.out_channels == 6


def test_learned_layers_are_settled_first_and_bilinear_ones_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = shift([[(0, 1), (1, 0)]] * 6, learn=True, l1=0.1)
    with torch.no_grad():
        layer.displacement[2] = torch.tensor([[0.1, 0.2], [-0.3, 0.4]])  # both round to the centre
    between = ShiftConv2d(6, 6, 3, 1, padding=1, learn=True, quantize=False)
    model = network(nn.Sequential(layer, between), 6)
    x = noise_task().example
    expected = model(x)
    edit = prune(model, tmp_path, harm=0, zero=0)
    torch.testing.assert_close(edit.model(x), expected)
    new: Any = edit.model[3][0]  # type: ignore[index]
    assert carrying(new)[2] == {(0, 0)} and sum(map(len, carrying(new))) == 11
    assert not new.learn and not new.displacement.requires_grad and new.config()["l1"] == 0.1
    why = {site.name: site.why for site in edit.sites}
    assert why["3.1"].startswith("it moves by parts of pixels; `ConvertShift`, or `quantize: true` in `Shift`")
    assert edit.model[3][1] is between  # type: ignore[index]


@pytest.fixture(scope="module")
def shifted() -> nn.Module:
    torch.manual_seed(0)
    model = small(3, 8).eval()
    stage = Shift(taps=3, learn=True, images=16, include=["layer2.*"])
    return stage(model, noise_task(), Work(Path())).model


def deep(shifted: nn.Module, folder: Path) -> nn.Module:
    return prune(copy.deepcopy(shifted), folder, amount=0.45, zero=0.02, images=16).model


def test_zeros_stay_in_training_and_in_the_file(shifted: nn.Module, tmp_path: Path) -> None:
    model = deep(shifted, tmp_path)
    assert any(mask_of(layer.pointwise) for layer in layers(model, (ShiftConv2d,)).values())  # type: ignore[union-attr,arg-type]
    places = {name: carrying(layer) for name, layer in layers(model, (ShiftConv2d,)).items()}
    about: dict[str, Any] = {"input": noise_task().input, "provenance": {}, "results": {}}
    build = ("compress.models.small", {"classes": 3, "channels": 8})
    x = noise_task().example
    for step in range(2):
        checkpoint.save(model, tmp_path / f"{step}", build=build, **about)
        loaded = compress.load(tmp_path / f"{step}")
        assert torch.equal(loaded(x), model(x))
        assert {n: carrying(layer) for n, layer in layers(loaded, (ShiftConv2d,)).items()} == places
        if not step:
            before = model.state_dict()["linear.weight"].clone()
            model = FineTune(epochs=1, lr=0.05)(loaded, noise_task(), Work(tmp_path)).model
            assert not torch.equal(model.state_dict()["linear.weight"], before)


def test_a_file_holds_what_is_left(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shift(taps=4, places="random", images=32)(nn.Conv2d(8, 128, 3), noise_task(), Work(tmp_path)).model
    gone = torch.rand(32) < 0.6
    gone[:4] = torch.tensor([False, False, False, False])  # so that the layer still has four taps
    with torch.no_grad():
        model.pointwise.weight[:, gone] = 0  # type: ignore[union-attr,operator]
    model = prune(model, tmp_path, harm=0, zero=0).model
    left = 128 * int((~gone).sum())
    build = ("torch.nn.Conv2d", {"in_channels": 8, "out_channels": 128, "kernel_size": 3})
    size = checkpoint.save(model, tmp_path / "file", build=build, input={}, provenance={}, results={})
    assert model.taps == 4 and 4 * left < size < 4 * (left + 128) + 2000
    assert torch.equal(compress.load(tmp_path / "file").pointwise.weight, model.pointwise.weight)  # type: ignore[union-attr]


def test_what_comes_after_keeps_the_zeros(shifted: nn.Module, tmp_path: Path) -> None:
    x = noise_task().example
    for later in (
        [Prune(amount=0.5, images=32), Cluster(bits=4), Quantize(calibration_images=32)],
        [PruneChannels(macs=0.8, images=32), Prune(amount=0.5, images=32), Quantize(calibration_images=32)],
        [PruneShifts(amount=0.3, images=32), Quantize(calibration_images=32)],
    ):
        model = deep(shifted, tmp_path)
        for stage in later:
            before = [sum(map(len, carrying(layer))) for layer in layers(model, (ShiftConv2d,)).values()]
            model = stage(model, noise_task(), Work(tmp_path)).model
            after = [sum(map(len, carrying(layer))) for layer in layers(model, (ShiftConv2d,)).values()]
            assert all(now <= old for now, old in zip(after, before, strict=True))
        assert model(x).isfinite().all()


def test_what_pruning_made_of_single_weights_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = network(nn.Sequential(shift([[(0, 1), (1, 0)]] * 6), shift([[(0, 1), (1, 0)]] * 6)), 6)
    model = Prune(amount=0.5, include=["3.0"], refit=False)(model, noise_task(), Work(tmp_path)).model
    with torch.no_grad():
        model[3][1].pointwise.weight[:, 3] = 0  # type: ignore[index,union-attr]
    edit = prune(model, tmp_path, harm=0, zero=0)
    why = {site.name: site.why for site in edit.sites}
    assert why["3.0"] == "single weights of it are pruned; put `PruneShifts` before `Prune`"
    assert edit.notes["copies"] == {"3.1": [12, 11]}


def test_copies_of_a_mask_are_not_counted_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = shift([[(0, 1), (1, 0)]] * 6)
    mask = torch.ones(6, 12, 1, 1, dtype=torch.bool)
    mask[:, [1, 3]] = False
    put_mask(layer.pointwise, MaskedWeight(), mask)
    with torch.no_grad():
        layer.pointwise.parametrizations.weight.original[:, 5] = 0  # type: ignore[union-attr,index,operator]
    edit = prune(network(layer, 6), tmp_path, harm=0, zero=0)
    assert edit.notes["copies"] == {"3": [10, 9]}
    assert [len(each) for each in carrying(edit.model[3])] == [1, 1, 1, 2, 2, 2]  # type: ignore[index]


def test_what_is_freed_is_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = shift([[(0, 1), (1, 0)]] * 6)
    model = network(layer, 6)
    with torch.no_grad():
        layer.pointwise.weight[:, [0, 2, 4, 6, 8]] = 0
        layer.pointwise.weight[:, [1, 3]] = 0  # the first two channels have no copy left, the last one has two
    example, places = noise_task().example, 9 * 11
    before = profile(model, example)
    assert before.shift_elements == 5 * places
    edit = prune(copy.deepcopy(model), tmp_path, harm=0, zero=0)
    after = profile(edit.model, example)
    assert after.shift_elements == 5 * places
    # Two channels less in the first convolution, of eight inputs, and twelve columns less four in the shift layer.
    assert before.macs - after.macs == places * (2 * 8 + 4 * 6)
    nonzero = {"first": 4 * 9, "norm": 2 * 4, "weights": 5 * 6 + 6, "linear": 21}
    moves = int(edit.model[3].displacement.count_nonzero())  # type: ignore[index,union-attr,operator]
    assert after.nonzero == sum(nonzero.values()) + moves - int((edit.model[1].bias == 0).sum())  # type: ignore[index,union-attr,operator]


def test_it_is_the_same_every_time(shifted: nn.Module, tmp_path: Path) -> None:
    first, second = (deep(shifted, tmp_path).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_models_that_it_is_not_for(tmp_path: Path) -> None:
    layer = shift([[(0, 1), (1, 0)]] * 6)
    with pytest.raises(ConfigError, match="the model has no shift layers; put the stage `Shift`"):
        prune(nn.Sequential(nn.Conv2d(8, 8, 3)), tmp_path)
    with pytest.raises(ConfigError, match=r"`include` has the pattern 'x\*', which matches no layer"):
        prune(network(layer, 6), tmp_path, include=["x*"])
    clustered = Cluster(bits=2)(network(copy.deepcopy(layer), 6), noise_task(), Work(tmp_path)).model
    with pytest.raises(ConfigError, match="clustered already; put `PruneShifts` before `Cluster`"):
        prune(clustered, tmp_path)
    quantized = Quantize(calibration_images=16)(network(copy.deepcopy(layer), 6), noise_task(), Work(tmp_path)).model
    with pytest.raises(ConfigError, match="quantized already; put `PruneShifts` before `Quantize`"):
        prune(quantized, tmp_path)
    empty = network(copy.deepcopy(layer), 6)
    nn.init.zeros_(empty[3].pointwise.weight)  # type: ignore[index,union-attr,arg-type]
    with pytest.raises(ConfigError, match="all its weights are zero; train it first"):
        prune(empty, tmp_path)


@pytest.mark.parametrize("copies", [[(0, 1)], [(0, 1), (0, 0)]])
def test_where_nothing_moves_the_pointwise_convolution_is_left(copies: list[tuple[int, int]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = shift([copies] * 4)
    with torch.no_grad():
        layer.pointwise.weight[:, 0 :: len(copies)] *= 0.01 if len(copies) > 1 else 1
    edit = prune(network(layer, 4), tmp_path, zero=0.99)
    new: Any = edit.model[3]  # type: ignore[index]
    assert new.taps == 1 and carrying(new) == [{(0, 0)}] * 4
    assert list(new.forms("onnxruntime")) == ["pointwise"]
    x = torch.randn(2, 4, 9, 11)
    torch.testing.assert_close(new.lower("onnxruntime")(x), new(x))
