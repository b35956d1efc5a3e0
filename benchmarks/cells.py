"""What tables of stored results are made of: rows to Markdown, and figures as people read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from common import where

Row = dict[str, Any]
Rows = list[Row]
Column = Callable[[Row], str]


def kilobytes(size: int) -> str:
    return f"{size / 1000:,.0f} kB" if size < 1e6 else f"{size / 1e6:,.2f} MB"


def machine(content: Row) -> str:
    hardware, versions = content["hardware"], content["versions"]
    gpu = f", {hardware['gpu']}" if hardware["gpu"] else ""
    return (
        f"{hardware['processor']}, {hardware['cores']} cores{gpu}; torch {versions['torch']}, "
        f"onnxruntime {versions['onnxruntime']}"
    )


def computed(content: Row, rows: Rows) -> str:
    """The machine that wrote the results and measured the times, and others on which rows were computed."""
    here, own = where(content["hardware"]), content["versions"]
    found = {(row["on"], row.get("versions", own if row["on"] == here else {}).get("torch", "")) for row in rows}
    places: dict[str, list[str]] = {}
    for on, torch in sorted(found - {(here, own["torch"])}):
        places.setdefault(torch, []).append(on)
    said = [
        f"Rows computed on {' and '.join(each)}: {f'torch {torch}' if torch else 'versions not stored'}"
        for torch, each in places.items()
    ]
    return ". ".join([machine(content), *said])


def tool(name: str, package: str, versions: Row) -> str:
    """Another tool with its version, where that is stored."""
    return f"{name} {versions[package]}" if package in versions else f"{name} of a version that is not stored"


def table(columns: Mapping[str, Column], rows: Rows, caption: str) -> str:
    """Without the columns that are empty in all rows."""
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    shown = {name: column for name, column in cells.items() if set(column) != {"-"}}
    lines = [list(shown), ["---"] * len(shown), *map(list, zip(*shown.values(), strict=True))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{caption}"


def files(row: Row) -> str:
    return f"{kilobytes(row['base_bytes'])} to {kilobytes(row['bytes'])}"


def ratio(latency: Row) -> str:
    return f"{latency['ratio']:.2f} ({latency['ratio_low']:.2f}-{latency['ratio_high']:.2f})"


def interval(pair: Row, digits: int = 2) -> str:
    """A paired difference with its 95 % interval, in points."""
    return f"{pair['difference']:+.{digits}f} ({pair['low']:+.{digits}f} to {pair['high']:+.{digits}f})"
