"""What `Prune` leaves, in files and under the stages that come after it."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path

import pytest
import torch
from awkward import SHAPE, noise_task
from random_task import quantize, task, warm
from test_prune import digits, prune, zeros
from torch import nn

import compress
from compress import checkpoint
from compress.errors import ConfigError
from compress.lower import export_onnx
from compress.lower.fold import fold_batch_norm
from compress.models import small
from compress.nn.masked import MaskedWeight, mask_of
from compress.nn.quantized import FakeQuantizeWeight
from compress.nn.shift import ShiftConv2d
from compress.stages import AdaRound, Cluster, FineTune, MixedPrecision, Prune, PruneChannels, PruneShifts
from compress.task import Work

INPUT = {"order": "rgb", "size": [16, 16], "mean": [0.0, 0.0, 0.0]}
SMALL = ("compress.models.small", {"classes": 10, "channels": 3})


@pytest.mark.parametrize("form", ["packed", "training"])
@pytest.mark.parametrize("settings", [{"amount": 0.6}, {"amount": 0.6, "schedule": "cubic", "epochs": 2}])
def test_saved_and_loaded_bit_for_bit(form: str, settings: dict[str, object], tmp_path: Path) -> None:
    model = prune(warm(small(channels=3)), **settings, refit=None if "epochs" in settings else False).model
    model = FineTune(epochs=1, lr=0.01)(model, task(), Work(tmp_path)).model  # half-way where there is a schedule
    path = tmp_path / "model.safetensors"
    about = {"input": INPUT, "provenance": {}, "results": {}}
    checkpoint.save(model, path, build=SMALL, form=form, **about)  # type: ignore[arg-type]
    loaded = compress.load(path)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), model.eval()(x))
    mine, theirs = (net.conv1.parametrizations.weight[0] for net in (model, loaded))
    assert torch.equal(mine.mask, theirs.mask)
    frozen = form == "packed" or "epochs" not in settings
    assert theirs.config() == (MaskedWeight() if frozen else mine).config()
    (tmp_path / "state.safetensors").unlink()
    gone = zeros(loaded)
    trained = FineTune(epochs=2, lr=0.01)(loaded, task(), Work(tmp_path)).model
    now = zeros(trained)
    if frozen:
        assert all(torch.equal(now[name], gone[name]) for name in gone)
    else:
        assert sum(int(z.sum()) for z in now.values()) == round(0.6 * sum(z.numel() for z in now.values()))
    assert not torch.equal(trained.conv1.weight, model.conv1.weight)


def test_a_file_holds_what_is_left(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 64, 3, bias=False)
    n = layer.weight.numel()
    prune(layer, amount=0.8, refit=False)
    build = ("torch.nn.Conv2d", {"in_channels": 64, "out_channels": 64, "kernel_size": 3, "bias": False})
    size = checkpoint.save(layer, tmp_path / "file", build=build, input={}, provenance={}, results={})
    entropy = -(0.2 * math.log2(0.2) + 0.8 * math.log2(0.8)) * n / 8
    assert size < 1.01 * (entropy + 4 * 0.2 * n) + 700
    assert torch.equal(compress.load(tmp_path / "file").weight, layer.weight)


def test_zeros_stay_under_clustering_and_quantization(tmp_path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model = prune(warm(small(channels=3)), amount=0.5, refit=False).model
    gone = zeros(model)

    def tuned(model: nn.Module) -> nn.Module:
        trained = FineTune(epochs=1, lr=1e-3)(model, task(), Work(tmp_path)).model
        (tmp_path / "state.safetensors").unlink()
        assert all(bool((now >= gone[name]).all()) for name, now in zeros(trained).items())
        return trained

    model = tuned(Cluster(bits=5)(tuned(model), task(), Work(tmp_path)).model)
    x = torch.randn(2, 3, 16, 16)
    exported = export_onnx(model, x, tmp_path / "model.onnx", input=INPUT)
    assert all(row["max_abs"] < 1e-4 for row in exported["parity"])
    model = tuned(quantize(model, tmp_path).model)
    assert len(model.conv1.parametrizations.weight) == 3  # type: ignore[union-attr,arg-type]
    path = tmp_path / "model.safetensors"
    checkpoint.save(model, path, build=SMALL, input=INPUT, provenance={}, results={})
    loaded = compress.load(path)
    assert torch.equal(loaded(x), model(x))
    tuned(loaded)


@pytest.mark.parametrize("shift", [False, True])
def test_adaround_and_mixed_precision_leave_zeros(shift: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = ShiftConv2d(8, 16, 3, 3, padding=1) if shift else nn.Conv2d(8, 16, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 3)).eval()
    model[4].weight.data.mul_(30)
    model = prune(model, amount=0.6, scope="layer").model
    gone = zeros(model)
    mixed = MixedPrecision(like_bits=4, bits=[3, 5], images=16, calibration_images=16)
    edit = mixed(copy.deepcopy(model), noise_task(), Work(tmp_path))
    harms = [row["divergence"] for layer in edit.notes["sensitivity"].values() for row in layer.values()]  # type: ignore[union-attr,call-overload,index]
    assert all(harm > 0 for harm in harms)
    assert all(bool((now >= gone[name]).all()) for name, now in zeros(edit.model).items())
    model = quantize(model, tmp_path, SHAPE, weight_bits=4).model
    edit = AdaRound(images=32)(model, noise_task(), Work(tmp_path))
    assert all(site.after for site in edit.sites)
    assert all(bool((now >= gone[name]).all()) for name, now in zeros(edit.model).items())
    for name, better in edit.notes["relative_error"].items():  # type: ignore[union-attr]
        assert better < edit.notes["relative_error_of_nearest"][name]  # type: ignore[index,call-overload,operator]
    model.train()
    assert all(bool((now >= gone[name]).all()) for name, now in zeros(edit.model).items())
    assert any(isinstance(part, FakeQuantizeWeight) for part in model.modules())


def test_batch_norm_folds_into_masked_weights() -> None:
    model = prune(digits(), amount=0.6).model
    x = torch.randn(2, *SHAPE)
    expected, gone = model(x), zeros(model)
    assert fold_batch_norm(model) == [("2", "3")]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(now, gone[name]) for name, now in zeros(model).items())


def scheduled() -> nn.Module:
    """A schedule of two epochs, six steps, in all layers but the shift layer."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 1), nn.ReLU(), ShiftConv2d(8, 8, 3, 2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10)).eval()
    stage = Prune(amount=0.5, schedule="cubic", epochs=2, scope="layer", exclude=["2"])
    return stage(model, task(), Work(Path())).model


