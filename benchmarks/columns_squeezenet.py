"""The tables about SqueezeNet's claims and Deep Compression: from stored results to Markdown, as in `columns.py`."""

from __future__ import annotations

from collections.abc import Callable

from cells import Column, Row, computed, files, interval, kilobytes, machine, table


def alexnet_fire(contents: list[Row]) -> str:
    (content,) = contents
    columns: dict[str, Column] = {
        "seed": lambda row: str(row["seed"]),
        "base top-1 %": lambda row: f"{row['base_top1']:.2f}",
        "right after substitution": lambda row: f"{row['steps']['head']:.2f}",
        "top-1 % (95 %)": lambda row: f"{row['top1']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
        "against base, points": lambda row: interval(row["paired"]),
        "params": lambda row: f"{row['base_params']:,} to {row['params']:,}",
        "fewer": lambda row: f"{row['base_params'] / row['params']:.0f}x",
        "file": files,
        "computed on": lambda row: row["on"],
    }
    caption = (
        "AlexNet for CIFAR, trained here for 40 epochs on labels and a ResNet-56's answers, to Fire modules and a "
        "pooled head by recipe `alexnet_fire`, whose fine-tuning learns from that ResNet-56 too. "
        f"CIFAR-10 test. {computed(content, content['rows'])}. `python benchmarks/alexnet_fire.py`"
    )
    return table(columns, content["rows"], caption)


def alexnet_deep(contents: list[Row]) -> str:
    (content,) = contents
    columns: dict[str, Column] = {
        "network": lambda row: {"deep": "AlexNet", "fire": "the Fire network made of AlexNet"}[row["name"]],
        "AlexNet's top-1 %": lambda row: f"{row['base_top1']:.2f}",
        "top-1 % (95 %)": lambda row: f"{row['top1']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
        "against AlexNet, points": lambda row: interval(row["paired"]),
        "AlexNet's file to this": files,
        "smaller than AlexNet's": lambda row: f"{row['base_bytes'] / row['bytes']:.0f}x",
        "computed on": lambda row: row["on"],
    }
    caption = (
        "The named network pruned, fine-tuned, clustered, fine-tuned, its file coded by entropy. Every row is counted "
        "from AlexNet for CIFAR in float32: what the Fire network saves before any of this is in the table above. "
        f"CIFAR-10 test, seed 0. {computed(content, content['rows'])}. `python benchmarks/alexnet_deep.py`"
    )
    return table(columns, content["rows"], caption)


def squeezenet_file(contents: list[Row]) -> str:
    (content,) = contents
    columns: dict[str, Column] = {
        "weights": lambda row: f"{row['weights']:,}",
        "not zero": lambda row: f"{row['nonzero']:,}",
        "in float32": lambda row: kilobytes(row["state_bytes"]),
        "its author's file": lambda row: kilobytes(row["his_bytes"]),
        "our file": lambda row: kilobytes(row["bytes"]),
        "of it weights / biases / the rest": lambda row: " / ".join(
            kilobytes(row[f"{part}_bytes"]) for part in ("weight", "bias", "other")
        ),
        "comes back bit by bit": lambda row: "yes" if row["bit_equal"] else "no",
    }
    caption = (
        f"{content['model']}, in which codes and gaps are not Huffman-coded. {machine(content)}. `{content['command']}`"
    )
    return table(columns, content["rows"], caption)


SQUEEZENET: dict[str, Callable[[list[Row]], str]] = {
    "alexnet_fire": alexnet_fire,
    "alexnet_deep": alexnet_deep,
    "squeezenet_file": squeezenet_file,
}
