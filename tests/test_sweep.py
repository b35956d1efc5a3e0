"""The report over a sweep: from made-up reports, and from a real one on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import Reader, row, timing, top1
from torch import Tensor

import compress.__main__ as command_line
from compress import folders, sweep
from compress.config import Job
from compress.nn.shift import ShiftConv2d
from compress.sweep import Run

ROOT = Path(__file__).resolve().parents[1]


def test_the_front_is_what_no_other_beats() -> None:
    points: list[tuple[float, int] | None] = [(90.0, 100), (91.0, 200), (90.0, 150), None, (89.0, 90), (91.0, 200)]
    assert sweep.front(points) == [True, True, False, False, True, True]
    cloud = [(float(a), int(b)) for a, b in torch.randint(0, 12, (60, 2), generator=torch.manual_seed(0))]
    for (accuracy, size), on_front in zip(cloud, sweep.front(cloud), strict=True):
        dominated = any((a > accuracy and b <= size) or (a >= accuracy and b < size) for a, b in cloud)
        assert on_front == (not dominated)


def test_where_a_sweep_is_written() -> None:
    same = Path("outputs/runs/int8-small-digits")
    assert sweep.home([same, same]) == Path("outputs/runs/int8-small-digits-sweep")
    assert sweep.home([same, same.with_name("fire-small-digits")]) == Path("outputs/runs/small-digits-sweep")
    assert sweep.home([Path("/a/one"), Path("/b/two")]) == Path("/a/sweep")
    assert sweep.home([Path("here")]) == Path("here-sweep")


def reported(folder: Path, accuracy: int, size: int, **last: Any) -> Path:
    """A run's folder with a report of a base and this result."""
    folder.mkdir(parents=True)
    rows = [
        row("base", accuracy=top1(9000), bytes=1000, file="base.safetensors"),
        row("result", accuracy=top1(accuracy), bytes=size, file="model.safetensors", **last),
    ]
    content = {"format": 1, "recipe": "int8", "seed": 0, "target": "onnxruntime", "rows": rows, "seconds": 61.0}
    content |= {"model": {"factory": "compress.models.small"}, "data": {"name": "digits"}}
    (folder / "report.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def asked(*overrides: str) -> str:
    return "python -m compress recipe=int8 " + " ".join(overrides)


@pytest.fixture
def swept(tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """A sweep in which all can be seen: two runs of the front, one beaten, one failed, one broken, one not begun."""
    folder = tmp_path / "runs & <more>" / "sweep"
    folder.mkdir(parents=True)
    runs = [folder.with_name(f"x {number}") for number in range(4)]
    moved = {"all": 200, "zero": 50, "empty": 10}
    paired = {"difference": -1.0, "low": -1.2, "high": -0.8}
    reported(runs[0], 8900, 500, displacements=moved, paired=paired, latency=timing(0.6, 0.5))
    reported(runs[1], 8800, 400, displacements=moved | {"zero": 120})
    reported(runs[2], 8700, 450, displacements=moved | {"zero": 20})
    runs[3].mkdir()
    (runs[3] / "report.json").write_text("{}")
    content = sweep.write(
        [
            *(Run(asked(f"stages.a.bits={bits}", "seed=0"), 0, runs[n]) for n, bits in enumerate((8, 4, 3))),
            Run(asked("stages.a.bits=2", "seed=0"), 1, error="the loss is <NaN>."),
            Run(asked("stages.a.bits=1", "seed=0"), 0, runs[3]),
            Run(asked("stages.a.bits=0", "seed=0")),
        ],
        folder,
        "python -m compress -m recipe=int8 stages.a.bits=8,4,3,2,1,0 seed=0",
    )
    return content, folder


def test_a_sweep_as_json(swept: tuple[dict[str, Any], Path]) -> None:
    content, folder = swept
    assert json.loads((folder / "sweep.json").read_text(encoding="utf-8")) == content
    assert [row["overrides"] for row in content["rows"]] == [{"stages.a.bits": str(n)} for n in (8, 4, 3, 2, 1, 0)]
    assert [row["front"] for row in content["rows"]] == [True, True, False, False, False, False]
    assert [row["status"] for row in content["rows"]] == [*["done"] * 3, "failed", "failed", "unfinished"]
    assert [row["bytes"] for row in content["rows"]] == [500, 400, 450, None, None, None]
    assert content["rows"][0]["folder"] == "../x 0" and content["base"]["bytes"] == 1000
    assert "must be a result of format 1; it has None" in content["rows"][4]["error"]
    assert sorted(file.name for file in folder.iterdir()) == ["sweep.html", "sweep.json"]


def test_a_sweep_as_a_page(swept: tuple[dict[str, Any], Path]) -> None:
    page = Reader((swept[1] / "sweep.html").read_text(encoding="utf-8"))
    expected = """
        sweep over bits, 3 of 6 runs done: int8: small on digits, seed 0
        25.0 %
        -1.00 ±0.20
        0.6 (0.50x)
        run 4: failed
        the loss is <NaN>.
        run 6: unfinished
        bits=4
        stages.a.bits=8,4,3
    """
    for words in expected.strip().splitlines():
        assert words.strip() in page.text
    assert [link for link in page.addresses if link and link[0] != "#"] == [
        f"../x%20{number}/report.html" for number in range(3)
    ]
    assert not {"script", "link", "img"} & set(page.tags)
    assert page.tags.count("svg") == 2 and len(page.ids) == len(set(page.ids))


def test_a_sweep_as_a_table(swept: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str]) -> None:
    sweep.show(*swept)
    printed = capsys.readouterr().out.splitlines()
    assert " ".join(printed[1].split()) == (
        "run bits top-1 % vs base params MACs file bytes latency ms zero shifts time front"
    )
    assert " ".join(printed[2].split()).startswith("base - 90.00 ±0.55 - 269.7k 40.6M 1,000")
    assert printed[3].split()[:2] == ["1", "8"] and printed[3].endswith("*")
    assert printed[6].split()[:3] == ["4", "2", "failed"]
    assert printed[9] == "run 4 failed: the loss is <NaN>."
    assert printed[-1] == str(swept[1] / "sweep.html")


def test_keys_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    runs = [Run(asked(f"stages.a.bits={n}", f"stages.b.bits={n}", f"data.limit={n}")) for n in (1, 2)]
    content = sweep.collect(runs, tmp_path, "")
    assert sweep.columns(content)[1:4] == ["stages.a.bits", "stages.b.bits", "limit"]
    assert content["base"] is None and sweep.title(content).endswith(", 0 of 2 runs done")


class Runs:
    """Stands in for a run: writes a report; the run of this number is interrupted instead."""

    def __init__(self, interrupted: int = 0) -> None:
        self.begun, self.interrupted = 0, interrupted

    def __call__(self, job: Job) -> Run:
        self.begun += 1
        if self.begun == self.interrupted:
            raise KeyboardInterrupt
        out = folders.fresh(Path(job.settings["out"]))
        (out / "unfinished").rmdir()
        out.rmdir()
        return Run(job.command, 0, reported(out, 9000 - self.begun, 100 - self.begun))


def written(folder: str) -> dict[str, Any]:
    return dict(json.loads(Path(folder, "sweep.json").read_text(encoding="utf-8")))


def test_an_interrupted_sweep_reports_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "execute", Runs(interrupted=2))
    assert command_line.main(["-m", "recipe=int8", "seed=1,2", "out=r/x"]) == 130
    assert [row["status"] for row in written("r/x-sweep")["rows"]] == ["done", "unfinished"]
    printed = capsys.readouterr()
    assert "sweep over seed, 1 of 2 runs done" in printed.out
    assert printed.err.endswith("interrupted; the same command goes on where this one stopped.\n")

    monkeypatch.setattr(command_line, "execute", Runs())
    assert command_line.main(["-m", "recipe=int8", "seed=1,2", "out=r/x"]) == 0
    assert [row["folder"] for row in written("r/x-sweep-2")["rows"]] == ["../x-2", "../x-3"]
    assert [row["status"] for row in written("r/x-sweep")["rows"]] == ["done", "unfinished"]


