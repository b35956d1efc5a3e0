"""What each table shows of the stored results: one function a table, from results to Markdown."""

from __future__ import annotations

from collections.abc import Callable

from cells import Column, Row, computed, files, interval, kilobytes, machine, ratio, table
from columns_low_precision import LOW_PRECISION
from columns_pruning import PRUNING
from columns_shift import SHIFTS
from columns_squeezenet import SQUEEZENET


def cifar10(contents: list[Row]) -> str:
    columns: dict[str, Column] = {
        "recipe": lambda row: " ".join([f"`{row['recipe']}`", *(f"`{each}`" for each in row["settings"])]),
        "model": lambda row: row["model"],
        "base top-1 %": lambda row: f"{row['base_top1']:.2f}",
        "top-1 % (95 %)": lambda row: f"{row['top1']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
        "file": files,
        "MACs": lambda row: f"{row['base_macs'] / 1e6:.1f} to {row['macs'] / 1e6:.1f} M",
        "time against base": lambda row: ratio(row["latency"]),
        "computed on": lambda row: row["on"],
    }
    rows = [content["rows"][0] for content in contents]
    caption = (
        "CIFAR-10, 10,000 test images, seed 0 where a row names no other; time: onnxruntime, batch 1, ratio to the "
        f"float32 base (5 rounds), all measured on {computed(contents[0], rows)}. "
        "`python benchmarks/cifar10.py RECIPE MODEL`"
    )
    return table(columns, rows, caption)


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
    content, *timed = contents
    times = {row["operator"]: row for row in timed[0]["rows"]} if timed else {}
    started = [row for row in content["rows"] if row["start"] == "trained"]
    noise = {row["operator"]: row for row in content["rows"] if row["start"] == "noise"}

    def after(row: Row | None, epochs: tuple[int, ...]) -> str:
        return " / ".join(f"{row[f'top1_{n}']:.2f}" for n in epochs) if row else "-"

    def against_base(row: Row, target: str) -> str:
        return ratio(times[row["operator"]][target]) if row["operator"] in times else "-"

    columns: dict[str, Column] = {
        "operator": lambda row: f"`{row['setting'].partition(',')[0]}`",
        "settings": lambda row: row["setting"].partition(",")[2].replace(":", " ").replace(",", ", "),
        "params": lambda row: f"{row['params']:,}",
        "MACs": lambda row: f"{row['macs'] / 1e6:.1f} M",
        "after 0 / 1 / 5 epochs, top-1 %": lambda row: after(row, (0, 1, 5)),
        "from noise, 1 / 5": lambda row: after(noise.get(row["operator"]), (1, 5)),
        "time in onnxruntime": lambda row: against_base(row, "onnxruntime"),
        "in torch": lambda row: against_base(row, "torch"),
        "computed on": lambda row: row["on"],
    }
    caption = (
        "ResNet-20 (91.73 %), all 3x3 convolutions but the first, CIFAR-10 test, seed 0, distillation from the base; "
        "time: batch 1, ratio to the base, measured on "
        f"{computed(timed[0] if timed else content, started)}. `python benchmarks/operators.py`"
    )
    return table(columns, started, caption)


def as_resnet(contents: list[Row]) -> str:
    (content,) = contents

    columns: dict[str, Column] = {
        "displacements": lambda row: row["variant"],
        "layers in whole pixels": lambda row: f"{row['whole_pixel_layers']} of 17",
        "cosine of logits": lambda row: f"{row['cosine']:.3f}",
        "top-1 % (95 %)": lambda row: f"{row['top1']:.1f} ({row['low']:.1f}-{row['high']:.1f})",
        "against float, points": lambda row: interval(row["paired"], 1),
    }
    epochs = content["recover"]["epochs"]
    caption = (
        f"The published AS-ResNet-w32 through `ConvertShift`; distilled: {epochs} epochs on 1,000 training images, no "
        "labels. 500 validation images of imagenette-mini among 1000 classes; cosines on photographs of other classes, "
        f"since what is solved or distilled on ten classes comes to prefer them. {machine(content)}. "
        "`python benchmarks/as_resnet.py`"
    )
    return table(columns, content["rows"], caption)


