"""The plots of the pages, as SVG that stands in the page itself."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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


def sensitivity(notes: Mapping[str, Any], prefix: str) -> str:
    """For every layer, the divergence that each number of bits for its weights brings; those it got are ringed."""
    table, taken = notes["sensitivity"], notes["weight_bits"]
    names = list(table)
    widths = sorted({int(bits) for options in table.values() for bits in options})

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, bits in enumerate(widths):
            off = [max(table[name][str(bits)]["divergence"], 1e-6) for name in names]
            shade = 0.25 + 0.75 * (1 - number / len(widths))
            axes.plot(range(len(names)), off, "o-", color=ACCENT, alpha=shade, markersize=3, linewidth=0.6)
            axes.annotate(f"{bits} bits", (len(names) - 1, off[-1]), (6, 0), textcoords="offset points", va="center")
        given = {name: taken if isinstance(taken, int) else taken[name] for name in names}
        chosen = [max(table[name][str(given[name])]["divergence"], 1e-6) for name in names]
        axes.plot(range(len(names)), chosen, "o", color=SECOND, markersize=7, fillstyle="none")
        axes.set_yscale("log")
        axes.set_ylabel("divergence, nats")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)

    return _svg(draw, (max(4.8, 0.16 * len(names) + 1), 3.4), prefix, "divergence by layer and bits")


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
