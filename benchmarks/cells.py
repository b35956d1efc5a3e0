"""What tables of stored results are made of: rows to Markdown, and figures as people read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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


def table(columns: Mapping[str, Column], rows: Rows, caption: str) -> str:
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{caption}"


def files(row: Row) -> str:
    return f"{kilobytes(row['base_bytes'])} to {kilobytes(row['bytes'])}"


def ratio(latency: Row) -> str:
    return f"{latency['ratio']:.2f} ({latency['ratio_low']:.2f}-{latency['ratio_high']:.2f})"


def interval(pair: Row, digits: int = 2) -> str:
    """A paired difference with its 95 % interval, in points."""
    return f"{pair['difference']:+.{digits}f} ({pair['low']:+.{digits}f} to {pair['high']:+.{digits}f})"