def test_a_sweep_in_which_no_run_ended_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "execute", Runs(interrupted=1))
    assert command_line.main(["-m", "recipe=int8", "out=y"]) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_of_one_run_is_a_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "execute", Runs())
    assert command_line.main(["-m", "recipe=int8", "out=one"]) == 0
    content = written("one-sweep")
    assert [row["overrides"] for row in content["rows"]] == [{}]
    assert sweep.title(content) == "sweep, 1 run: int8: small on digits, seed 0, onnxruntime"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A real sweep over `l1` on a few digits: nothing pulls, everything is pulled to zero, the loss overflows."""
    folder = tmp_path_factory.mktemp("sweep")
    command = [
        *(sys.executable, "-m", "compress", "-m", "recipe=sparse_shift", "stages.shift.l1=0,0.5,1e38", "out=out"),
        *(
            "data.limit=80",
            "data.batch_size=16",
            "model.train.epochs=1",
            "stages.shift.images=16",
            "stages.shift.places=random",
            "stages.recover.epochs=4",
            *("~stages.prune", "~stages.settle"),  # which take copies out, and not the same ones
        ),
        *("export=[]", "measure=none", "precision=float32"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return folder, subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_real_sweep(real: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = real
    assert done.returncode == 1, done.stderr
    assert "error: `stages.recover`: the loss became inf" in done.stderr
    content = written(str(folder / "out-sweep"))
    assert [row["overrides"]["stages.shift.l1"] for row in content["rows"]] == ["0", "0.5", "1e+38"]
    assert [row["status"] for row in content["rows"]] == ["done", "done", "failed"]
    assert "the loss became inf" in content["rows"][2]["error"]
    for line, name in zip(content["rows"], ("out", "out-2"), strict=False):
        result = json.loads((folder / name / "report.json").read_text())["rows"][-1]
        assert line["folder"] == f"../{name}"
        for figure in ("accuracy", "paired", "params", "macs", "bytes", "displacements"):
            assert line[figure] == result[figure]
    free, pulled, _ = (line["displacements"] for line in content["rows"])
    assert free["zero"] < 0.5 * free["all"]
    assert pulled["zero"] == pulled["all"] == free["all"]
    assert "sweep over l1, 2 of 3 runs done: sparse_shift: small on digits" in done.stdout
    assert done.stdout.endswith("out-sweep/sweep.html\n")
    assert (folder / "out-sweep" / "sweep.html").exists() and not (folder / "out-sweep" / "unfinished").exists()


def test_a_run_counts_what_its_checkpoint_holds(real: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    from compress.checkpoint import load

    for name in ("out", "out-2"):
        rows = json.loads((real[0] / name / "report.json").read_text())["rows"]
        counts = {row["name"]: row["displacements"] for row in rows}
        assert counts["base"] is None and counts["recover"] == counts["result"]
        model = load(real[0] / name / "model.safetensors")
        all_moves, zero = 0, 0
        for layer in model.modules():
            if isinstance(layer, ShiftConv2d):
                for channel, copies in enumerate(layer.displacement.tolist()):
                    for copy, (y, x) in enumerate(copies):
                        column: Tensor = layer.pointwise.weight[:, channel * layer.taps + copy]
                        all_moves += 1
                        zero += (y == 0 and x == 0) or not column.any()
        assert counts["result"]["all"] == all_moves and counts["result"]["zero"] == zero
    assert "displacements are zero" in real[1].stdout
