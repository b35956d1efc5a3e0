"""Published numbers are those of the stored runs, and each can be made again."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
STORED = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture
def benchmark_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_tables_are_generated_from_stored_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", STORED, ids=lambda file: file.stem)
def test_a_stored_result_has_its_script_and_its_table(file: Path) -> None:
    name = file.stem.partition("-")[0]
    content = json.loads(file.read_text(encoding="utf-8"))
    python, script, *arguments = shlex.split(content["command"])
    assert (python, script) == ("python", f"benchmarks/{name}.py") and (ROOT / script).exists()
    assert bool(arguments) == (name != file.stem), "without arguments a command makes all rows"
    shown = [(ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in (".", "benchmarks")]
    assert any(re.search(rf"<!-- table: {name} -->\n\|", text) for text in shown)


@pytest.mark.usefixtures("benchmark_modules")
def test_a_column_that_is_empty_in_all_rows_is_left_out() -> None:
    table: Any = import_module("cells").table
    columns = {name: lambda row, name=name: row[name] for name in ("a", "b", "c")}
    rows = [{"a": "1", "b": "-", "c": "-"}, {"a": "2", "b": "-", "c": "3"}]
    assert table(columns, rows, "Said.") == "| a | c |\n| --- | --- |\n| 1 | - |\n| 2 | 3 |\n\nSaid."


@pytest.mark.usefixtures("benchmark_modules")
def test_captions_say_whose_versions_they_are() -> None:
    cells: Any = import_module("cells")
    versions = {"torch": "2.13.0", "onnxruntime": "1.31.1"}
    content = {"hardware": {"processor": "P", "cores": 2, "gpu": None}, "versions": versions}
    rows: list[dict[str, Any]] = [{"on": "P, 2 cores"}, {"on": "P, 2 cores", "versions": versions}]
    assert cells.computed(content, rows) == "P, 2 cores; torch 2.13.0, onnxruntime 1.31.1"
    rows += [{"on": "A"}, *({"on": on, "versions": {"torch": "2.11.0"}} for on in "BC")]
    rows += [{"on": "P, 2 cores", "versions": {"torch": "2"}}]
    assert cells.computed(content, rows) == (
        "P, 2 cores; torch 2.13.0, onnxruntime 1.31.1. Rows computed on A: versions not stored. "
        "Rows computed on B and C: torch 2.11.0. Rows computed on P, 2 cores: torch 2"
    )


@pytest.mark.usefixtures("benchmark_modules")
@pytest.mark.parametrize(
    ("recipe", "model", "settings", "message"),
    [
        ("int8", "resnet20", [], "recipe tucker, where the row has int8"),
        ("tucker", "resnet56", [], "model resnet20, where the row has resnet56"),
        ("tucker", "resnet20", ["stages.factorize.macs=0.4"], "seed 1, where the row has 0"),
        ("tucker", "resnet20", ["seed=1"], r"stages \['stages.factorize.macs=0.4'\], where the row has \[\]"),
    ],
)
def test_a_run_that_ended_elsewhere_must_be_that_of_the_row(
    recipe: str, model: str, settings: list[str], message: str, tmp_path: Path
) -> None:
    report = {"recipe": "tucker", "model": {"factory": "compress.models.resnet20"}, "seed": 1}
    report["command"] = "python -m compress recipe=tucker data=cifar10 seed=1 'stages.factorize.macs=0.4' measure=none"
    (tmp_path / "report.json").write_text(json.dumps(report))
    common: Any = import_module("common")
    with pytest.raises(SystemExit, match=rf"holds another run: .*{message}"):
        common.finished(tmp_path, recipe, model, settings)
