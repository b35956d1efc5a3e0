"""The report's table, file and page, and the progress display."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from compress import progress, report
from compress.errors import UserError
from compress.page import render
from compress.task import Progress
from compress.wording import cells, params_text, seconds_text, short


def row(name: str, **given: Any) -> dict[str, Any]:
    empty = dict.fromkeys(
        ("stage", "accuracy", "paired", "agreement", "divergence", "bytes", "file", "latency", "energy_uj")
    )
    counts = {"params": 269722, "nonzero": 269000, "macs": 40551040, "uncounted": [], "activation_bytes": 753704}
    rest = {"settings": {}, "seconds": 1.0, "cached": False, "sites": [], "notes": {}, "history": []}
    return {"name": name, **empty, **counts, **rest, **given}


def top1(correct: int) -> dict[str, Any]:
    return {
        "correct": correct,
        "total": 10000,
        "top1": correct / 100,
        "low": correct / 100 - 0.6,
        "high": correct / 100 + 0.5,
    }


def site(name: str, after: str | None, why: str = "") -> dict[str, Any]:
    return {"name": name, "before": "Conv2d(16, 16, 3x3)", "after": after, "why": why}


def timing(p50: float, ratio: float) -> dict[str, Any]:
    place = {"runtime": "onnxruntime 1.31.1", "threads": 2, "batch": 1}
    return {**place, "p50_ms": p50, "p95_ms": 2 * p50, "ratio": ratio, "ratio_low": ratio, "ratio_high": ratio + 0.05}


@pytest.fixture
def result() -> dict[str, Any]:
    history = [{"epoch": e, "loss": 1 / e, "val_top1": 80.0 + e, "lr": 0.1, "seconds": 3.0} for e in range(1, 4)]
    shifted = [site("conv1", None, "excluded by 'conv1'"), site("layer1.0.conv1", "ShiftConv2d(16, 16, 3x3, taps=3)")]
    paired = {"difference": -0.53, "low": -0.84, "high": -0.22, "p": 0.001, "lost": 150, "gained": 97}
    notes = {"amount_requested": 0.5, "amount_achieved": 0.49, "ranks": {"conv1": 3}}
    rows = [
        row("base", accuracy=top1(9173), bytes=1_088_000, file="base.onnx", latency=timing(1.0, 1.0), energy_uj=361.0),
        row("shift", stage="Shift", settings={"taps": 3, "exclude": ["conv1"]}, accuracy=top1(8000), sites=shifted,
            nonzero=90000, agreement=0.81, divergence=0.7, seconds=61.0, notes=notes),
        row("recover", stage="FineTune", accuracy=top1(9100), history=history, cached=True),
        row("result", accuracy=top1(9120), paired=paired, bytes=148_321, file="model.safetensors",
            latency=timing(0.61, 0.61), energy_uj=60.0, uncounted=["head.norm"]),
    ]  # fmt: skip
    parity = [{"batch": b, "max_abs": 2e-5 * b, "top1_agreement": 1.0 - b / 1000} for b in (1, 2, 7)]
    return {
        "format": 1, "recipe": "shift_quant", "command": "python -m compress recipe=shift_quant", "seed": 0,
        "data": {"name": "cifar10", "fingerprint": "ab12", "sizes": {"train": 45000, "val": 5000, "test": 10000}},
        "model": {"factory": "compress.models.resnet20", "arguments": {"classes": 10}, "weights": "resnet20.th"},
        "device": "cpu", "precision": "bfloat16", "target": "onnxruntime", "val_seen": True,
        "versions": {"torch": "2.13.0"}, "hardware": {"cpu": "a cpu", "threads": 2}, "rows": rows,
        "exports": [{"file": "model.onnx", "bytes": 320_000, "parity": parity}],
        "checkpoint": {"file": "model.safetensors", "bytes": 148_321, "load": 'compress.load("model.safetensors")'},
        "store": [{"stage": "shift", "key": "0123abcd", "hit": False}],
    }  # fmt: skip


class Reader(HTMLParser):
    """Checks that tags are closed in order; collects text, ids and addresses."""

    VOID = ("meta", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.ids, self.addresses, self.tags = "", [], [], []  # type: ignore[var-annotated]  # obvious here
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_holds_what_was_found_and_nothing_from_elsewhere(result: dict[str, Any]) -> None:
    page = render(result)
    found = Reader(page)
    expected = """
        91.20 %
        -0.53 points against the base (-0.84 to -0.22, p = 0.001)
        148,321
        7.3 times smaller
        0.61 of the base's time (0.61 to 0.66)
        Energy, an estimate
        excluded by 'conv1'
        not counted: head.norm
        val seen by the base
        amount_requested
        top-1 agreement at least 99.3 %
        compress.load("model.safetensors")
        python -m compress recipe=shift_quant
        0123abcd
    """
    for words in expected.strip().splitlines():
        assert words.strip() in found.text
    assert len(found.ids) == len(set(found.ids))
    assert all(address.startswith("#") for address in found.addresses)
    assert not {"script", "link", "img"} & set(found.tags)
    assert found.tags.count("svg") == 2
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]\b", page)  # every stand-in became a colour of the page


def test_what_loading_takes_is_told(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    remark = "Load the checkpoint with `allow=['mypackage']` where you trust that code."
    result["checkpoint"]["remark"] = remark
    assert remark in Reader(render(result)).text
    report.show(result)
    assert f"\n  {remark}\n" in capsys.readouterr().out


def test_the_same_result_gives_the_same_page(result: dict[str, Any]) -> None:
    assert render(result) == render(deepcopy(result))


def test_names_from_outside_are_escaped(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    evil = "<script>alert(1)</script>[bold]$x_1$"
    result["recipe"] = result["rows"][-1]["name"] = result["rows"][-1]["file"] = evil
    result["rows"][1]["sites"][0]["why"] = result["rows"][1]["notes"][evil] = result["exports"][0]["file"] = evil
    result["checkpoint"]["load"] = result["versions"][evil] = evil
    found = Reader(render(result))
    assert "script" not in found.tags
    assert evil in found.text
    report.show(result)
    assert evil in capsys.readouterr().out


def test_write_and_read_back(result: dict[str, Any], tmp_path: Path) -> None:
    result["rows"][1]["divergence"] = float("inf")
    written, page = report.write(result, tmp_path)
    result["rows"][1]["divergence"] = None
    assert report.read(written) == result
    assert page.read_text(encoding="utf-8") == render(result)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_result_with_only_a_base_row_is_a_report_too(result: dict[str, Any], tmp_path: Path) -> None:
    result |= {"rows": [row("base", bytes=None)], "exports": [], "checkpoint": None, "store": [], "val_seen": False}
    report.write(result, tmp_path)
    assert "svg" not in Reader((tmp_path / "report.html").read_text(encoding="utf-8")).tags


def test_what_is_not_a_result_is_refused(result: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"`result` must be a result of format 1; it has 2\."):
        report.write({**result, "format": 2}, tmp_path)
    with pytest.raises(UserError, match="it lacks rows"):
        report.write({**result, "rows": []}, tmp_path)
    with pytest.raises(UserError, match=r"report.json` cannot be written: No such file or directory"):
        report.write(result, tmp_path / "gone")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x.json` cannot be read as a report.json: Expecting"):
        report.read(tmp_path / "x.json")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_plain_table_is_aligned(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    report.show(result)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "shift_quant: resnet20 on cifar10, seed 0, onnxruntime"
    head, base, shift, recover, last = lines[1:6]
    assert " ".join(head.split()) == "step top-1 % vs base params MACs file bytes latency ms time"
    assert " ".join(base.split()) == "base 91.73 ±0.55 - 269.7k 40.6M 1,088,000 1 (1.00x) 1.0 s"
    assert " ".join(shift.split()) == "shift 80.00 ±0.55 - 90.0k/269.7k 40.6M - - 61 s"
    assert recover.endswith("stored")
    assert last.split()[3:5] == ["-0.53", "±0.31"]
    assert "at least 40.6M" in last
    assert len({len(line) for line in (head, base, shift, last)}) == 1
    rest = "\n".join(lines[6:])
    assert "shift: 1 layers changed, 1 kept\n  kept conv1: excluded by 'conv1'" in rest
    assert "model.onnx  320,000 bytes  batch 1, 2, 7: differs from torch by at most 0.00014, top-1" in rest


def test_the_table_on_a_terminal_and_on_ascii(result: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    console.print(report.table(result))
    assert "91.73 ±0.55" in console.file.getvalue()  # type: ignore[attr-defined]  # a StringIO
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    report.show(result, stream)
    assert b"91.73 +-0.55" in raw.getvalue()


def test_short_texts() -> None:
    assert [short(n) for n in (None, 0, 999, 1000, 40551040, 2e9)] == ["-", "0", "999", "1.0k", "40.6M", "2.0G"]
    assert [seconds_text(s) for s in (None, 0.04, 61, 150, 9000)] == ["-", "0.0 s", "61 s", "2.5 min", "2.5 h"]
    assert params_text({"params": 100, "nonzero": 99}) == "100"
    assert len(cells([row("base")])[0]) == 8


def test_a_stored_report_is_drawn_again(result: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(result), encoding="utf-8")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "compress.report", *arguments]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)

    done = run(str(tmp_path / "mine.json"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "148,321" in done.stdout
    assert (tmp_path / "mine.html").read_text(encoding="utf-8") == render(result)
    failed = run(str(tmp_path / "gone.json"))
    assert failed.returncode == 2
    assert "gone.json` cannot be read as a report.json" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert run().returncode == 2


def test_lines_say_little() -> None:
    now, out = 0.0, io.StringIO()
    lines = progress.Lines(out, every=5.0, clock=lambda: now)
    lines.start("recover: epoch 1", 20)
    for _ in range(20):
        now += 1
        lines.step("loss 0.5")
    lines.end()
    assert out.getvalue().splitlines() == [
        "recover: epoch 1: 20 steps",
        "recover: epoch 1: 5 of 20 (25 %), 5 s, loss 0.5",
        "recover: epoch 1: 10 of 20 (50 %), 10 s, loss 0.5",
        "recover: epoch 1: 15 of 20 (75 %), 15 s, loss 0.5",
        "recover: epoch 1: done in 20 s, loss 0.5",
    ]


def test_bars_nest_and_give_the_terminal_back() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    bars = progress.Bars(out := Terminal())
    bars.start("outer", 2)
    bars.start("inner [x]", 0)
    bars.step("note [y]")
    bars.end()
    bars.step()
    bars.end()
    assert "inner [x]: done in 0 s note [y]" in out.getvalue()
    assert "outer: done in 0 s" in out.getvalue()
    bars.start("broken off", 3)
    bars.close()
    assert out.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in out.getvalue()[-60:]


def test_make_looks_at_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    plain: Progress = progress.make(stream)
    assert isinstance(plain, progress.Lines)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(stream, "isatty", lambda: True)
    shown: Progress = progress.make(stream)
    assert isinstance(shown, progress.Bars)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(progress.make(stream), progress.Lines)


def test_what_was_not_finished_is_told(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    result["failure"] = "no file can be made of this network."
    assert "Not finished: no file can be made" in Reader(render(result)).text
    report.show(result)
    assert "not finished: no file can be made" in capsys.readouterr().out
