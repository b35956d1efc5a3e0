"""A checkpoint as another format, later: from Python and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from random_task import quantize, task, warm

import compress
from compress import checkpoint
from compress.convert import convert, main
from compress.errors import CheckpointError, ConfigError, UserError
from compress.models import small

INPUT = {"order": "rgb", "scale": 255.0, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "size": [16, 16]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of one small network, in float and in 8 bits."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    model = warm(small(channels=3))
    paths = {}
    for name, each in {"float": model, "int8": quantize(warm(small(channels=3)), folder).model.eval()}.items():
        paths[name] = folder / f"{name}.safetensors"
        build = ("compress.models.small", {"classes": 10, "channels": 3})
        checkpoint.save(each, paths[name], build=build, input=INPUT, provenance={}, results={})
    return paths


def answers(path: Path, images: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


def test_every_format_from_one_checkpoint(files: dict[str, Path], tmp_path: Path) -> None:
    written = convert(files["int8"], ["onnx", "pt2", "pt2_x86"], tmp_path / "new")
    assert [file["file"] for file in written] == ["int8.onnx", "int8.pt2", "int8.x86.pt2"]
    assert all((tmp_path / "new" / file["file"]).stat().st_size == file["bytes"] for file in written)
    images = task().example
    wanted = compress.load(files["int8"])(images)
    torch.testing.assert_close(answers(tmp_path / "new/int8.onnx", images), wanted, atol=0.05, rtol=0.05)


def test_a_file_that_normalises_itself(files: dict[str, Path], tmp_path: Path) -> None:
    convert(files["float"], ["onnx"], tmp_path, normalize=True)
    images = task().example
    mean, std = (torch.tensor(INPUT[key]).view(-1, 1, 1) for key in ("mean", "std"))
    raw = (images * std + mean) * 255
    wanted = compress.load(files["float"])(images)
    torch.testing.assert_close(answers(tmp_path / "float.onnx", raw), wanted, atol=1e-4, rtol=1e-4)


def test_from_the_command_line(files: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "compress.convert", str(files["float"]), "--to", "onnx"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=files["float"].parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("float.onnx: ") and "on noise the same answers as in torch: 100 %" in done.stdout
    assert (files["float"].parent / "float.onnx").is_file()


def test_forms_are_measured_in_the_targets_own_files_only(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"`forms` \(='measured'\) .* on its own files, onnx, but the formats are pt2;"):
        convert(files["float"], ["pt2"], tmp_path, forms="measured")
    with pytest.raises(UserError, match="on its own files, pt2 or pt2_x86, but the formats are onnx;"):
        convert(files["float"], ["onnx"], tmp_path, forms="measured", target="torch.compile")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("compress.measure.timing.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"`target` \(='openvino'\) needs the package openvino, .*: pip install"):
        convert(files["float"], ["onnx"], tmp_path, target="openvino", forms="measured")
    assert convert(files["float"], ["onnx"], tmp_path, target="openvino")  # which takes no OpenVINO


@pytest.mark.parametrize("folder", ["file", "file/below", "/dev/null/x"])
def test_a_folder_that_cannot_be_made(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    (tmp_path / "file").touch()
    assert main([str(files["float"]), "--to", "onnx", "--out", str(tmp_path / folder)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: `out` (={tmp_path / folder}) cannot be made: ") and said.count("\n") == 1


def test_what_cannot_be_converted(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"`formats` \(=\['tflite'\]\) must be some of onnx, pt2, pt2_x86"):
        convert(files["float"], ["tflite"])
    with pytest.raises(UserError, match=r"`target` \(='abacus'\) must be one of onnxruntime"):
        convert(files["float"], ["onnx"], target="abacus")
    with pytest.raises(UserError, match=r"`forms` \(='best'\) must be one of measured, default"):
        convert(files["float"], ["onnx"], forms="best")
    with pytest.raises(UserError, match="`normalize` is for onnx, which is not among the formats"):
        convert(files["float"], ["pt2"], normalize=True)
    with pytest.raises(ConfigError, match=r"`export` \(=pt2_x86\) is for quantized models"):
        convert(files["float"], ["pt2_x86"], tmp_path)
    (tmp_path / "not.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"not\.safetensors"):
        convert(tmp_path / "not.safetensors", ["onnx"])
    assert main([str(tmp_path / "not.safetensors"), "--to", "onnx"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    untold = tmp_path / "untold.safetensors"
    build = ("compress.models.small", {"classes": 10, "channels": 3})
    checkpoint.save(small(channels=3), untold, build=build, input={}, provenance={}, results={})
    with pytest.raises(UserError, match="does not say how large its model's input is"):
        convert(untold, ["onnx"])
    assert json.loads(json.dumps(INPUT)) == compress.load(files["float"]).input