def trained(model: nn.Module, epochs: int, folder: Path) -> nn.Module:
    folder.mkdir()
    return FineTune(epochs=epochs, lr=0.01)(model, task(), Work(folder)).model


@pytest.mark.parametrize("stage", [PruneChannels(macs=0.8, images=16), PruneShifts(amount=0.3, images=16)])
def test_a_running_schedule_does_not_end_where_channels_go(stage: PruneChannels | PruneShifts, tmp_path: Path) -> None:
    model = scheduled()
    message = r"the schedule of `Prune` in 0 has made {} of its 6 steps, .*; put a `FineTune` before that, at least as "
    with pytest.raises(ConfigError, match=message.format(0)):
        stage(copy.deepcopy(model), task(), Work(tmp_path))
    model = trained(model, 1, tmp_path / "half")
    with pytest.raises(ConfigError, match=message.format(3)):
        stage(copy.deepcopy(model), task(), Work(tmp_path))
    model = trained(model, 1, tmp_path / "whole")
    assert [int(zeros(model)[name].sum()) for name in ("0", "6")] == [12, 40]
    model = stage(model, task(), Work(tmp_path)).model
    gone = zeros(model)
    assert all(mask_of(model.get_submodule(name)) and bool(gone[name].any()) for name in ("0", "6"))
    later = zeros(trained(model, 1, tmp_path / "later"))
    assert all(torch.equal(later[name], gone[name]) for name in ("0", "6"))


def test_a_schedule_goes_on_where_only_copies_go(tmp_path: Path) -> None:
    model = PruneShifts(amount=0.3, images=16, channels=False)(scheduled(), task(), Work(tmp_path)).model
    model = trained(model, 2, tmp_path / "whole")
    assert [int(zeros(model)[name].sum()) for name in ("0", "6")] == [12, 40]