def papers(contents: list[Row]) -> str:
    rows = [row for content in contents for row in content["rows"]]
    seeds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        seeds.setdefault((row["protocol"], row["net"]), []).append(row)

    def mean(each: list[Row]) -> str:
        top1 = [f"{row['top1']:.2f}" for row in each]
        return f"{sum(map(float, top1)) / len(top1):.2f} ({', '.join(top1)})"

    columns: dict[str, Column] = {
        "net": lambda row: f"`{row['net']}`",
        "params": lambda row: f"{row['params']:,}",
        "MACs": lambda row: f"{row['macs'] / 1e6:.1f} M",
        "protocol": lambda row: f"{row['protocol']}, {row['epochs']} epochs",
        "top-1 %, mean (of seeds)": lambda row: mean(seeds[row["protocol"], row["net"]]),
        "published, full protocol": lambda row: f"{row['published']:.2f}" if row["published"] else "-",
        "where": lambda row: row["source"],
        "computed on": lambda row: row["on"],
    }
    caption = (
        "CIFAR-10 test, from nothing; in parentheses seeds 0, 1, 2. The shortened protocol reproduces no paper, but "
        f"ranks these networks among each other. {computed(contents[0], rows)}. `python benchmarks/papers.py [--full]`"
    )
    return table(columns, [each[0] for each in seeds.values()], caption)


SPARSE = {
    "resnet20": "ResNet-20 (91.73 %), the first half of recipe `sparse_shift`, 5 epochs",
    "shift_resnet20": "ShiftResNet-20, expansion 3, from nothing, 8 epochs",
    "shift_resnet20x6": "ShiftResNet-20, expansion 6, from nothing, 20 epochs",
    "shift_resnet20x6_frozen": "the same, then 20 epochs more with the displacements frozen",
}


def sparse_shift(contents: list[Row]) -> str:
    (content,) = contents

    def zeros(counts: Row, key: str = "zero") -> str:
        return f"{100 * counts[key] / counts['all']:.1f} %"

    columns: dict[str, Column] = {
        "net": lambda row: SPARSE[row["net"]],
        "l1": lambda row: f"{row['l1']:g}",
        "zero displacements": lambda row: zeros(row["displacements"]),
        "of them without weight": lambda row: zeros(row["displacements"], "empty"),
        "top-1 % (95 %)": lambda row: f"{row['top1']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
        "against l1 = 0, points": lambda row: interval(row["paired_free"]) if row["paired_free"] else "-",
        "params": lambda row: f"{row['params']:,}",
        "computed on": lambda row: row["on"],
    }
    caption = (
        "Shares are of all displacements. Copies of a channel that met on one place are one copy, and the others have "
        "no weight; two of three copies are then lost where all three are zero. CIFAR-10 test, seed 0. "
        f"{computed(content, content['rows'])}. `python benchmarks/sparse_shift.py`"
    )
    return table(columns, content["rows"], caption)


def sweep(contents: list[Row]) -> str:
    (content,) = contents
    columns: dict[str, Column] = {
        "taps": lambda row: str(row["taps"]),
        "top-1 %": lambda row: f"{row['top1']:.2f}",
        "file": lambda row: kilobytes(row["bytes"]),
        "found in the store": lambda row: ", ".join(row["from_the_store"]) or "nothing",
        "alone": lambda row: f"{row['alone_seconds']:.1f} s",
        "of it the base": lambda row: f"{row['alone_base_seconds']:.1f} s",
    }
    wall, alone = content["wall_seconds"], content["one_base_and_three_chains_seconds"]
    caption = (
        f"Recipe `shift_quant` on the digits, `stages.shift.taps=1,2,3` in one command: {wall} s, "
        f"{content['ratio']:.2f} of the {alone} s that one base and three chains take in runs that stand alone. "
        f"{machine(content)}. `{content['command']}`"
    )
    return table(columns, content["rows"], caption)


def throughput(contents: list[Row]) -> str:
    (content,) = contents
    columns: dict[str, Column] = {
        "a plain loop, images a second": lambda row: f"{row['images_per_second']['bare']:.0f}",
        "`FineTune`, images a second": lambda row: f"{row['images_per_second']['ours']:.0f}",
        "`FineTune`'s speed over the plain loop's": ratio,
    }
    caption = (
        f"{content['model']}, {content['data']}, {content['steps']} batches of {content['batch_size']} in bfloat16; "
        f"medians over {content['rounds']} rounds in turns, of the ratio too, with its smallest and largest. "
        f"{machine(content)}. `{content['command']}`"
    )
    return table(columns, content["rows"], caption)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    **LOW_PRECISION,
    "cifar10": cifar10,
    "shift_start": shift_start,
    "operators": operators,
    "sparse_shift": sparse_shift,
    "as_resnet": as_resnet,
    "papers": papers,
    **PRUNING,
    **SHIFTS,
    **SQUEEZENET,
    "sweep": sweep,
    "throughput": throughput,
    "digits": digits,
}
