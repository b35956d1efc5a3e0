"""Weights from files: what fits goes in bit for bit, what does not is named."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import noise_task
from safetensors.torch import save_file
from test_config import problems, settings
from torch import Tensor, nn

from compress import checkpoint, plan
from compress.constructors import Build
from compress.errors import DataError
from compress.lower import fold_batch_norm
from compress.models import resnet20, small
from compress.models.weights import load_weights, read_weights
from compress.run import run
from compress.stages import FoldBatchNorm


def net(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 2))


def state() -> dict[str, Tensor]:
    return {name: torch.randn_like(t) if t.is_floating_point() else t + 3 for name, t in net().state_dict().items()}


def message(path: Path, model: nn.Module | None = None) -> str:
    model = model or net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DataError) as raised:
        load_weights(model, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(raised.value)


BUILD = ("compress.models.small", {"classes": 3, "channels": 1})
INPUT = {"order": "gray", "scale": 255.0, "mean": [0.5], "std": [0.25]}


def checkpoint_of(model: nn.Module, path: Path, build: Build = BUILD, input: dict[str, Any] | None = None) -> Path:
    checkpoint.save(model, path, build=build, input=input or {}, provenance={}, results={})
    return path


def test_a_checkpoint_of_ours_loads(tmp_path: Path) -> None:
    given, model = (small(**BUILD[1]) for _ in range(2))
    load_weights(model, checkpoint_of(given, tmp_path / "base.safetensors"))
    assert all(torch.equal(tensor, given.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_another_network_is_told(tmp_path: Path) -> None:
    said = message(checkpoint_of(small(**BUILD[1]), tmp_path / "w.safetensors"))
    assert "the whole is CifarResNet there and Sequential here" in said


def test_a_checkpoint_of_a_compressed_network_is_told(tmp_path: Path) -> None:
    model = small(**BUILD[1])
    fold_batch_norm(model.eval())
    said = message(checkpoint_of(model, tmp_path / "model.safetensors"), small(**BUILD[1]))
    assert "of a compressed one" in said and "is Identity there and BatchNorm2d here. Of a run give `base." in said


def test_a_checkpoint_of_a_factory_from_elsewhere_needs_to_be_allowed(tmp_path: Path) -> None:
    path = checkpoint_of(net(), tmp_path / "base.safetensors", build=("test_weights.net", {}))
    assert "allow=['test_weights']" in message(path)
    load_weights(net(), path, allow=["test_weights"])


@pytest.mark.parametrize("key", ["order", "scale", "mean", "std"])
def test_a_checkpoint_that_wants_another_input_is_refused(tmp_path: Path, key: str) -> None:
    path = checkpoint_of(small(**BUILD[1]), tmp_path / "base.safetensors", input=INPUT)
    load_weights(small(**BUILD[1]), path, input={**INPUT, "size": [8, 8]})
    other: Any = {"order": "rgb", "scale": 1.0, "mean": [0.4], "std": [0.2]}[key]
    with pytest.raises(DataError, match=rf"set model\.input\.{key}="):
        load_weights(small(**BUILD[1]), path, input={**INPUT, key: other})


def test_a_plan_tries_the_input_of_a_checkpoint(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model: dict[str, Any] = {"_target_": "compress.models.small"}
    ready = plan.make(settings(tmp_path, model=model))
    assert ready.build is not None
    wanted = {**ready.task.input, "mean": [0.25]}
    file = tmp_path_factory.mktemp("weights") / "base.safetensors"
    model["weights"] = str(checkpoint_of(small(**ready.build[1]), file, ready.build, wanted))
    (problem,) = problems(tmp_path, model=model)
    assert problem.endswith("set model.input.mean=[0.25].")
    assert plan.make(settings(tmp_path, model={**model, "input": {"mean": [0.25]}})).weights == file


def test_a_run_tries_the_input_of_a_checkpoint(tmp_path: Path) -> None:
    task = noise_task()
    build = ("compress.models.small", {"classes": 3, "channels": 3})
    path = checkpoint_of(small(**build[1]), tmp_path / "base.safetensors", build, {**task.input, "mean": [0.5] * 3})
    with pytest.raises(DataError, match=r"set model\.input\.mean="):
        run({"fold": FoldBatchNorm()}, task, build=build, weights=path, out=tmp_path / "out", cache=None)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = checkpoint_of(small(**BUILD[1]), tmp_path / "base.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "SHA-256" in message(path, small(**BUILD[1]))


@pytest.mark.parametrize("ending", [".th", ".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("wrapper", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_form_loads(tmp_path: Path, ending: str, wrapper: str, prefix: str) -> None:
    given, model, path = state(), net(), tmp_path / f"w{ending}"
    named = {prefix + name: tensor for name, tensor in given.items()}
    if ending == ".safetensors":
        save_file(named, path)
    else:
        torch.save(
            {wrapper: named, "best": 91.7} if wrapper else named, path, _use_new_zipfile_serialization=not prefix
        )
    load_weights(model, path)
    assert all(torch.equal(tensor, given[name]) for name, tensor in model.state_dict().items())


def test_a_network_whose_own_names_start_with_module_keeps_them(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("module", nn.Linear(2, 2))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")


def test_half_precision_is_cast_and_missing_counters_are_no_fault(tmp_path: Path) -> None:
    given, model = state(), net()
    torch.save({n: t.half() for n, t in given.items() if "num_batches" not in n}, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert model[0].weight.dtype == torch.float32
    assert torch.equal(model[0].weight, given["0.weight"].half().float())


def test_everything_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    given = state()
    given["4.weight"] = given.pop("0.weight")
    given["3.weight"] = torch.zeros(5, 4)
    torch.save(given, tmp_path / "w.pt")
    text = message(tmp_path / "w.pt")
    assert "do not fit Sequential: missing: 0.weight; unexpected: 4.weight; other shapes: 3.weight is 5x4 in" in text
    assert "in the file, 2x4 in the model." in text


def test_long_lists_are_cut_with_a_count(tmp_path: Path) -> None:
    torch.save({f"extra{i}": torch.zeros(1) for i in range(12)}, tmp_path / "w.pt")
    text = message(tmp_path / "w.pt")
    assert "extra9, ... (12 in all)" in text
    assert "extra10" not in text


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert f"`weights` (='{tmp_path / 'no.pt'}') does not exist" in message(tmp_path / "no.pt")
    assert "is a folder" in message(tmp_path)
    (tmp_path / "w.onnx").write_bytes(b"x")
    assert "must end in one of .th, .pt, .pth, .safetensors" in message(tmp_path / "w.onnx")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file(tmp_path: Path, form: str, part: float) -> None:
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(state(), path)
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
    assert "cannot be read; truncated or not weights?" in message(path)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Hostile()}, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    assert "hold code or objects beside tensors" in message(tmp_path / "w.pt")
    (tmp_path / "p.pt").write_bytes(pickle.dumps(Hostile()))
    message(tmp_path / "p.pt")
    assert not (tmp_path / "pwned").exists()


def test_contents_that_are_no_weights(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "w.pt")
    assert "hold a Tensor, not a dict of named tensors" in message(tmp_path / "w.pt")
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    assert "hold other things than tensors: epoch" in message(tmp_path / "w.pt")
    torch.save({}, tmp_path / "w.pt")
    assert "hold nothing" in message(tmp_path / "w.pt")
    torch.save({**state(), "0.bias": torch.full((4,), torch.nan)}, tmp_path / "w.pt")
    assert "hold NaN or infinity in 0.bias" in message(tmp_path / "w.pt")


def test_the_published_resnet20_fits_and_another_depth_does_not(data_root: Path) -> None:
    path = data_root / "weights" / "resnet20-12fca82f.th"
    model = resnet20()
    load_weights(model, path)
    assert torch.equal(model.linear.bias, read_weights(path)["module.linear.bias"])
    assert "unexpected: layer1.3.conv1.weight" in message(data_root / "weights" / "resnet56-4bfd9763.th", resnet20())


def test_a_text_is_no_weights_file(tmp_path: Path) -> None:
    file = tmp_path / "w.th"
    file.write_text("Not weights, but words.\n" * 100)
    with pytest.raises(DataError, match=r"cannot be read: it is no file that `torch.save` wrote"):
        read_weights(file)
