"""Accuracy right after pruning and factorizing, before any training: `surgery.py [ROW ...]`.

The published CIFAR-10 ResNets. Each row is one stage on the trained weights; `seconds` is what the stage itself took.
Without any row on the command line, all that are not stored yet are run.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from common import RESULTS, ROOT, cifar, compress, figures, here, record

WORK = ROOT / "outputs" / "benchmarks" / "surgery"
FIRST = "exclude:[conv1]"
TUCKER = f"Factorize,{FIRST}"
# name -> (model, stage and its settings)
ROWS = {
    "half": ("resnet20", "Prune,amount:0.5"),
    "half-unsolved": ("resnet20", "Prune,amount:0.5,refit:false"),
    "fifth": ("resnet20", "Prune,amount:0.8"),
    "fifth-unsolved": ("resnet20", "Prune,amount:0.8,refit:false"),
    "two-of-four": ("resnet20", f"Prune,pattern:'2:4',{FIRST}"),
    "tucker": ("resnet20", f"{TUCKER},ratio:0.49"),
    "tucker-unsolved": ("resnet20", f"{TUCKER},ratio:0.49,refine:false"),
    "tucker-params": ("resnet20", f"{TUCKER},params:0.494"),
    "tucker-macs": ("resnet20", "Factorize,macs:0.5"),
    "vbmf": ("resnet20", f"{TUCKER},vbmf:true"),
    "vbmf-weakened": ("resnet20", f"{TUCKER},vbmf:true,weaken:0.8,min_rank:21"),
    "tucker-macs-56": ("resnet56", "Factorize,macs:0.5"),
    "channels-1.45": ("resnet56", "PruneChannels,macs:0.69"),
    "channels-1.98": ("resnet56", "PruneChannels,macs:0.505"),
}
Row = dict[str, Any]


def run(name: str) -> Row:
    """One row: what is left of the network, and how right it is."""
    model, stage = ROWS[name]
    WORK.mkdir(parents=True, exist_ok=True)
    chosen = f"+stages.surgery={{_target_:compress.stages.{stage}}}"
    report, _ = compress(WORK, chosen, *cifar(model), "measure=none", "export=[]", out=name)
    found = figures({**report, "rows": [{"latency": None, **each} for each in report["rows"]]})
    kept = ("base_top1", "top1", "low", "high", "paired", "base_bytes", "bytes", "base_params", "params")
    nonzero = report["rows"][-1]["nonzero"]
    row = {"name": name, "model": model, "stage": stage, **{key: found[key] for key in kept}, "nonzero": nonzero}
    return row | {
        "base_macs": found["base_macs"],
        "macs": found["macs"],
        "seconds": found["seconds"]["surgery"],
        **here(),
    }


def main() -> None:
    file = RESULTS / "surgery.json"
    rows: list[Row] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    known = [row["name"] for row in rows]
    for name in sys.argv[1:] or [name for name in ROWS if name not in known]:
        if name not in ROWS:
            sys.exit(f"{name} is not one of {', '.join(ROWS)}")
        row = run(name)
        rows = sorted(
            [row, *(old for old in rows if old["name"] != name)], key=lambda each: list(ROWS).index(each["name"])
        )
        record("surgery", rows, data="CIFAR-10, 10,000 test images", seed=0)


if __name__ == "__main__":
    main()
