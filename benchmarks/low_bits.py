"""Few bits for weights, 8 for activations, on the published CIFAR-10 ResNets: `low_bits.py [MODEL/WAY-BITS ...]`.

Ways: `nearest` (scales by the largest weight), `mse` (scales by least squared error), `adaround` (mse, then rounded for
the layer's output), `mixed` (bits by layer in the bytes of a little less than BITS everywhere, then the same),
`learned` (mse, adaround, then fine-tuned with learned steps: 2 epochs, 5 for two bits). Without any row all that are
not stored yet are run; what rows have in common is computed once.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from common import RESULTS, ROOT, cifar, compress, figures, here, record

WORK = ROOT / "outputs" / "benchmarks" / "low_bits"
STAGES = {
    "nearest": ["Quantize,weight_bits:{bits}"],
    "mse": ["Quantize,weight_bits:{bits},weight_range:mse"],
    "adaround": ["Quantize,weight_bits:{bits},weight_range:mse", "AdaRound"],
    "mixed": ["MixedPrecision,like_bits:{less}", "AdaRound"],
    "learned": [
        "Quantize,weight_bits:{bits},weight_range:mse,learn:true",
        "AdaRound",
        "FineTune,epochs:{epochs},lr:{lr},distill:0.5,clip:1.0",
    ],
}
NETS = {
    "resnet20": ["nearest-8", *(f"{way}-4" for way in STAGES), *(f"{way}-3" for way in ("mse", "adaround", "mixed"))],
    "resnet56": ["nearest-8", "nearest-4", "adaround-4", "mixed-4"],
}
NETS["resnet20"] += ["nearest-2", "adaround-2", "learned-2"]
Row = dict[str, Any]


def run(model: str, way: str, bits: int) -> Row:
    """One row: the accuracies of its steps, and its files."""
    values = {"bits": bits, "less": bits - 0.1, "epochs": 5 if bits == 2 else 2, "lr": "1e-2" if bits == 2 else "1e-3"}
    stages = [f"{{_target_:compress.stages.{stage.format(**values)}}}" for stage in STAGES[way]]
    names = [f"+stages.{name}={stage}" for name, stage in zip(("quantize", "round", "train"), stages, strict=False)]
    WORK.mkdir(parents=True, exist_ok=True)
    report, seconds = compress(
        WORK, *names, *cifar(model), "measure=none", "export=[onnx]", out=f"{model}-{way}-{bits}"
    )
    row = figures({**report, "rows": [{"latency": None, **each} for each in report["rows"]]})
    chosen = report["rows"][1]["notes"].get("weight_bits")
    kept = ("base_top1", "top1", "low", "high", "steps", "paired", "base_bytes", "bytes", "parity", "seconds")
    return {
        "model": model,
        "way": way,
        "bits": bits,
        **{key: row[key] for key in kept},
        "layers": chosen if isinstance(chosen, dict) else None,
        "onnx_bytes": report["exports"][0]["bytes"],
        "wall_seconds": round(seconds, 1),
        **here(),
    }


def main() -> None:
    file = RESULTS / "low_bits.json"
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    known = [f"{row['model']}/{row['way']}-{row['bits']}" for row in rows]
    order = [f"{model}/{row}" for model, each in NETS.items() for row in each]
    for name in sys.argv[1:] or [name for name in order if name not in known]:
        if name not in order:
            sys.exit(f"{name} is not one of {', '.join(order)}")
        model, _, rest = name.partition("/")
        way, _, bits = rest.partition("-")
        row = run(model, way, int(bits))
        rows = [row, *(old for old in rows if (old["model"], old["way"], old["bits"]) != (model, way, int(bits)))]
        rows.sort(key=lambda each: order.index(f"{each['model']}/{each['way']}-{each['bits']}"))
        record("low_bits", rows, data="CIFAR-10, 10,000 test images", seed=0)


if __name__ == "__main__":
    main()
