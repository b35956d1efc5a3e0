"""Every recipe is carried out, shortened, and its ONNX file gives the network's answers in both runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from compress import config, plan
from compress.__main__ import compose
from compress.run import run
from compress.stage import Stage

# Recipes that are about other networks than the default, or about one that has learned something.
OTHERWISE: dict[str, Sequence[str]] = {
    "alexnet_fire": ("model=alexnet", "model.size=8", "model.train.epochs=1"),
    "convert_shift": ("model=shift_resnet20", "model.shift=active", "model.expansion=1", "model.train.epochs=1"),
    "tucker_vbmf": ("data.limit=null", "model.train.epochs=5", "stages.factorize.min_rank=1"),
}
SHORT: dict[str, Any] = {"epochs": 1, "images": 16, "calibration_images": 16, "iterations": 10}


def shortened(stage: Stage) -> Stage:
    """The same stage with little to do."""
    known = {each.name: getattr(stage, each.name) for each in fields(stage)}  # type: ignore[arg-type]  # dataclasses
    return replace(stage, **{name: value for name, value in SHORT.items() if known.get(name, 0) > value})  # type: ignore[type-var]


def in_onnxruntime(file: Path, images: torch.Tensor) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"input": images.numpy()})[0])


def in_openvino(file: Path, images: torch.Tensor) -> np.ndarray[Any, Any]:
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.asarray(compiled(images.numpy())[0])


@pytest.mark.parametrize("name", sorted(file.stem for file in config.RECIPES.glob("*.yaml")))
def test_a_recipe(name: str, tmp_path: Path) -> None:
    (job,) = compose([f"recipe={name}", "data=digits", "data.limit=64", *OTHERWISE.get(name, ())])
    ready = plan.make(job.settings | {"out": str(tmp_path), "cache": "off"})
    assert ready.train is not None
    result = run(
        {key: shortened(stage) for key, stage in ready.stages.items()},
        ready.task,
        build=ready.build,
        train=ready.train if name in OTHERWISE else shortened(ready.train),
        out=tmp_path / "out",
        export=["onnx"],
        measure="none",
        forms="default",
        cache=None,
    )
    images = next(iter(ready.task.test))[0][:7]
    with torch.no_grad():
        wanted = result.model(images).numpy()
    for runtime in (in_onnxruntime, in_openvino):
        given = runtime(tmp_path / "out" / "model.onnx", images)
        # An activation that lies half-way between two integers may fall to either side.
        assert np.abs(given - wanted).max() < 0.05 * np.abs(wanted).max() + 1e-4, runtime.__name__
    assert all(row["top1_agreement"] > 0.9 for row in result.report["exports"][0]["parity"])
