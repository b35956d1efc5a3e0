"""The tables about low precision: from stored results to Markdown, as in `columns.py`."""

from __future__ import annotations

from collections.abc import Callable

from cells import Column, Row, files, interval, kilobytes, machine, ratio, table, tool

WAYS = {
    "nearest": "to the nearest",
    "mse": "scales by squared error",
    "adaround": "`AdaRound`",
    "mixed": "`MixedPrecision`, `AdaRound`",
    "learned": "`AdaRound`, trained with learned steps",
}


def low_bits(contents: list[Row]) -> str:
    (content,) = contents
    columns: dict[str, Column] = {
        "model": lambda row: row["model"],
        "bits": lambda row: str(row["bits"]),
        "rounding": lambda row: WAYS[row["way"]],
        "top-1 % (95 %)": lambda row: f"{row['top1']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
        "against float, points": lambda row: interval(row["paired"]),
        "file": files,
        "ONNX file": lambda row: kilobytes(row["onnx_bytes"]),
    }
    caption = (
        "Weights of so many bits (`MixedPrecision`: on average a tenth less), activations of 8, calibrated on 1,024 "
        f"images; CIFAR-10 test, seed 0. {machine(content)}. `python benchmarks/low_bits.py`"
    )
    return table(columns, content["rows"], caption)


def mobilenet(contents: list[Row]) -> str:
    (content,) = contents
    columns: dict[str, Column] = {
        "network": lambda row: row["variant"],
        "top-1 % (95 %)": lambda row: f"{row['top1']:.1f} ({row['low']:.1f}-{row['high']:.1f})",
        "against float, points": lambda row: interval(row["paired"], 1),
        "other answers": lambda row: str(row["changed_answers"]),
        "file": lambda row: kilobytes(row["bytes"]),
    }
    caption = (
        "The published MobileNet-V1 0.75; 500 validation images of imagenette-mini among 1000 classes. Calibrated, and "
        "corrected, on training images of the same ten classes, which flatters what is solved on them. "
        f"{machine(content)}. `python benchmarks/mobilenet.py`"
    )
    return table(columns, content["rows"], caption)


def peers(contents: list[Row]) -> str:
    (content,) = contents

    def top1(name: str) -> Column:
        return lambda row: f"{row['accuracy'][name]['top1']:.2f}"

    def against(peer: str, batch: int) -> Column:
        return lambda row: ratio(row["latency"][f"{peer}, batch {batch}"]["ours"])

    columns: dict[str, Column] = {
        "network": lambda row: row["network"],
        "float, top-1 %": top1("float"),
        "ours": top1("ours"),
        "corrected": top1("ours, corrected"),
        "onnxruntime's": top1("onnxruntime"),
        "ours less onnxruntime's, points": lambda row: interval(row["ours_against"]["onnxruntime"]),
        "divergence from float, in thousandths: ours / corrected / onnxruntime's": lambda row: " / ".join(
            f"{1000 * row['divergence'][name]:.1f}" for name in ("ours", "ours, corrected", "onnxruntime")
        ),
        "ONNX file": lambda row: kilobytes(row["bytes"]["ours"]),
        "onnxruntime's file": lambda row: kilobytes(row["bytes"]["onnxruntime"]),
        "time against onnxruntime's, batch 1": against("onnxruntime", 1),
        "batch 32": against("onnxruntime", 32),
    }
    if all("nncf" in row["accuracy"] for row in content["rows"]):  # it is optional
        columns |= {
            "NNCF's": top1("nncf"),
            "NNCF's file": lambda row: kilobytes(row["bytes"]["nncf"]),
            "time against NNCF's, batch 1": against("nncf", 1),
            "batch 32 ": against("nncf", 32),
        }
    if all("torch_agrees_percent" in row for row in content["rows"]):
        columns["torch and the file agree"] = lambda row: f"{row['torch_agrees_percent']:.2f} %"
    caption = (
        f"Int8 without training, the same {content['calibration_images']:,} calibration images for all; ours: "
        "`Quantize` as in recipe `int8`, and with `CorrectBias` after it. Top-1 of the ONNX files in onnxruntime; time "
        "of ours against onnxruntime's own static quantization in onnxruntime, against NNCF's in OpenVINO. "
        f"{content['data']}. {machine(content)}, {tool('NNCF', 'nncf', content['versions'])}. "
        "`python benchmarks/peers.py`"
    )
    return table(columns, content["rows"], caption)


def torch_compile(contents: list[Row]) -> str:
    (content,) = contents
    columns: dict[str, Column] = {
        "model": lambda row: row["model"],
        "batch": lambda row: str(row["batch"]),
        "times faster": lambda row: f"{row['times_faster']:.2f}",
        "layers in int8": lambda row: (
            f"{sum(row['kernels'].values()) - row['kernels']['layers']} of {row['kernels']['layers']}"
        ),
        "float, ms": lambda row: f"{row['fp32 eager']['p50_ms']:.2f}",
    }
    caption = (
        "`model.x86.pt2` of recipe `int8` under `torch.compile` against the float network, batch norm folded, eager "
        f"and channels-last. {machine(content)}. `python benchmarks/torch_compile.py`"
    )
    return table(columns, content["rows"], caption)


def runtimes(contents: list[Row]) -> str:
    (content,) = contents

    def time(name: str, batch: int) -> Column:
        def cell(row: Row) -> str:
            (found,) = (r for r in content["rows"] if (r["model"], r["runtime"], r["batch"]) == (*key(row), batch))
            return ratio(found["int8"]) if name == "ratio" else f"{found[name]['p50_ms']:.2f}"

        return cell

    def key(row: Row) -> tuple[str, str]:
        return row["model"], row["runtime"]

    columns: dict[str, Column] = {
        "model": lambda row: row["model"],
        "runtime": lambda row: row["runtime"],
        "file": lambda row: f"`{row['file']}`",
        "float, batch 1, ms": time("float", 1),
        "int8": time("int8", 1),
        "int8 over float": time("ratio", 1),
        "float, batch 32, ms": time("float", 32),
        "int8 ": time("int8", 32),
        "int8 over float ": time("ratio", 32),
    }
    rows = [row for row in content["rows"] if row["batch"] == 1]
    caption = (
        "Recipe `int8` beside the float network in the same runtime; medians of a whole batch, the ratio with its "
        f"smallest and largest round; {machine(content)}. `python benchmarks/runtimes.py`"
    )
    return table(columns, rows, caption)


LOW_PRECISION: dict[str, Callable[[list[Row]], str]] = {
    "low_bits": low_bits,
    "mobilenet": mobilenet,
    "peers": peers,
    "runtimes": runtimes,
    "torch_compile": torch_compile,
}
