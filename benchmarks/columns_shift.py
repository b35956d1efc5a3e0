"""The tables about one shift layer: from stored results to Markdown, as in `columns.py`."""

from __future__ import annotations

from collections.abc import Callable

from cells import Column, Row, machine, table


def shift_latency(contents: list[Row]) -> str:
    (content,) = contents
    columns: dict[str, Column] = {
        "channels": lambda row: str(row["channels"]),
        "map": lambda row: f"{row['size']}x{row['size']}",
        "3x3, ms": lambda row: f"{row['p50_ms']['3x3']:.3f}",
        "1 tap / (depthwise + pointwise)": lambda row: f"{row['1 tap / (depthwise + pointwise)']:.2f}",
        "1 tap / 3x3": lambda row: f"{row['1 tap / 3x3']:.2f}",
        "3 taps, dense / 3x3": lambda row: f"{row['3 taps / 3x3']:.2f}",
        "3 taps, depthwise / dense": lambda row: f"{row['to the default']['shift, 3 taps: depthwise']:.2f}",
        "3 taps, slices / dense": lambda row: f"{row['to the default']['shift, 3 taps: slices']:.2f}",
        "chosen for 3 taps": lambda row: row["chosen"]["shift, 3 taps"],
    }
    caption = f"{content['target']}. {machine(content)}. `python benchmarks/shift_latency.py`"
    return table(columns, content["rows"], caption)


def shift_torch(contents: list[Row]) -> str:
    (content,) = contents
    columns: dict[str, Column] = {
        "what": lambda row: row["what"],
        "channels": lambda row: str(row["channels"]),
        "map": lambda row: f"{row['size']}x{row['size']}",
        "batch": lambda row: str(row["batch"]),
        "pointwise, ms": lambda row: f"{row['ms']['pointwise']:.3f}",
    }

    def share(key: str) -> Column:
        return lambda row: f"{row[key]:.2f}"

    shares = [f"{name} / pointwise" for name in ("shift, 1 tap", "depthwise + pointwise", "3x3")]
    columns |= {key: share(key) for key in shares}
    caption = (
        f"{content['target']}; inference {content['inference']}, training step {content['training']}. "
        f"{machine(content)}. `python benchmarks/shift_torch.py`"
    )
    return table(columns, content["rows"], caption)


def shift_cuda(contents: list[Row]) -> str:
    (content,) = contents

    def against(row: Row, name: str) -> str:
        found = row[f"{name} / pointwise"]
        return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"

    columns: dict[str, Column] = {
        "what": lambda row: row["what"],
        "of": lambda row: row["of"],
        "images": lambda row: str(row["images"]),
        "pointwise, ms": lambda row: f"{row['ms']['pointwise']:.3f}",
        "shift, 1 tap / pointwise": lambda row: against(row, "shift, 1 tap"),
        "shift, 3 taps": lambda row: against(row, "shift, 3 taps"),
        "depthwise + pointwise": lambda row: against(row, "depthwise + pointwise"),
        "3x3": lambda row: against(row, "3x3"),
    }
    caption = (
        "Median ratio to the pointwise convolution, with its smallest and largest round. "
        f"{content['hardware']['gpu']}, {content['precision']}; torch {content['versions']['torch']}. "
        "`python benchmarks/shift_cuda.py`"
    )
    return table(columns, content["rows"], caption)


SHIFTS: dict[str, Callable[[list[Row]], str]] = {
    "shift_latency": shift_latency,
    "shift_torch": shift_torch,
    "shift_cuda": shift_cuda,
}
