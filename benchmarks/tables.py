"""Write the README's tables, and the measured row of each recipe, from the stored results. `--check` only compares."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

from common import RESULTS, ROOT

Rows = list[dict[str, Any]]


def kilobytes(size: int) -> str:
    return f"{size / 1000:,.0f} kB" if size < 1e6 else f"{size / 1e6:,.2f} MB"


def machine(content: dict[str, Any]) -> str:
    hardware, versions = content["hardware"], content["versions"]
    return (
        f"{hardware['processor']}, {hardware['cores']} cores; torch {versions['torch']}, "
        f"onnxruntime {versions['onnxruntime']}"
    )


def table(header: list[str], lines: list[list[str]], caption: str) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + f"\n\n{caption}"


def cifar10(contents: list[dict[str, Any]]) -> str:
    lines = []
    for content in contents:
        row = content["rows"][0]
        latency = row["latency"]
        lines.append(
            [
                f"`{row['recipe']}`",
                row["model"],
                f"{row['base_top1']:.2f}",
                f"{row['top1']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
                f"{kilobytes(row['base_bytes'])} to {kilobytes(row['bytes'])}",
                f"{row['base_macs'] / 1e6:.1f} to {row['macs'] / 1e6:.1f} M",
                f"{latency['ratio']:.2f} ({latency['ratio_low']:.2f}-{latency['ratio_high']:.2f})",
                f"{row['wall_seconds'] / 60:.0f} min",
            ]
        )
    header = ["recipe", "model", "base top-1 %", "top-1 % (95 %)", "file", "MACs", "time against base", "run takes"]
    caption = (
        "CIFAR-10, 10,000 test images, seed 0; time: onnxruntime, batch 1, ratio to the float32 base (5 rounds). "
        f"{machine(contents[0])}. `python benchmarks/cifar10.py RECIPE MODEL`"
    )
    return table(header, lines, caption)


def shift_start(contents: list[dict[str, Any]]) -> str:
    (content,) = contents
    lines = [
        [
            str(row["taps"]),
            f"{row['top1']:.2f}",
            f"{row['params']:,}",
            f"{row['macs'] / 1e6:.1f} M",
            f"{row['seconds']} s",
        ]
        for row in content["rows"]
    ]
    caption = f"ResNet-20 (91.73 %), all 3x3 convolutions but the first, CIFAR-10 test. {machine(content)}. "
    return table(["taps of 9", "top-1 %", "params", "MACs", "time"], lines, caption + f"`{content['command']}`")


def digits(contents: list[dict[str, Any]]) -> str:
    (content,) = contents
    lines = [
        [
            str(row["seed"]),
            f"{row['base_top1']:.2f}",
            f"{row['top1']:.2f}",
            f"{kilobytes(row['base_bytes'])} to {kilobytes(row['bytes'])}",
            f"{row['latency']['ratio']:.2f}",
            f"{row['wall_seconds']:.0f} s",
        ]
        for row in content["rows"]
    ]
    header = ["seed", "base top-1 %", "top-1 %", "file", "time against base", "whole command"]
    return table(header, lines, f"`shift_quant`, 449 test images. {machine(content)}. `{content['command']}`")


Render = Callable[[list[dict[str, Any]]], str]
TABLES: dict[str, Render] = {"cifar10": cifar10, "shift_start": shift_start, "digits": digits}


def stored(name: str) -> list[dict[str, Any]]:
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
