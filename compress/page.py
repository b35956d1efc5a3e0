"""The report as one HTML page that needs nothing beside itself: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from compress import wording
from compress.plots import KILOBYTES, Point, accuracy_by_bytes, accuracy_over, sensitivity, training_curves


def render(result: Mapping[str, Any]) -> str:
    """The page for a result; the same result gives the same text."""
    rows = result["rows"]
    return _template("report.html.j2").render(
        result=result,
        title=wording.title(result),
        headline=headline(rows),
        columns=wording.COLUMNS,
        rows=list(zip(rows, wording.cells(rows), strict=True)),
        reasons=wording.reasons,
        trade=Markup(accuracy_by_bytes(rows)),
        curves={
            i: Markup(training_curves(row["history"], f"h{i}")) for i, row in enumerate(rows) if row.get("history")
        },
        sensitivities={
            i: Markup(sensitivity(row["notes"], f"s{i}"))
            for i, row in enumerate(rows)
            if (row.get("notes") or {}).get("sensitivity")
        },
    )


def render_sweep(result: Mapping[str, Any], title: str, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """The page for a sweep (see sweep.py), with `cells` as its table; links lead to the runs' own pages."""
    rows, base = result["rows"], result["base"]
    placed = [({"run": "base", "front": False} | base, "base")] if base else []
    placed += [(row, _called(row)) for row in rows]
    sizes = [
        Point(row["bytes"] / 1000, row["accuracy"], name, base=row["run"] == "base", joined=row["front"])
        for row, name in placed
        if row["accuracy"] and row["bytes"]
    ]
    zeros = [
        Point(100 * counts["zero"] / counts["all"], row["accuracy"], _called(row), joined=True)
        for row in rows
        if (counts := row["displacements"]) and row["accuracy"]
    ]
    return _template("sweep.html.j2").render(
        result=result,
        title=title,
        columns=columns,
        lines=list(zip(([{"folder": None}] if base else []) + rows, cells, strict=True)),
        trade=Markup(accuracy_over(sizes, KILOBYTES, "trade")),
        zeros=Markup(accuracy_over(zeros, "displacements that are zero, %", "zeros")),
    )


def _called(row: Mapping[str, Any]) -> str:
    """What a plot calls a run: "l1=0.001" where that is short, else "run 3"."""
    values = [f"{key.rpartition('.')[2]}={value}" for key, value in row["overrides"].items()]
    return values[0] if len(values) == 1 and len(values[0]) <= 16 else f"run {row['run']}"


def _address(folder: str) -> str:
    """The address of a run's page, for a link."""
    return f"{quote(folder)}/report.html"


def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("compress"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (
        wording.exact,
        wording.short,
        wording.percent,
        wording.parity_text,
        wording.forms_text,
        wording.filling_text,
        wording.seconds_text,
        wording.displacements_text,
    ):
        environment.filters[function.__name__] = function
    environment.filters |= {"pretty": _pretty, "address": _address, "without": _without}
    return environment.get_template(name)


def headline(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """(what, figure, how it stands to the base) for the last row; a figure that was not taken is left out."""
    base, last = rows[0], rows[-1]
    found = []
    if last.get("accuracy"):
        a, paired = last["accuracy"], last.get("paired")
        against = f"95 % interval {a['low']:.2f} to {a['high']:.2f}, {a['correct']:,} of {a['total']:,} images"
        if paired:
            against += (
                f"; {paired['difference']:+.2f} points against the base "
                f"({paired['low']:+.2f} to {paired['high']:+.2f}, p = {paired['p']:.2g})"
            )
        found.append(("Top-1 on test", f"{a['top1']:.2f} %", against))
    if last.get("bytes") is not None:
        against = f"{last.get('file') or 'file'}"
        if base.get("bytes"):
            against += f"; {base.get('file') or 'the base'}: {base['bytes']:,} bytes, {_times(base, last, 'bytes')}"
        found.append(("Bytes", f"{last['bytes']:,}", against))
    if last.get("macs") is not None:
        against = f"base {wording.short(base.get('macs'))}"
        if last.get("uncounted"):
            against += f"; not counted: {', '.join(last['uncounted'])}"
        found.append(("Multiply-adds", wording.short(last["macs"]), against))
    if last.get("latency"):
        t = last["latency"]
        where = f"{t['runtime']}, {t['threads']} threads, batch {t['batch']}"
        against = f"{t['ratio']:.2f} of the base's time ({t['ratio_low']:.2f} to {t['ratio_high']:.2f}); {where}"
        found.append(("Latency, median", f"{t['p50_ms']:.3g} ms", against))
    if last.get("energy_uj") is not None:
        against = "per image, from published constants, not measured"
        if base.get("energy_uj") is not None:
            against += f"; base {base['energy_uj']:.3g} µJ"
        found.append(("Energy, an estimate", f"{last['energy_uj']:.3g} µJ", against))
    if last.get("displacements"):
        counts = last["displacements"]
        against = f"{counts['zero']:,} of {counts['all']:,} copies of channels stay where they are"
        if counts["empty"]:
            against += f"; {counts['empty']:,} of them have no weight"
        found.append(("Zero displacements", wording.zeros_text(counts), against))
    return found


def _times(base: Mapping[str, Any], last: Mapping[str, Any], key: str) -> str:
    return f"{base[key] / last[key]:.1f} times smaller" if last[key] else "nothing left"


def _pretty(value: Any) -> str:
    """A setting or note as people write it: text as it is, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _without(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in mapping.items() if name != key}
