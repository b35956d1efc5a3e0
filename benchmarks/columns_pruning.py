"""The tables about pruning and low rank: from stored results to Markdown, as in `columns.py`."""

from __future__ import annotations

from collections.abc import Callable

from cells import Column, Row, computed, files, interval, machine, ratio, table, tool


def surgery(contents: list[Row]) -> str:
    (content,) = contents
    columns: dict[str, Column] = {
        "model": lambda row: row["model"],
        "stage": lambda row: f"`{row['stage']}`",
        "top-1 % (95 %)": lambda row: f"{row['top1']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
        "weights that are not zero": lambda row: f"{row['nonzero'] / row['base_params']:.3f}",
        "MACs": lambda row: f"{row['macs'] / row['base_macs']:.3f}",
        "file": files,
        "stage takes": lambda row: f"{row['seconds']:.0f} s",
    }
    caption = (
        "Right after the stage, no training; weights and multiply-adds as shares of the base's. CIFAR-10, 10,000 test "
        f"images, seed 0. {machine(content)}. `python benchmarks/surgery.py`"
    )
    return table(columns, content["rows"], caption)


CHANNELS = {
    "ours": "`PruneChannels`",
    "ours-l1": "`PruneChannels`, by the L1 norm",
    "torch-pruning": "torch-pruning alone, by the L1 norm",
}


def channels(contents: list[Row]) -> str:
    (content,) = contents
    columns: dict[str, Column] = {
        "by": lambda row: CHANNELS[row["name"]],
        "MACs": lambda row: f"{row['base_macs'] / row['macs']:.2f}x fewer",
        "before fine-tuning, top-1 %": lambda row: f"{row['steps']['channels']:.2f}",
        "after, top-1 % (95 %)": lambda row: f"{row['top1']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
        "against base, points": lambda row: interval(row["paired"]),
        "params": lambda row: f"{row['base_params']:,} to {row['params']:,}",
        "time against base": lambda row: ratio(row["latency"]),
        "computed on": lambda row: row["on"],
    }
    theirs = {row["name"]: row.get("versions", {}) for row in content["rows"]}.get("torch-pruning", {})
    caption = (
        f"ResNet-56 ({content['rows'][0]['base_top1']:.2f} %), recipe `channels`, CIFAR-10 test, seed 0; "
        f"{tool('torch-pruning', 'torch-pruning', theirs)}; time in onnxruntime at batch 1, measured on "
        f"{computed(content, content['rows'])}. `python benchmarks/channels.py`"
    )
    return table(columns, content["rows"], caption)


def long_budgets(contents: list[Row]) -> str:
    (content,) = contents

    def setting(settings: list[str], name: str) -> str:
        return next(value for key, _, value in (each.partition("=") for each in settings) if key == name)

    columns: dict[str, Column] = {
        "recipe": lambda row: f"`{row['recipe']}`",
        "model": lambda row: row["model"],
        "MACs": lambda row: f"{row['base_macs'] / row['macs']:.2f}x fewer",
        "params": lambda row: f"{row['base_params']:,} to {row['params']:,}",
        "base top-1 %": lambda row: f"{row['base_top1']:.2f}",
        "before fine-tuning": lambda row: f"{[*row['first']['steps'].values()][-3]:.2f}",
        "epochs": lambda row: f"{setting(row['settings'], 'stages.recover.epochs')} + {row['again']['epochs']}",
        "taught by, width / epochs / top-1 %": lambda row: (
            f"{setting(row['teacher'], 'model.width')} / {setting(row['teacher'], 'model.train.epochs')} / "
            f"{row['teacher_top1']:.2f}"
        ),
        "after the first, top-1 %": lambda row: f"{row['first']['top1']:.2f}",
        "after all, top-1 % (95 %)": lambda row: f"{row['top1']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
        "against base, points": lambda row: interval(row["paired"]),
        "time against base": lambda row: ratio(row["latency"]),
        "computed on": lambda row: ", then ".join(dict.fromkeys((row["first"]["on"], row["on"]))),
        "threads": lambda row: "-" if row["threads"] is None else str(row["threads"]),
    }
    places = [place for row in content["rows"] for place in (row["first"], row)]
    caption = (
        "Teachers are wider ResNet-20s; `channels` is trained with mixup. The second training is without mixup, and "
        "taught by what the first of `channels` ended with. CIFAR-10 test, seed 0; time in onnxruntime at batch 1, "
        f"measured on {computed(content, places)}. `python benchmarks/long_budgets.py`"
    )
    return table(columns, content["rows"], caption)


PRUNING: dict[str, Callable[[list[Row]], str]] = {
    "surgery": surgery,
    "channels": channels,
    "long_budgets": long_budgets,
}
