"""`kill -9` at any moment, then the same command: the same checkpoint, byte for byte. With real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

COMMAND = [
    *(sys.executable, "-m", "compress", "recipe=shift_quant", "data.limit=200", "model.train.epochs=3"),
    *("stages.recover.epochs=3", "stages.polish.epochs=2", "stages.shift.images=64", "export=[]", "measure=none"),
]


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*COMMAND, *more], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def finish(folder: Path, *more: str) -> bytes:
    process = start(folder, *more)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    newest = max(folder.glob("outputs/runs/*/model.safetensors"), key=lambda file: file.stat().st_mtime)
    return newest.read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return finish(tmp_path_factory.mktemp("whole") / "run")


def stages_done(folder: Path) -> int:
    return len(list(folder.glob("outputs/cache/*/edit.json")))


def epochs_stored(folder: Path) -> int:
    return len(list(folder.glob("outputs/cache/*/work/state.safetensors")))


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "while the base is trained": lambda f: stages_done(f) == 0 and epochs_stored(f) > 0,
    "while the shifts are fitted": lambda f: stages_done(f) == 1,
    "in fine-tuning": lambda f: stages_done(f) == 2 and epochs_stored(f) > 0,
    "after quantization": lambda f: stages_done(f) == 4,
    "while the checkpoint is made": lambda f: stages_done(f) == 5,
}


def test_killed_at_several_moments_of_one_run(whole: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for moment, reached in MOMENTS.items():
        process = start(folder)
        deadline = time.monotonic() + 300
        while not reached(folder):
            assert process.poll() is None, f"ended before {moment!r}: {process.communicate()[1]}"
            assert time.monotonic() < deadline, moment
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert finish(folder) == whole


def test_twice_without_a_store_gives_the_same_bytes(whole: bytes, tmp_path: Path) -> None:
    assert finish(tmp_path / "run", "cache=off") == whole


def test_two_processes_use_one_store_at_once(whole: bytes, tmp_path: Path) -> None:
    first, second = start(tmp_path, "out=a"), start(tmp_path, "out=b")
    for process in (first, second):
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes() == whole
