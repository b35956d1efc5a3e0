"""What a sweep found over all of its runs: `sweep.json` for machines, `sweep.html` for people, a table.

Both files are written anew after each run, so a sweep that is interrupted or killed leaves them too. They refer to the
runs' folders by relative paths; where a run has written nothing, its error stands in its place.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from compress import report, wording
from compress.errors import UserError
from compress.files import write as write_file

FORMAT = 1
DONE, FAILED, UNFINISHED = "done", "failed", "unfinished"
# Of a run's last row.
FIGURES = (
    "accuracy",
    "paired",
    "params",
    "nonzero",
    "macs",
    "uncounted",
    "bytes",
    "file",
    "latency",
    "energy_uj",
    "displacements",
)
Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run: the command that starts it; once it has ended its exit code, and the report's folder or the error."""

    command: str
    code: int | None = None
    folder: Path | None = None
    error: str = ""


def home(outs: Sequence[Path]) -> Path:
    """Where a sweep's files belong: beside its first run's folder, named by what the names of all runs share.

    "runs/sparse_shift-resnet20-cifar10" for each of them gives "runs/sparse_shift-resnet20-cifar10-sweep".
    """
    words = zip(*(out.name.split("-") for out in outs), strict=False)
    return outs[0].with_name("-".join([*(word[0] for word in words if len(set(word)) == 1), "sweep"]))


def write(runs: Sequence[Run], folder: Path, command: str) -> Json:
    """Write sweep.json and sweep.html into `folder`, as far as the runs have come; gives back the former's content.

    Raises:
        UserError: a folder that cannot be written.
    """
    result = collect(runs, folder, command)
    write_file(folder / "sweep.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    from compress.page import render_sweep  # matplotlib and jinja2 take a second to load, and only a page needs them

    write_file(folder / "sweep.html", render_sweep(result, title(result), columns(result), cells(result)))
    return result


def collect(runs: Sequence[Run], folder: Path, command: str) -> Json:
    """One row for each run, in plain JSON: the overrides that not all runs share, and the figures of its result.

    `front` marks a run when no other has at least its accuracy in at most its bytes and is better in one of the two.
    `base` holds the base's figures where all runs start from the same ones.
    """
    rows: list[Json] = []
    bases: list[Json] = []
    titles: list[str] = []
    for number, (run, differs) in enumerate(zip(runs, _overrides(runs), strict=True), 1):
        figures: Json = dict.fromkeys((*FIGURES, "seconds", "folder"))
        status, error = UNFINISHED if run.code is None else FAILED if run.code else DONE, run.error
        if run.folder is not None and status == DONE:
            try:
                found = report.read(run.folder / "report.json")
            except UserError as unreadable:
                status, error = FAILED, str(unreadable)
            else:
                figures = {key: found["rows"][-1].get(key) for key in FIGURES}
                figures |= {"seconds": found.get("seconds"), "folder": os.path.relpath(run.folder, folder)}
                bases.append({key: found["rows"][0].get(key) for key in FIGURES if key != "latency"})
                titles.append(wording.title(found))
        row = {"run": number, "overrides": differs, "status": status, "error": error, "command": run.command}
        rows.append(row | figures)
    best = front([(row["accuracy"]["top1"], row["bytes"]) if _placed(row) else None for row in rows])
    for row, on_front in zip(rows, best, strict=True):
        row["front"] = on_front
    return {
        "format": FORMAT,
        "command": command,
        "about": titles[0] if len(set(titles)) == 1 else None,
        "differ": list(dict.fromkeys(key for row in rows for key in row["overrides"])),
        "base": bases[0] if bases and all(base == bases[0] for base in bases) else None,
        "rows": rows,
    }


def front(points: Sequence[tuple[float, int] | None]) -> list[bool]:
    """Which (accuracy, bytes) no other one beats: as good in both, and better in one. None is never one of them."""

    def beats(one: tuple[float, int], other: tuple[float, int]) -> bool:
        return one != other and one[0] >= other[0] and one[1] <= other[1]

    known = [point for point in points if point is not None]
    return [point is not None and not any(beats(other, point) for other in known) for point in points]


def title(result: Mapping[str, Any]) -> str:
    """What was swept, in a line."""
    rows = result["rows"]
    done = sum(row["status"] == DONE for row in rows)
    runs = f"{len(rows)} {'run' if len(rows) == 1 else 'runs'}"
    over = f" over {', '.join(_short(result['differ']))}" if result["differ"] else ""
    about = f": {result['about']}" if result["about"] else ""
    return f"sweep{over}, {runs if done == len(rows) else f'{done} of {runs} done'}{about}"


def columns(result: Mapping[str, Any]) -> list[str]:
    """The table's head; displacements have a column where there are any."""
    moved = ["zero shifts"] if any(row["displacements"] for row in result["rows"]) else []
    figures = ("top-1 %", "vs base", "params", "MACs", "file bytes", "latency ms", *moved, "time", "front")
    return ["run", *_short(result["differ"]), *figures]


def cells(result: Mapping[str, Any]) -> list[list[str]]:
    """The base where all runs share it, then the runs; short texts in the order of `columns`."""
    base, rows = result["base"], result["rows"]
    first: Json = {"run": "base", "overrides": {}, "status": DONE, "seconds": None, "latency": None, "front": False}
    moved = any(row["displacements"] for row in rows)
    return [
        [
            str(row["run"]),
            *(row["overrides"].get(key, wording.NONE) for key in result["differ"]),
            wording.accuracy_text(row["accuracy"]) if row["status"] == DONE else row["status"],
            wording.difference_text(row["paired"]),
            wording.params_text(row),
            ("at least " if row["uncounted"] else "") + wording.short(row["macs"]),
            wording.exact(row["bytes"]),
            wording.latency_text(row["latency"]),
            *([wording.zeros_text(row["displacements"])] if moved else []),
            wording.seconds_text(row["seconds"]),
            "*" if row["front"] else "",
        ]
        for row in ([first | base] if base else []) + rows
    ]


def show(result: Mapping[str, Any], folder: Path, stream: TextIO | None = None) -> None:
    """Print the table, what failed and why, and where the page is."""
    lines = [f"run {row['run']} {row['status']}: {row['error']}" for row in result["rows"] if row["error"]]
    if any(row["front"] for row in result["rows"]):
        lines.append("front: *, where no other run is as good in both accuracy and bytes and better in one")
    lines.append(str(folder / "sweep.html"))
    report.show_lines(title(result), columns(result), cells(result), lines, stream)


def _overrides(runs: Sequence[Run]) -> list[dict[str, str]]:
    """What each run's command sets that not all of them do."""
    asked = [dict.fromkeys(shlex.split(run.command)[3:]) for run in runs]  # behind "python -m compress"
    shared = set(asked[0]).intersection(*asked)
    differing = [[override for override in given if override not in shared] for given in asked]
    return [{key: value for key, _, value in (o.partition("=") for o in given)} for given in differing]


def _short(keys: Sequence[str]) -> list[str]:
    """The keys by their last part, where that tells them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]


def _placed(row: Mapping[str, Any]) -> bool:
    return bool(row["accuracy"] and row["bytes"])
