"""Write the tables of README.md and benchmarks/README.md, and the measured row of each recipe, from the stored results.

`--check` only compares.
"""

from __future__ import annotations

import json
import re
import sys

from cells import Row, kilobytes
from columns import TABLES
from common import RESULTS, ROOT


def stored(name: str) -> list[Row]:
    files = [RESULTS / f"{name}.json", *sorted(RESULTS.glob(f"{name}-*.json"))]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def tables(text: str) -> str:
    for name in re.findall(r"<!-- table: (\w+) -->", text):
        contents = stored(name)
        body = f"\n{TABLES[name](contents) if contents else 'Not measured yet.'}\n"
        text = re.sub(
            rf"(<!-- table: {name} -->)\n.*?(<!-- end -->)", lambda m, b=body: f"{m[1]}{b}{m[2]}", text, flags=re.DOTALL
        )
    return text


def recipe(name: str, text: str) -> str:
    every = [row for content in stored("cifar10") for row in content["rows"]]
    rows = [row for row in every if row["recipe"] == name and not row["settings"]]
    measured = "not yet measured."
    if rows:
        row = rows[0]
        measured = (
            f"{row['model']}, CIFAR-10, seed 0: {row['base_top1']:.2f} to {row['top1']:.2f} %, "
            f"{kilobytes(row['base_bytes'])} to {kilobytes(row['bytes'])}, "
            f"time {row['latency']['ratio']:.2f} in onnxruntime at batch 1."
        )
    elif name == "alexnet_fire" and (contents := stored(name)):
        row = contents[0]["rows"][0]
        measured = (
            f"alexnet, CIFAR-10, seed {row['seed']}, `benchmarks/alexnet_fire.py`: {row['base_top1']:.2f} to "
            f"{row['top1']:.2f} %, {kilobytes(row['base_bytes'])} to {kilobytes(row['bytes'])}."
        )
    return re.sub(r"^# Measured: .*$", f"# Measured: {measured}", text, flags=re.MULTILINE)


def main() -> int:
    files = {ROOT / "README.md": tables, ROOT / "benchmarks" / "README.md": tables}
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
