"""A run as a whole: rows, files, the store, and the laws that every stage keeps."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import noise_task
from omegaconf import OmegaConf
from torch import nn

import compress
import compress.stages
from compress import checkpoint
from compress.constructors import named
from compress.errors import ConfigError
from compress.run import run
from compress.stage import ORDER, Stage, order_problems
from compress.stages import (
    AdaRound,
    Cluster,
    ConvertShift,
    CorrectBias,
    Equalize,
    Factorize,
    FineTune,
    Fire,
    FoldBatchNorm,
    FreezeRanges,
    FreezeShifts,
    Group,
    Invert,
    MixedPrecision,
    PoolHead,
    Prune,
    PruneChannels,
    PruneShifts,
    Quantize,
    QuantizeDynamic,
    ReestimateBatchNorm,
    Separable,
    Shift,
    SparsifyChannels,
    SqueezeExcite,
)
from compress.task import Work

BUILD = ("compress.models.small", {"classes": 3, "channels": 2})
SHIFTED = ("compress.models.as_net", {"width": 8, "classes": 3, "channels": 2, "blocks": 1})
FLAT = ("test_pool_head.flat", {"classes": 3, "channels": 2})
SHAPE = (2, 8, 8)
# Settings with which each stage is quick; a stage without them fails `test_every_stage_is_tested`.
QUICK: dict[str, Stage] = {
    "AdaRound": AdaRound(images=16),
    "Cluster": Cluster(bits=4),
    "ConvertShift": ConvertShift(images=16),
    "CorrectBias": CorrectBias(images=16),
    "Equalize": Equalize(),
    "Factorize": Factorize(ratio=0.5, images=16),
    "FineTune": FineTune(epochs=1, lr=0.01),
    "Fire": Fire(images=16),
    "FoldBatchNorm": FoldBatchNorm(),
    "FreezeRanges": FreezeRanges(),
    "FreezeShifts": FreezeShifts(),
    "Group": Group(images=16),
    "Invert": Invert(images=16),
    "MixedPrecision": MixedPrecision(like_bits=4, bits=[3, 5], images=16, calibration_images=16),
    "PoolHead": PoolHead(images=16),
    "Prune": Prune(amount=0.3, images=16),
    "PruneChannels": PruneChannels(macs=0.6, images=16),
    "PruneShifts": PruneShifts(harm=0.2, zero=0.1, images=16),
    "Quantize": Quantize(calibration_images=16),
    "QuantizeDynamic": QuantizeDynamic(),
    "ReestimateBatchNorm": ReestimateBatchNorm(images=16),
    "Separable": Separable(images=16),
    "Shift": Shift(taps=3, images=16),
    "SparsifyChannels": SparsifyChannels(epochs=1, lr=0.01),
    "SqueezeExcite": SqueezeExcite(),
}

# After the first of these the second finds nothing to do: no norm, no layer with one neighbour, no weight of its own.
IDLE = {("Equalize", "Equalize"), ("Equalize", "FoldBatchNorm"), ("FoldBatchNorm", "FoldBatchNorm")}
IDLE |= {("Cluster", "AdaRound")} | {(first, "Equalize") for first in ("Fire", "Group", "PoolHead", "Shift")}
IDLE |= {("Factorize", "PruneChannels"), ("PruneChannels", "QuantizeDynamic")}  # factors; widths that are not 8s
IDLE |= {("Prune", "Prune"), ("Prune", "Equalize"), ("Factorize", "QuantizeDynamic"), ("PruneShifts", "Shift")}
REPLACING = {"Factorize", "Fire", "Group", "Invert", "Separable", "Shift"}  # every convolution that they can


def quick_run(out: Path, stages: dict[str, Stage] | None = None, **more: Any) -> compress.run.Result:  # type: ignore[name-defined]
    more = {"measure": "none", "cache": out.parent / "cache", "train": FineTune(epochs=1, lr=0.01)} | more
    return run(stages or {"shift": QUICK["Shift"]}, noise_task(SHAPE), build=BUILD, out=out, **more)


def base(*stages: str) -> tuple[str, dict[str, Any]]:
    """A network that has layers for all of these stages."""
    if "PoolHead" in stages:
        return FLAT
    return SHIFTED if {"ConvertShift", "FreezeShifts", "ReestimateBatchNorm"} & set(stages) else BUILD


def with_what_they_need(stages: dict[str, Stage]) -> dict[str, Stage]:
    """The stages, with a `Quantize` in front of the first that wants a quantized model, a `Shift` where shifts are."""
    given: dict[str, Stage] = {}
    for name, stage in stages.items():
        if isinstance(stage, PruneShifts) and not any(isinstance(before, Shift) for before in given.values()):
            given["needed"] = QUICK["Shift"]
        if isinstance(stage, AdaRound | CorrectBias | FreezeRanges) and not any(
            isinstance(before, Quantize | QuantizeDynamic) for before in given.values()
        ):
            given["needed"] = QUICK["Quantize"]
        given[name] = stage
    return given


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_stage_is_tested() -> None:
    assert set(QUICK) == set(compress.stages.__all__)
    kinds = {stage.kind for stage in QUICK.values()}
    assert kinds <= set(ORDER) and all(set(row) == set(ORDER) for row in ORDER.values())


@pytest.mark.parametrize("name", QUICK)
def test_law_1_settings_survive_a_trip_through_yaml(name: str) -> None:
    stage = QUICK[name]
    assert type(stage)(**asdict(stage)) == stage  # type: ignore[call-overload]
    text = OmegaConf.to_yaml(OmegaConf.structured(stage))
    assert type(stage)(**OmegaConf.to_container(OmegaConf.create(text))) == stage  # type: ignore[arg-type]


@pytest.mark.parametrize("name", QUICK)
def test_laws_of_stages(name: str, tmp_path: Path) -> None:
    stage, task = QUICK[name], noise_task(SHAPE)
    outcomes = []
    for number in range(2):
        torch.manual_seed(0)
        build = base(name)
        model = named(build[0])(**build[1]).eval()
        seen = {n for n, m in model.named_modules() if type(m) in getattr(stage, "kinds", ())}
        (tmp_path / str(number)).mkdir()
        for needed in list(with_what_they_need({name: stage}).values())[:-1]:
            model = needed(model, task, Work(tmp_path / str(number))).model
        edit = stage(model, task, Work(tmp_path / str(number), lineage="k"))
        assert edit.model(task.example).shape == (2, 3)
        assert seen <= {site.name for site in edit.sites}
        assert all(site.after is not None or site.why for site in edit.sites)
        json.dumps(dict(edit.notes))
        path = tmp_path / f"{number}.safetensors"
        edit.model.eval()
        checkpoint.save(edit.model, path, build=build, input=task.input, provenance={}, results={})
        loaded = checkpoint.load(path, allow=["test_pool_head"])
        torch.testing.assert_close(loaded(task.example), edit.model(task.example))
        outcomes.append(path.read_bytes())
    assert outcomes[0] == outcomes[1]


def test_law_5_a_pattern_that_matches_nothing() -> None:
    for stage in QUICK.values():
        for field in {"include", "exclude"} & set(asdict(stage)):  # type: ignore[call-overload]
            wrong = type(stage)(**{**asdict(stage), field: ["nowhere*"]})  # type: ignore[call-overload]
            with pytest.raises(ConfigError, match=rf"`{field}` has the pattern 'nowhere\*', which matches no layer"):
                wrong(compress.models.small(**BUILD[1]), noise_task(SHAPE), Work(Path()))  # type: ignore[attr-defined]


def test_a_whole_run_and_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {"shift": QUICK["Shift"], "recover": QUICK["FineTune"], "int8": QUICK["Quantize"]}
    result = quick_run(tmp_path / "out", stages, recipe="r", command="c")
    rows = result.report["rows"]
    assert [row["name"] for row in rows] == ["base", "shift", "recover", "int8", "result"]
    assert rows[-1]["bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert rows[-1]["bytes"] < rows[0]["bytes"] / 4
    assert rows[-1]["macs"] < 0.6 * rows[0]["macs"]
    assert rows[0]["accuracy"]["total"] == 32 and rows[1]["paired"] is not None
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert written["rows"][-1]["params"] == rows[-1]["params"]
    assert (tmp_path / "out/report.html").exists() and not (tmp_path / "out/unfinished").exists()
    loaded = compress.load(tmp_path / "out/model.safetensors")
    x = noise_task(SHAPE).example
    assert torch.equal(loaded(x), result.model(x))
    assert "result" in capsys.readouterr().out


def test_the_store_is_used_and_gives_the_same_bytes(tmp_path: Path) -> None:
    stages = {"shift": QUICK["Shift"], "recover": QUICK["FineTune"], "int8": QUICK["Quantize"], "polish": FineTune(1)}
    first = quick_run(tmp_path / "a", stages)
    again = quick_run(tmp_path / "b", stages)
    without = quick_run(tmp_path / "c", stages, cache=None)
    assert [hit["hit"] for hit in first.report["store"]] == [False] * 5
    assert [hit["hit"] for hit in again.report["store"]] == [True] * 5
    files = [digest(tmp_path / run / "model.safetensors") for run in "abc"]
    assert len(set(files)) == 1
    assert [hit["hit"] for hit in without.report["store"]] == [False] * 5


def test_a_sweep_shares_what_its_runs_have_in_common(tmp_path: Path) -> None:
    quick_run(tmp_path / "a", {"shift": Shift(taps=2, images=16)})
    result = quick_run(tmp_path / "b", {"shift": Shift(taps=3, images=16)})
    assert [(hit["stage"], hit["hit"]) for hit in result.report["store"]] == [("base", True), ("shift", False)]


def test_an_unreadable_entry_is_made_anew(tmp_path: Path) -> None:
    first = quick_run(tmp_path / "a")
    for hit in first.report["store"]:
        file = tmp_path / "cache" / hit["key"] / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-20])
    again = quick_run(tmp_path / "b")
    assert [hit["hit"] for hit in again.report["store"]] == [False, False]
    assert digest(tmp_path / "a/model.safetensors") == digest(tmp_path / "b/model.safetensors")


def test_a_model_instance_is_compressed_but_not_stored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    result = run([QUICK["Shift"]], noise_task(SHAPE), model=model, out=tmp_path / "out", measure="none")
    assert result.checkpoint is None and result.report["checkpoint"] is None
    assert [row["name"] for row in result.report["rows"]] == ["base", "shift", "result"]


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


# One of each kind, AdaRound, which comes after Quantize, and QuantizeDynamic, which makes other layers: every pair of
# them is run, the others with a few.
EACH_KIND = ("AdaRound", "Cluster", "Equalize", "Factorize", "FineTune", "FoldBatchNorm", "Prune", "PruneChannels")
EACH_KIND += ("Quantize", "QuantizeDynamic", "Shift")
WITH_ALL = ("Quantize", "Shift")


def pairs() -> list[tuple[str, str]]:
    """Of stages of one kind, which are alike, one stands for all, but for pairs with `WITH_ALL`."""
    return [(a, b) for a in QUICK for b in QUICK if {a, b} <= set(EACH_KIND) or {a, b} & set(WITH_ALL)]


@pytest.mark.parametrize(("first", "second"), pairs())
def test_every_legal_pair_runs_saves_and_reloads(first: str, second: str, tmp_path: Path, shared_cache: Path) -> None:
    stages = {"first": QUICK[first], "second": QUICK[second]}
    if {first, second} <= REPLACING:  # they have to share the convolutions
        stages = {
            "first": replace(QUICK[first], exclude=["conv1"]),  # type: ignore[type-var]  # stages are dataclasses
            "second": replace(QUICK[second], include=["conv1"]),  # type: ignore[type-var]  # likewise
        }
    stages = with_what_they_need(stages)
    if order_problems(stages):
        with pytest.raises(ConfigError, match=r"`stages.second` \(.*\) cannot come after `stages.(first|needed)`"):
            quick_run(tmp_path / "out", stages)
        return
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    task = noise_task(SHAPE, apart=3.0)  # classes far apart: one step of a grid must not turn an answer over
    trained = FineTune(epochs=10, lr=0.05)
    more: dict[str, Any] = {"build": base(first, second), "train": trained, "measure": "none", "cache": shared_cache}
    if (first, second) in IDLE:
        with pytest.raises(ConfigError, match=r"`stages.second`: the stage (would change nothing|found no layer)"):
            run(stages, task, out=tmp_path / "out", **more)
        return
    result = run(stages, task, out=tmp_path / "out", export=["onnx", "pt2"], **more)
    assert [export["file"] for export in result.report["exports"]] == ["model.onnx", "model.pt2"]
    for export in result.report["exports"]:
        assert {row["batch"] for row in export["parity"]} == {1, 2, 7}
        assert all(row["top1_agreement"] == 1.0 for row in export["parity"])
        # onnxruntime may round a value that lies between two steps of a grid to the other one: a step is at most 0.05
        # here, and answers are about 10
        grids = Quantize | QuantizeDynamic | (MixedPrecision if export["file"] == "model.onnx" else Quantize)
        close = 0.5 if any(isinstance(stage, grids) for stage in stages.values()) else 1e-4
        assert all(row["max_abs"] < close for row in export["parity"])


def test_cards_have_every_heading() -> None:
    for name in compress.stages.__all__:
        card = inspect.getdoc(inspect.getmodule(getattr(compress.stages, name))) or ""
        for heading in ("What it does.", "When to use it, and when not.", "Knobs.", "Measured.", "Reference."):
            assert heading in card, (name, heading)
