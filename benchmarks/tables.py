"""Write the README's tables, and the measured row of each recipe, from the stored results. `--check` only compares."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from common import RESULTS, ROOT

Row = dict[str, Any]
Rows = list[Row]
Column = Callable[[Row], str]


def kilobytes(size: int) -> str:
    return f"{size / 1000:,.0f} kB" if size < 1e6 else f"{size / 1e6:,.2f} MB"


def machine(content: Row) -> str:
    hardware, versions = content["hardware"], content["versions"]
    return (
        f"{hardware['processor']}, {hardware['cores']} cores; torch {versions['torch']}, "
        f"onnxruntime {versions['onnxruntime']}"
    )


def table(columns: Mapping[str, Column], rows: Rows, caption: str) -> str:
    lines = [list(columns), ["---"] * len(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{caption}"


def files(row: Row) -> str:
    return f"{kilobytes(row['base_bytes'])} to {kilobytes(row['bytes'])}"


def ratio(latency: Row) -> str:
    return f"{latency['ratio']:.2f} ({latency['ratio_low']:.2f}-{latency['ratio_high']:.2f})"


def cifar10(contents: list[Row]) -> str:
    columns: dict[str, Column] = {
        "recipe": lambda row: f"`{row['recipe']}`",
        "model": lambda row: row["model"],
        "base top-1 %": lambda row: f"{row['base_top1']:.2f}",
        "top-1 % (95 %)": lambda row: f"{row['top1']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
        "file": files,
        "MACs": lambda row: f"{row['base_macs'] / 1e6:.1f} to {row['macs'] / 1e6:.1f} M",
        "time against base": lambda row: ratio(row["latency"]),
        "run takes": lambda row: f"{row['wall_seconds'] / 60:.0f} min",
    }
    caption = (
        "CIFAR-10, 10,000 test images, seed 0; time: onnxruntime, batch 1, ratio to the float32 base (5 rounds). "
        f"{machine(contents[0])}. `python benchmarks/cifar10.py RECIPE MODEL`"
    )
    return table(columns, [content["rows"][0] for content in contents], caption)


def shift_start(contents: list[Row]) -> str:
    (content,) = contents
    columns: dict[str, Column] = {
        "taps of 9": lambda row: str(row["taps"]),
        "top-1 %": lambda row: f"{row['top1']:.2f}",
        "params": lambda row: f"{row['params']:,}",
        "MACs": lambda row: f"{row['macs'] / 1e6:.1f} M",
        "time": lambda row: f"{row['seconds']} s",
    }
    caption = f"ResNet-20 (91.73 %), all 3x3 convolutions but the first, CIFAR-10 test. {machine(content)}. "
    return table(columns, content["rows"], caption + f"`{content['command']}`")


def digits(contents: list[Row]) -> str:
    (content,) = contents
    columns: dict[str, Column] = {
        "seed": lambda row: str(row["seed"]),
        "base top-1 %": lambda row: f"{row['base_top1']:.2f}",
        "top-1 %": lambda row: f"{row['top1']:.2f}",
        "file": files,
        "time against base": lambda row: f"{row['latency']['ratio']:.2f}",
        "whole command": lambda row: f"{row['wall_seconds']:.0f} s",
    }
    caption = f"`shift_quant`, 449 test images. {machine(content)}. `{content['command']}`"
    return table(columns, content["rows"], caption)


def operators(contents: list[Row]) -> str:
    (content,) = contents
    started = [row for row in content["rows"] if row["start"] == "trained"]
    noise = {row["operator"]: row for row in content["rows"] if row["start"] == "noise"}
    columns: dict[str, Column] = {
        "operator": lambda row: f"`{row['operator'].rpartition('-')[0]}`",
        "setting": lambda row: row["setting"].replace(":", " "),
        "params": lambda row: f"{row['params']:,}",
        "MACs": lambda row: f"{row['macs'] / 1e6:.1f} M",
        "after 0 / 1 / 5 epochs, top-1 %": lambda row: " / ".join(f"{row[f'top1_{n}']:.2f}" for n in (0, 1, 5)),
        "from noise, 1 / 5": lambda row: (
            " / ".join(f"{noise[row['operator']][f'top1_{n}']:.2f}" for n in (1, 5))
            if row["operator"] in noise
            else "-"
        ),
        "time in onnxruntime": lambda row: ratio(row["latency"]["onnxruntime"]),
        "in torch": lambda row: ratio(row["latency"]["torch"]),
    }
    caption = (
        "ResNet-20 (91.73 %), all 3x3 convolutions but the first, CIFAR-10 test, seed 0, distillation from the base; "
        f"time: batch 1, ratio to the base. {machine(content)}. `python benchmarks/operators.py`"
    )
    return table(columns, started, caption)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "cifar10": cifar10,
    "shift_start": shift_start,
    "operators": operators,
    "digits": digits,
}


def stored(name: str) -> list[Row]:
    files = [RESULTS / f"{name}.json", *sorted(RESULTS.glob(f"{name}-*.json"))]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def readme(text: str) -> str:
    for name, render in TABLES.items():
        contents = stored(name)
        body = f"\n{render(contents)}\n" if contents else "\n"
        text = re.sub(
            rf"(<!-- table: {name} -->)\n.*?(<!-- end -->)", lambda m, b=body: f"{m[1]}{b}{m[2]}", text, flags=re.DOTALL
        )
    return text


def recipe(name: str, text: str) -> str:
    rows = [row for content in stored("cifar10") for row in content["rows"] if row["recipe"] == name]
    measured = "not yet measured."
    if rows:
        row = rows[0]
        measured = (
            f"{row['model']}, CIFAR-10, seed 0: {row['base_top1']:.2f} to {row['top1']:.2f} %, "
            f"{kilobytes(row['base_bytes'])} to {kilobytes(row['bytes'])}, "
            f"time {row['latency']['ratio']:.2f} in onnxruntime at batch 1."
        )
    return re.sub(r"^# Measured: .*$", f"# Measured: {measured}", text, flags=re.MULTILINE)


def main() -> int:
    files = {ROOT / "README.md": readme}
    files |= {file: lambda text, n=file.stem: recipe(n, text) for file in sorted((ROOT / "recipes").glob("*.yaml"))}
    stale = []
    for file, render in files.items():
        old = file.read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            stale.append(file.name)
            if "--check" not in sys.argv:
                file.write_text(new, encoding="utf-8")
    print("stale: " + ", ".join(stale) if stale else "all tables are those of the stored results")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
