"""What a checkpoint cannot say, and what cannot be written, is refused, and nothing is left behind."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import INPUT, STEPPED, Stepped, save
from torch import nn

from compress import models
from compress.errors import CheckpointError, UserError


def extra_parameter(model: nn.Module) -> None:
    model.layer1[0].register_parameter("gain", nn.Parameter(torch.ones(3)))


def extra_module(model: nn.Module) -> None:
    model.layer2[0].add_module("attention", nn.Linear(2, 2))


def unknown_class(model: nn.Module) -> None:
    model.layer1[0].conv1 = Stepped()


def removed_module(model: nn.Module) -> None:
    del model.layer1[0].shortcut


def changed_in_place(model: nn.Module) -> None:
    model.linear.weight = nn.Parameter(torch.ones(10, 5))


def unshared(model: nn.Module) -> None:
    model.layer1[0].conv2 = model.layer1[0].conv1


def foreign_parametrization(model: nn.Module) -> None:
    nn.utils.parametrizations.orthogonal(model.linear)


UNSAYABLE = {
    "layer1.0.gain` is a tensor of the model but not of its base": extra_parameter,
    "layer2.0.attention` is not in the base": extra_module,
    "layer1.0.conv1` is a .*Stepped, which the base": unknown_class,
    "layer1.0.shortcut` is in only one": removed_module,
    "linear.weight` is \\[10, 5\\], but": changed_in_place,
    "layer1.0.conv2.* is shared between": unshared,
    "linear.weight` is parametrized by _Orthogonal": foreign_parametrization,
}


@pytest.mark.parametrize("message", UNSAYABLE)
def test_what_a_checkpoint_cannot_say_is_refused_by_name(message: str, tmp_path: Path) -> None:
    model = models.small()
    UNSAYABLE[message](model)
    with pytest.raises(CheckpointError, match=message):
        save(model, tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_setting_outside_the_blueprint_is_noticed(tmp_path: Path) -> None:
    model = Stepped()
    model.factor = 2.0
    with pytest.raises(CheckpointError, match="computes other logits"):
        save(model, tmp_path / "model.safetensors", build=STEPPED)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"build": None}, "`build` \\(=None\\) says nothing about how the base model is made"),
        ({"build": ("small", {})}, "is not understood"),
        ({"build": ("compress.models.small", {"classes": object()})}, "JSON cannot hold"),
        ({"form": "zip"}, "`form` \\(='zip'\\) must be one of packed, training"),
        ({"provenance": {"when": object()}}, "must be plain JSON"),
        ({"results": {"loss": float("nan")}}, "must be plain JSON"),
        ({"results": {1: 2}}, "text keys"),
        ({"input": INPUT | {"mean": [0.5] * 3}}, "cannot run on what `input` says, a batch of shape \\(2, 3, 8, 8\\)"),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        save(models.small(), tmp_path / "model.safetensors", **given)
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        save(models.small(), tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        save(models.small(), tmp_path / "no" / "model.safetensors")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(models.small(), path)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written: File too large"):
            save(models.small(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["model.safetensors"]
