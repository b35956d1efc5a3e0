"""Everything that computes, on a GPU: each stage, training, a whole run. Skipped where torch finds none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import noise_task
from test_run import BUILD, QUICK, SHAPE, base, with_what_they_need
from torch import nn

import compress
from compress import checkpoint
from compress.constructors import named
from compress.data import digits, make_task
from compress.lower import write_file
from compress.lower.plain import lower
from compress.measure import latency
from compress.run import run
from compress.stage import Stage
from compress.stages import (
    AdaRound,
    Cluster,
    ConvertShift,
    CorrectBias,
    Equalize,
    Factorize,
    FineTune,
    Fire,
    FreezeRanges,
    FreezeShifts,
    Group,
    MixedPrecision,
    Prune,
    PruneChannels,
    PruneShifts,
    Quantize,
    Separable,
    Shift,
    SparsifyChannels,
    SqueezeExcite,
)
from compress.task import Task, Work

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch finds no CUDA device"),
    pytest.mark.filterwarnings("default"),  # what drivers and other versions of torch warn of is not asked here
    pytest.mark.filterwarnings("error:training steps are not recorded"),
]

# More steps than are made before one is recorded, with two batches an epoch.
TRAINED: dict[str, Any] = {"epochs": 3, "lr": 0.01}
SHIFT, INT8 = QUICK["Shift"], QUICK["Quantize"]
# One stage at settings that take another way through it, the last of its list; the others go before.
WAYS: dict[str, list[Stage]] = {
    "AdaRound, after a shift": [SHIFT, INT8, AdaRound(images=16)],
    "AdaRound, after pruning": [Prune(amount=0.3, images=16), INT8, AdaRound(images=16, scales=False)],
    "Cluster, by density": [Cluster(bits=3, start="density")],
    "Cluster, trained": [Prune(amount=0.3, images=16), Cluster(bits=3), FineTune(**TRAINED)],
    "ConvertShift, channels": [ConvertShift(images=16), PruneChannels(macs=0.6, images=16)],
    "ConvertShift, not refitted": [ConvertShift(refit=False)],
    "CorrectBias, analytic": [INT8, CorrectBias(method="analytic")],
    "Equalize, absorbing": [Equalize(absorb=True)],
    "Factorize, cp": [Factorize(method="cp", ratio=0.5, images=16)],
    "Factorize, svd": [Factorize(method="svd", ratio=0.5, images=16)],
    "Factorize, spatial": [Factorize(method="spatial", macs=0.7, images=16)],
    "Factorize, trained": [Factorize(params=0.7, images=16), FineTune(**TRAINED)],
    "Factorize, unrefined": [Factorize(energy=0.8, refine=False, images=16)],
    "FineTune, adamw": [FineTune(**TRAINED, optimizer="adamw", clip=1.0)],
    "FineTune, distilled": [FineTune(**TRAINED, distill=0.5, average=0.9, keep="best")],
    "FineTune, frozen norms": [FineTune(**TRAINED, batch_norm="frozen")],
    "Fire, trained": [Fire(images=16), FineTune(**TRAINED)],
    "FreezeRanges, trained": [Quantize(calibration_images=16, learn=True), FreezeRanges(), FineTune(**TRAINED)],
    "FreezeShifts, trained": [FineTune(**TRAINED), FreezeShifts(), FineTune(**TRAINED)],
    "Group, fixed": [Group(images=16, shuffle="fixed"), FineTune(**TRAINED)],
    "MixedPrecision, by answers": [MixedPrecision(changed=20, bits=[3, 8], images=16, calibration_images=16)],
    "Prune, refitted": [Prune(amount=0.5, refit=True, images=16)],
    "Prune, taylor": [Prune(amount=0.5, by="taylor", scope="layer", images=16)],
    "Prune, 2:4": [Prune(pattern="2:4", exclude=["conv1"])],
    "Prune, gradual": [Prune(amount=0.5, schedule="cubic", epochs=1, updates=2, every=1), FineTune(**TRAINED)],
    "Prune, movement": [Prune(amount=0.5, by="movement", schedule="linear", epochs=1), FineTune(**TRAINED)],
    "PruneChannels, l1": [PruneChannels(params=0.6, by="l1", allocation="uniform", refit=False, images=16)],
    "PruneChannels, bn": [PruneChannels(macs=0.6, by="bn", images=16)],
    "PruneChannels, fpgm": [PruneChannels(bytes=0.6, by="fpgm", images=16)],
    "PruneChannels, taylor": [PruneChannels(macs=0.6, by="taylor", images=16), FineTune(**TRAINED)],
    "PruneChannels, after pruning": [Prune(amount=0.3, images=16), PruneChannels(macs=0.7, images=16)],
    "PruneShifts, trained": [SHIFT, PruneShifts(amount=0.3, images=16), FineTune(**TRAINED)],
    "Quantize, average": [Quantize(calibration_images=16, observer="average", granularity="group", group_size=2)],
    "Quantize, learned": [Quantize(calibration_images=16, learn=True), FineTune(**TRAINED)],
    "Quantize, least error": [Quantize(calibration_images=16, weight_range="mse", symmetric=False, weight_bits=4)],
    "Quantize, minmax": [Quantize(calibration_images=16, observer="minmax", symmetric_activations=True)],
    "Quantize, percentile": [Quantize(calibration_images=16, observer="percentile", granularity="tensor")],
    "Quantize, powers of two": [Quantize(calibration_images=16, grid="power_of_two", weight_bits=4)],
    "Quantize, trained": [Quantize(calibration_images=16, weight_bits=4), FineTune(**TRAINED)],
    "Separable, trained": [Separable(images=16), FineTune(**TRAINED)],
    "Shift, learned": [Shift(taps=3, learn=True, l1=1e-3, images=16), FineTune(**TRAINED), FreezeShifts()],
    "Shift, gated": [Shift(taps=2, gate="macs", images=16)],
    "Shift, budget": [Shift(taps=4, budget=0.3, images=16)],
    "Shift, random": [Shift(taps=2, places="random", images=16), FineTune(**TRAINED)],
    "SparsifyChannels, pruned": [SparsifyChannels(**TRAINED), PruneChannels(macs=0.6, images=16)],
    "SqueezeExcite, trained": [SqueezeExcite(), FineTune(**TRAINED)],
}


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Convolutions in float32 proper, so that the CPU's answers can be compared with."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def on_gpu(task: Task, **more: Any) -> Task:
    return replace(task, device=torch.device("cuda"), **more)


def check(model: nn.Module, build: Any, task: Task, folder: Path, export: bool) -> None:
    """Finite answers, all of it on the GPU, the same from the file on the CPU; with `export` an ONNX file too."""
    assert not model.training
    everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {name for name, tensor in everything.items() if tensor.device.type != "cuda"} == set()
    with torch.no_grad():
        given = model(task.example.to(task.device)).cpu()
        plain = lower(model, "torch")(task.example.to(task.device)).cpu()  # torch's own layers, on the GPU too
    assert given.shape == (2, task.classes) and bool(given.isfinite().all())
    path = folder / "model.safetensors"
    checkpoint.save(model, path, build=build, input=task.input, provenance={}, results={})
    with torch.no_grad():
        loaded = compress.load(path, allow=["test_pool_head"])(task.example)
    for others in (plain, loaded):  # an activation that lies half-way between two integers may fall to either side
        assert (others - given).abs().max() < 0.05 * given.abs().max() + 1e-3
    if export:
        write_file(model, task.example, folder / "model.onnx", input=task.input)
    assert next(model.parameters()).device.type == "cuda"  # what was written was a copy


def carried_out(stages: dict[str, Stage], build: Any, tmp_path: Path, export: bool = False) -> None:
    torch.manual_seed(0)
    model = named(build[0])(**build[1]).eval().cuda()
    teacher = named(build[0])(**build[1]).eval().cuda()
    task = on_gpu(noise_task(SHAPE), teacher=teacher)
    for name, stage in stages.items():
        folder = tmp_path / name
        folder.mkdir()
        model = stage(model, task, Work(folder, lineage=name)).model
    check(model.eval(), build, task, tmp_path, export)


@pytest.mark.parametrize("name", QUICK)
def test_stage(name: str, tmp_path: Path) -> None:
    carried_out(with_what_they_need({name: QUICK[name]}), base(name), tmp_path, export=True)


@pytest.mark.parametrize("way", WAYS)
def test_settings(way: str, tmp_path: Path) -> None:
    stages = {str(number): stage for number, stage in enumerate(WAYS[way])}
    carried_out(stages, base(way.partition(",")[0]), tmp_path)


BASE = ("compress.models.small", {"classes": 10, "channels": 1})


def images(precision: str) -> Task:
    source = digits(limit=128)
    return make_task(source, batch_size=32, calibration_images=64, device="cuda", precision=precision)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_on_digits(precision: str, tmp_path: Path) -> None:
    task = images(precision)
    stages: dict[str, Stage] = {
        "shift": Shift(taps=3, learn=True, images=64),
        "recover": FineTune(epochs=2, lr=0.02, distill=0.5),
        "prune": Prune(amount=0.3, images=64),
        "channels": PruneChannels(macs=0.8, images=64),
        "int8": Quantize(calibration_images=64),
        "round": AdaRound(images=64),
    }
    settings: dict[str, Any] = {"measure": "none", "export": ["onnx", "pt2"], "train": FineTune(epochs=1, lr=0.05)}
    result = run(stages, task, build=BASE, out=tmp_path / "run", cache=tmp_path / "cache", **settings)
    assert result.report["device"] == "cuda"
    assert all(file["parity"][0]["max_abs"] < 0.05 for file in result.report["exports"])
    assert {p.device.type for p in result.model.parameters()} == {"cuda"}
    with torch.no_grad():
        given = result.model(task.example.cuda()).cpu()
        loaded = compress.load(tmp_path / "run/model.safetensors")(task.example.cpu())
    assert (loaded - given).abs().max() < 0.05 * given.abs().max() + 1e-3


REPEATED: dict[str, dict[str, Stage]] = {
    "trained in float32": {"train": FineTune(epochs=2, lr=0.05)},
    "trained in bfloat16": {"train": FineTune(epochs=2, lr=0.05)},
    "compressed": {"prune": Prune(amount=0.3, by="taylor"), "share": Cluster(bits=4)},
    "quantized": {"int4": Quantize(weight_bits=4), "round": AdaRound()},
    "factorized": {"factorize": Factorize(macs=0.7)},
    "shifted": {"shift": Shift(taps=2, learn=True), "recover": FineTune(epochs=2, lr=0.02)},
    "shared weights": {"share": Cluster(bits=4), "recover": FineTune(epochs=1, lr=0.02)},
    "channels": {"sparsify": SparsifyChannels(epochs=1, lr=0.02), "channels": PruneChannels(macs=0.7)},
}


@pytest.mark.parametrize("name", REPEATED)
def test_the_same_seed_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    task = images("bfloat16" if "bfloat16" in name else "float32")
    files = []
    for out in (tmp_path / "first", tmp_path / "again"):
        run(REPEATED[name], task, build=BASE, out=out, cache=None, measure="none")
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_latency_on_the_gpu(tmp_path: Path) -> None:
    model = named(BUILD[0])(**BUILD[1]).eval().cuda()
    example = noise_task(SHAPE).example
    write_file(model, example, tmp_path / "model.pt2", input={}, target="cuda")
    paths = {"model": tmp_path / "model.pt2"}
    measured = latency(paths, example, target="cuda", rounds=1, seconds=0.01, threads=1)["model"]
    assert measured.runtime.startswith("cuda") and measured.p50_ms > 0
