"""Int8 under torch.compile on an x86 processor: `model.x86.pt2` against the float network, eager and channels-last.

ResNet-20 and ResNet-56 through recipe `int8`. The base is in float32 with its batch norm folded and its weights
channels-last, run as it is. Both files are measured in turns, each in a process of its own. With names of models only
those are measured; with --once one short round, whose figures are printed and not kept.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx  # registers the operators of a model.x86.pt2
from common import cifar, compress, figures, record

from compress import load
from compress.lower import lower
from compress.lower.pt2 import exported
from compress.measure import latency

MODELS = ("resnet20", "resnet56")
BATCHES, THREADS, ROUNDS, SECONDS = (32, 1), 2, 7, 1.0
LEAST = 2.5  # how many times faster it should be at a batch of 32, where the processor multiplies int8 numbers (VNNI)


def eager(checkpoint: Path, example: torch.Tensor, path: Path) -> Path:
    """The float network as a file that runs channels-last: its weights lie so, and convolutions follow them."""
    plain = lower(load(checkpoint), "torch")
    plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    torch.export.save(exported(plain, example), path)
    return path


def kernels(path: Path, example: torch.Tensor) -> dict[str, int]:
    """Convolutions and linear layers of the file, and how many of them torch.compile makes integer kernels of."""
    import torch._inductor.config as inductor
    from torch._dynamo.utils import counters

    inductor.freezing = True
    counters.clear()
    model = torch.export.load(path).module()
    with torch.no_grad():
        torch.compile(model)(example)
    layers = [str(node.target) for node in model.graph.nodes if node.op == "call_function"]
    counted = {"layers": sum("conv2d" in name or "linear" in name for name in layers)}
    names = ("qconv_unary_lower_count", "qconv2d_binary_lower_count", "qlinear_unary_lower_count")
    return counted | {name.removesuffix("_lower_count"): counters["inductor"][name] for name in names}


def measured(model: str, folder: Path, rounds: int, seconds: float) -> list[dict[str, Any]]:
    example = torch.zeros(2, 3, 32, 32)
    report, _ = compress(folder, "recipe=int8", *cifar(model), "measure=none", "export=[pt2_x86]")
    (written,) = report["exports"]
    paths = {
        "fp32 eager": eager(folder / "out" / "base.safetensors", example, folder / "base.pt2"),
        "int8 compiled": folder / "out" / written["file"],
    }
    targets = {"fp32 eager": "torch", "int8 compiled": "torch.compile"}
    found = kernels(paths["int8 compiled"], example)
    rows = []
    for batch in BATCHES:
        both = latency(paths, example, target=targets, batch=batch, threads=THREADS, rounds=rounds, seconds=seconds)
        times_faster = round(1 / both["int8 compiled"].ratio, 2)
        row = {"model": model, "batch": batch, "times_faster": times_faster, "kernels": found}
        row |= {key: figures(report)[key] for key in ("base_top1", "top1", "parity")}
        row |= {"float_layers": written["float_layers"], "file_bytes": written["bytes"]}
        rows.append(row | {name: asdict(figure) for name, figure in both.items()})
    return rows


def main() -> None:
    once = "--once" in sys.argv
    named = [name for name in sys.argv[1:] if name != "--once"]
    warnings.simplefilter("ignore")  # torch's own pytree code
    rows = []
    for model in named or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows += measured(model, Path(folder), *((1, 0.3) if once else (ROUNDS, SECONDS)))
    for row in rows:
        print(f"{row['model']}, batch {row['batch']}: {row['times_faster']} times faster; {row['kernels']}")
    if not once:
        context: dict[str, Any] = {"data": "CIFAR-10; times on noise", "seed": 0, "precision": "float32 against int8"}
        context |= {"threads": THREADS, "rounds": ROUNDS, "least_at_batch_32": LEAST}
        record("torch_compile", rows, arguments=named, **context)


if __name__ == "__main__":
    main()
