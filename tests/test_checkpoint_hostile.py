"""Files that are truncated, altered or made to harm: `CheckpointError`, quickly, and nothing else."""

from __future__ import annotations

import json
import os
import random
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress import checkpoint, models
from compress.errors import CheckpointError
from compress.nn.places import place_quantizers
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight
from compress.nn.shift import ShiftConv2d
from compress.sealed import seal, unseal
from compress.surgery import kind

Content = dict[str, Any]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small checkpoint with a bit of everything."""
    torch.manual_seed(0)
    model = models.small().eval()
    model.layer1[0].conv1 = ShiftConv2d(24, 4, 3, 2, padding=1, bias=False)
    model.layer1[0].bn1 = nn.BatchNorm2d(4)
    model.layer1[0].conv2 = nn.Sequential(nn.Conv2d(4, 24, 1, bias=False))
    for name in ("layer2", "layer3"):
        block = getattr(model, name)[0]
        wide = block.shortcut[0].out_channels
        block.conv1, block.bn1 = nn.Conv2d(block.conv1.in_channels, 2, 3, 2, 1), nn.Identity()
        block.conv2 = nn.Conv2d(2, wide, 1, bias=False)
    for module in list(model.modules()):
        if kind(module) is nn.Conv2d:
            grid = FakeQuantizeWeight(8, module.out_channels)
            grid.follow(module.weight)
            parametrize.register_parametrization(module, "weight", grid)
    model = place_quantizers(model.eval(), {"x:input:0": FakeQuantize(), "layer1.0:relu:0": FakeQuantize()})
    path = tmp_path_factory.mktemp("good") / "model.safetensors"
    facts: dict[str, Any] = {"provenance": {"seed": 0}, "results": {}}
    checkpoint.save(model, path, build=("compress.models.small", {}), input={"mean": [0.5], "size": [8, 8]}, **facts)
    return path.read_bytes()


def refused(data: bytes, folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def forged(data: bytes, change: Callable[[Content, dict[str, Tensor]], None]) -> bytes:
    """The same file after `change`, with a digest that is right."""
    content, tensors = unseal(data)
    change(content, tensors)
    return seal(content, tensors)


def test_the_good_file_is_good(good: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(forged(good, lambda content, tensors: None))
    assert (tmp_path / "model.safetensors").read_bytes() == good
    assert checkpoint.load(tmp_path / "model.safetensors")(torch.ones(2, 1, 8, 8)).shape == (2, 10)


def test_every_truncation_is_noticed(good: bytes, tmp_path: Path) -> None:
    lengths = {*range(0, 64), *range(0, len(good), 211), len(good) - 1}
    for length in sorted(lengths):
        refused(good[:length], tmp_path)
    refused(good + b"\0", tmp_path)


def test_every_flipped_bit_is_noticed(good: bytes, tmp_path: Path) -> None:
    header = 8 + int.from_bytes(good[:8], "little")
    dice = random.Random(0)
    places = [*range(16), *dice.sample(range(16, header), 300), *dice.sample(range(header, len(good)), 60)]
    for place in places:
        altered = bytearray(good)
        altered[place] ^= 1 << dice.randrange(8)
        if bytes(altered[:header].rstrip()) != good[:header].rstrip():
            refused(bytes(altered), tmp_path)
    for _ in range(60):
        altered = bytearray(good)
        altered[dice.randrange(header)] = dice.randrange(256)
        if altered != good:
            refused(bytes(altered), tmp_path)


def test_files_that_are_no_checkpoint(good: bytes, tmp_path: Path) -> None:
    assert "truncated" in refused(b"", tmp_path)
    assert "not a safetensors file" in refused(os.urandom(5000), tmp_path)
    assert "not a safetensors file" in refused(b"\xff" * 4096, tmp_path)
    assert "no blueprint" in refused(save({"x": torch.ones(3)}), tmp_path)
    assert "no blueprint" in refused(save({"x": torch.ones(3)}, metadata={"format": "pt"}), tmp_path)
    for text in ("", "[]", "null", "1", "{", "{}", "[" * 100_000, '{"a":' * 5000, "9" * 5000, "NaN"):
        assert "blueprint is damaged" in refused(save({}, metadata={"compress": text}), tmp_path)
    newer = forged(good, lambda content, tensors: content.update(format=2))
    assert "written in format 2" in refused(newer, tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.read(tmp_path / "absent")
    with pytest.raises(CheckpointError):
        checkpoint.load("null\0byte")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load(tmp_path / "pipe")


HUGE = [10**9, 2**31, 2**63, 10**30]
WRONG: list[Any] = [None, True, -1, 0, 2**24, *HUGE, 1e300, "", "x", "os.system", [], [1], [[]], {}, {"a": 1}, [None]]


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(p for key, item in inner for p in paths_in(item, (*path, key)))]


def test_wrong_values_anywhere_in_the_blueprint(good: bytes, tmp_path: Path) -> None:
    """Each value in turn becomes something else, with a right digest: the file loads, or `CheckpointError`."""
    content, tensors = unseal(good)
    structure = {name: part for name, part in content.items() if name not in ("provenance", "results", "input")}
    dice = random.Random(0)
    path = tmp_path / "model.safetensors"
    outcomes = {True: 0, False: 0}
    for place in paths_in(structure)[1:]:
        for wrong in dice.sample(WRONG, 1):
            forgery = json.loads(json.dumps(content))
            target = forgery
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = wrong
            path.write_bytes(seal(forgery, tensors))
            try:
                checkpoint.load(path)
                outcomes[True] += 1
            except CheckpointError:
                outcomes[False] += 1
    assert outcomes[False] > 10 * outcomes[True]


def test_missing_fields(good: bytes, tmp_path: Path) -> None:
    content, tensors = unseal(good)
    for name in content:
        refused(seal({n: v for n, v in content.items() if n != name}, tensors), tmp_path)
    refused(seal(content | {"hooks": []}, tensors), tmp_path)


def test_changed_tensors(good: bytes, tmp_path: Path) -> None:
    content, tensors = unseal(good)
    for name, tensor in tensors.items():
        others = {n: t for n, t in tensors.items() if n != name}
        for wrong in (
            *(tensor.reshape(-1)[:-1], tensor.reshape(1, -1), torch.cat([tensor.reshape(-1)] * 2)),
            *(torch.zeros(0), torch.tensor(1.0), torch.ones(tensor.shape, dtype=torch.float64)),
        ):
            if (wrong.dtype, wrong.shape) != (tensor.dtype, tensor.shape):
                refused(seal(content, others | {name: wrong.contiguous()}), tmp_path)
        assert name in refused(seal(content, others), tmp_path)
        refused(seal(content, tensors | {"extra": torch.ones(1)}), tmp_path)


def rebuilt(build: Any) -> Callable[[Content, dict[str, Tensor]], None]:
    return lambda content, tensors: content.update(build=build)


def described(*rows: Any, field: str = "modules") -> Callable[[Content, dict[str, Tensor]], None]:
    without: Content = {"modules": [], "parametrizations": [], "quantizers": []} if field == "modules" else {}
    return lambda content, tensors: content.update(without | {field: list(rows)})


DEEP = json.loads('[["0","Sequential",{"children":' * 40 + "[]" + "}]]" * 40)
CONV = {"in_channels": 1, "out_channels": 1, "kernel_size": 1}
HOSTILE = {
    "a shell": (rebuilt(["os.system", {"command": "touch owned"}]), "neither in"),
    "a class of ours": (rebuilt(["compress.sealed.write", {"path": "owned", "data": "x"}]), "neither in"),
    "a private factory": (rebuilt(["compress.models.cifar_resnet._group", {}]), "neither in"),
    "an attribute": (rebuilt(["compress.models.small.__globals__", {}]), "neither in"),
    "an import of torch": (rebuilt(["torch.nn.init", {}]), "neither in"),
    "no name": (rebuilt(["", {}]), "not understood"),
    "arguments that are none": (rebuilt(["compress.models.small", {"nonsense": 1}]), "cannot be built"),
    "a huge base": (rebuilt(["compress.models.small", {"classes": 2**24}]), "more than this file can fill"),
    "a base beyond bounds": (rebuilt(["compress.models.small", {"classes": 10**12}]), "no plain, small value"),
    "a negative base": (rebuilt(["compress.models.small", {"classes": -5}]), "cannot be built"),
    "an unknown class": (described(["Bilinear", {}, ["conv1"]]), "not in the table"),
    "a dotted class": (described(["os.system", {}, ["conv1"]]), "not in the table"),
    "a dunder class": (described(["__class__", {}, ["conv1"]]), "not in the table"),
    "a huge layer": (
        described(["Linear", {"in_features": 2**24, "out_features": 2**24}, ["linear"]]),
        "more than this file can fill",
    ),
    "an overflowing layer": (
        described(["Conv2d", {"in_channels": 2**24, "out_channels": 2**24, "kernel_size": 2**24}, ["linear"]]),
        "cannot be made|more than",
    ),
    "a huge layer of ours": (
        described(["ShiftConv2d", {**CONV, "in_channels": 2**24, "out_channels": 2**20, "taps": 1}, ["conv1"]]),
        "than this file can fill",
    ),
    "a negative layer": (described(["Conv2d", CONV | {"out_channels": -1}, ["linear"]]), "cannot be made"),
    "an argument too many": (described(["Conv2d", CONV | {"device": "cuda"}, ["linear"]]), "cannot be made|no plain"),
    "an argument that is a dict": (described(["Conv2d", CONV | {"bias": {}}, ["linear"]]), "no plain, small value"),
    "a name that is not there": (described(["Identity", {}, ["layer9.0"]]), "'layer9.0', which the base model"),
    "a dunder name": (described(["Identity", {}, ["__class__"]]), "'__class__', which the base model"),
    "a name inside a new module": (
        described(["Sequential", {"children": [["0", "Identity", {}]]}, ["layer1"]], ["Identity", {}, ["layer1.0"]]),
        "inside a module that it describes",
    ),
    "the same as its parent": (
        described(["Identity", {}, ["conv1"]], ["same", {"as": "layer1"}, ["layer1.0"]]),
        "does not describe",
    ),
    "the same as nothing": (described(["same", {"as": None}, ["conv1"]]), "names the module 'None'"),
    "children without end": (
        described(["Sequential", {"children": DEEP}]),
        "malformed row",
    ),
    "deep children": (
        described(
            [
                "Sequential",
                {"children": DEEP},
                ["bn1"],
            ]
        ),
        "must have `children`",
    ),
    "a dotted child": (
        described(["Sequential", {"children": [["a.b", "Identity", {}]]}, ["bn1"]]),
        "has a child called 'a.b'",
    ),
    "a tensor that is not there": (
        described([[["FakeQuantizeWeight", {}]], ["conv1.nothing"]], field="parametrizations"),
        "cannot be parametrized",
    ),
    "a property": (
        described([[["FakeQuantizeWeight", {}]], ["conv1.__dict__"]], field="parametrizations"),
        "cannot be parametrized",
    ),
    "a huge grid": (
        described([[["FakeQuantizeWeight", {"channels": 2**24}]], ["conv1.weight"]], field="parametrizations"),
        "more than this file can fill|not in the file|expected|codec needs|no scale",
    ),
    "a place that is not there": (
        described(["FakeQuantize", {}, ["nowhere:add:0"]], field="quantizers"),
        "'nowhere:add:0', which is not in the traced model",
    ),
    "a quantizer that is none": (described(["os.system", {}, ["x:input:0"]], field="quantizers"), "not in the table"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_blueprints(name: str, good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    change, message = HOSTILE[name]
    tracemalloc.start()
    text = refused(forged(good, change), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert re.search(message, text), text
    assert peak < 50e6
    assert sorted(os.listdir(tmp_path)) == ["model.safetensors"]


def test_a_declared_size_is_refused_before_it_is_allocated(good: bytes, tmp_path: Path) -> None:
    """A tensor whose header declares far more than the file has."""
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    for shape in ([2**60], [2**40, 2**40], [-1], [1e9], ["x"], 7):
        name = next(n for n in header if n != "__metadata__")
        text = json.dumps(header | {name: header[name] | {"shape": shape}}).encode()
        assert "safetensors" in refused(len(text).to_bytes(8, "little") + text + good[8 + length :], tmp_path)


def test_the_tensors_of_the_good_file_are_packed(good: bytes) -> None:
    content, tensors = unseal(good)
    assert set(load(good)) == set(tensors)
    assert any(codec.get("scaled") for codec, _ in content["codecs"])
