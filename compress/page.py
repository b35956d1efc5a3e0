"""The report as one HTML page that needs nothing beside itself: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from compress import wording

# Stand-ins that the page's own colours replace, so that plots follow the reader's light or dark mode.
INK, ACCENT, SECOND = "#010203", "#040506", "#070809"
VARIABLES = {INK: "var(--ink)", ACCENT: "var(--accent)", SECOND: "var(--second)"}
KILOBYTES = "kB of the file (1000 bytes)"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compress",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
}


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
        wording.seconds_text,
        wording.displacements_text,
    ):
        environment.filters[function.__name__] = function
    environment.filters |= {"pretty": _pretty, "address": _address}
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


def accuracy_by_bytes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Top-1 with its interval over bytes of the row's file, as SVG; "" where fewer than two rows have both."""
    taken = [row for row in rows if row.get("accuracy") and row.get("bytes")]
    points = [Point(row["bytes"] / 1000, row["accuracy"], row["name"], row is taken[0]) for row in taken]
    return accuracy_over(points, KILOBYTES, "trade")


@dataclass(frozen=True)
class Point:
    """A network in a plot: where it stands, its accuracy as a report has it, what it is called."""

    x: float
    accuracy: Mapping[str, float]
    name: str
    base: bool = False
    joined: bool = False


def accuracy_over(points: Sequence[Point], label: str, prefix: str) -> str:
    """Top-1 with its interval over what `label` says, as SVG; "" for fewer than two points. A line joins some."""
    if len(points) < 2:
        return ""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        line = sorted((point.x, point.accuracy["top1"]) for point in points if point.joined)
        axes.plot([x for x, _ in line], [y for _, y in line], "-", color=ACCENT, linewidth=0.6)
        for i, point in enumerate(points):
            a = point.accuracy
            span = [[a["top1"] - a["low"]], [a["high"] - a["top1"]]]
            colour = SECOND if point.base else ACCENT
            axes.errorbar([point.x], [a["top1"]], yerr=span, fmt="o", color=colour, capsize=3, linewidth=1)
            above = i % 2 == 0
            axes.annotate(
                point.name,
                (point.x, a["top1"]),
                xytext=(6, 5 if above else -5),
                textcoords="offset points",
                va="bottom" if above else "top",
            )
        axes.set_xlabel(label)
        axes.set_ylabel("top-1 on test, %")
        axes.ticklabel_format(useOffset=False)
        axes.margins(x=0.18, y=0.12)

    return _svg(draw, (4.8, 3.0), prefix, f"top-1 on test over {label}")


def training_curves(history: Sequence[Mapping[str, Any]], prefix: str) -> str:
    """Loss, and accuracy on val where it was taken, by epoch, as SVG whose ids start with `prefix`."""

    def draw(figure: Figure) -> None:
        panels = [
            (key, label) for key, label in (("loss", "loss"), ("val_top1", "top-1 on val, %")) if _has(history, key)
        ]
        for i, (key, label) in enumerate(panels):
            axes: Axes = figure.add_subplot(1, len(panels), i + 1)
            taken = [entry for entry in history if entry.get(key) is not None]
            axes.plot(
                [e["epoch"] for e in taken], [e[key] for e in taken], "o-", color=ACCENT, markersize=3, linewidth=1
            )
            axes.set_xlabel("epoch")
            axes.set_title(label, fontsize=10)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return (
        _svg(draw, (4.8, 2.0), prefix, "training curves by epoch")
        if _has(history, "loss") or _has(history, "val_top1")
        else ""
    )


def _has(history: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(entry.get(key) is not None for entry in history)


def _svg(draw: Callable[[Figure], None], inches: tuple[float, float], prefix: str, label: str) -> str:
    with rc_context(STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        figure.patch.set_visible(False)
        draw(figure)
        for axes in figure.axes:
            axes.patch.set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Several plots on one page: ids must not meet.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg


def _pretty(value: Any) -> str:
    """A setting or note as people write it: text as it is, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
