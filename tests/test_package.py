"""What is handed out: the sdist, the wheel that is built from it, and both at work in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from that sdist."""
    pytest.importorskip("build", reason="needs the extra `dev`")
    pytest.importorskip("hatchling", reason="needs the extra `dev`")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def wanted(folder: str) -> set[str]:
    return {str(file.relative_to(ROOT)) for file in (ROOT / folder).rglob("*.yaml")}


def test_the_sdist_holds_what_a_build_and_its_tests_need(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert wanted("conf") | wanted("recipes") <= names
    assert {"pyproject.toml", "LICENSE", "README.md", "Makefile", "constraints.txt", "tests/test_package.py"} <= names
    assert not [name for name in names if name.startswith(("outputs", ".venv")) or name.endswith(".pyc")]


def test_the_wheel_holds_conf_and_recipes_inside_the_package(dist: Path) -> None:
    names = set(zipfile.ZipFile(next(dist.glob("*.whl"))).namelist())
    assert {f"compress/{name}" for name in wanted("conf") | wanted("recipes")} <= names
    source = {str(f.relative_to(ROOT)) for f in (ROOT / "compress").rglob("*") if f.suffix in (".py", ".j2")}
    assert {*source, "compress/py.typed"} <= names
    top = {name.partition("/")[0] for name in names}
    assert top == {"compress", next(name for name in top if name.endswith(".dist-info"))}


def test_the_wheel_works_in_an_empty_folder(dist: Path, tmp_path: Path) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "compress", *arguments]
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)

    (empty / "mine").mkdir()
    (empty / "mine" / "own.yaml").write_text("# A recipe of my own.\nstages: {}\n")
    shown = ask("--help", "hydra.searchpath=[recipes://mine]")
    assert shown.returncode == 0, shown.stderr
    assert "  int8           Int8 weights" in shown.stdout
    assert "  own            A recipe of my own.\n" in shown.stdout
    assert "data: cifar10, digits, fashion_mnist, folder, mnist\n" in shown.stdout
    refused = ask("recipe=own", "hydra.searchpath=[recipes://mine]", "device=tpu")
    assert refused.returncode == 2
    assert [line.split(" (")[0] for line in refused.stderr.splitlines()] == [
        "error: `device`",
        "error: `stages` must name at least one stage, such as `int8: {_target_: compress.stages.Quantize}`.",
    ]
    epochs = [f"{name}.epochs=1" for name in ("model.train", "stages.recover", "stages.polish")]
    done = ask("recipe=shift_quant", "data.limit=100", *epochs, "measure=none", "export=[onnx]")
    assert done.returncode == 0, done.stderr
    written = {file.name for file in (empty / "outputs/runs/shift_quant-small-digits").iterdir()}
    assert written >= {"model.safetensors", "model.onnx", "report.html", "report.json"}
    where = subprocess.run(
        [sys.executable, "-c", "from compress.config import CONF; print(CONF)"],
        cwd=empty, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.strip() == str(installed / "compress" / "conf")


def test_the_console_script_is_the_module() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'compress = "compress.__main__:main"' in text


def test_make_and_ci_do_the_same() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()
