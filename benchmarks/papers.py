"""The papers' CIFAR-10 tables, trained from nothing: `papers.py [--full] [NET[/SEED] ...]`.

With `--full` the published protocol: 164 epochs, batches of 128, learning rate 0.1 (a tenth after half of the epochs, a
hundredth after three quarters), weight decay 5e-4, seeds 0, 1, 2. Without it a SHORTENED one, named so in its rows and
table: 10 epochs with a cosine, the same seeds. A run that was killed goes on with the epoch it was in. One image of the
50,000 is held out and not trained on.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from common import RESULTS, ROOT, data_root, here, record
from torch import nn

from compress import progress
from compress.data import cifar10, make_task
from compress.measure import accuracy, profile
from compress.models import as_net, resnet20, shift_resnet20
from compress.stages import FineTune
from compress.task import Work
from compress.train import fit, logits


@dataclass(frozen=True)
class Net:
    """A network, its published top-1, and where that is published."""

    build: Callable[[], nn.Module]
    published: float | None
    source: str


REPOSITORY = "Wu et al., the authors' repository"
NETS = {
    "resnet20": Net(partial(resnet20, shortcut="conv"), 91.35, REPOSITORY),
    "grouped": Net(partial(shift_resnet20, shift="grouped"), 91.07, f"{REPOSITORY}; in the paper 90.59"),
    "random": Net(partial(shift_resnet20, shift="random"), None, "the baseline that learning has to beat"),
    "active": Net(partial(shift_resnet20, shift="active"), None, "the same network, displacements learned"),
    "sparse": Net(partial(shift_resnet20, shift="sparse"), 91.97, "a user's report on Chen et al."),
    "as_net": Net(partial(as_net, width=16, expansion=6), 92.54, "Jeon & Kim, [16 x 6], 0.19 M"),
}
PROTOCOLS = {
    "full": FineTune(epochs=164, lr=0.1, schedule="step", warmup_epochs=0.0),
    "shortened": FineTune(epochs=10, lr=0.1),
}
SEEDS = (0, 1, 2)


def trained(name: str, seed: int, protocol: str) -> dict[str, Any]:
    net, device = NETS[name], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = replace(PROTOCOLS[protocol], compile=protocol == "full" and device.type == "cuda")
    task = make_task(cifar10(root=data_root(), val_images=1, seed=seed), seed=seed, device=device)
    torch.manual_seed(seed)
    model = net.build()
    folder = ROOT / "outputs" / "benchmarks" / f"papers-{protocol}-{name}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    started, display = time.perf_counter(), progress.make()
    model, _ = fit(model, task, Work(folder, f"{protocol}/{name}", display), settings)
    display.close()
    out, labels = logits(model, task.test, task.device)
    shutil.rmtree(folder)
    counted = profile(model, task.example.to(device))
    row = {"net": name, "seed": seed, "protocol": protocol, "epochs": settings.epochs, **here()}
    row |= {"published": net.published, "source": net.source, "seconds": round(time.perf_counter() - started)}
    row |= {"params": counted.params, "macs": counted.macs}
    return row | accuracy(int((out.argmax(1) == labels).sum()), len(labels))


def main() -> None:
    named = [name for name in sys.argv[1:] if name != "--full"]
    protocol = "full" if "--full" in sys.argv else "shortened"
    stored, arguments = ("papers-full", ["--full"]) if protocol == "full" else ("papers", [])
    file = RESULTS / f"{stored}.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    known = {(row["net"], row["seed"]) for row in rows}
    every = [(name, seed) for seed in SEEDS for name in NETS]
    wanted = [(name.partition("/")[0], int(name.partition("/")[2] or 0)) for name in named]
    for name, seed in wanted or [each for each in every if each not in known]:
        if name not in NETS:
            sys.exit(f"{name} is not one of {', '.join(NETS)}")
        rows = [row for row in rows if (row["net"], row["seed"]) != (name, seed)] + [trained(name, seed, protocol)]
        record(stored, rows, "papers", arguments, data="CIFAR-10, 10,000 test images")


if __name__ == "__main__":
    main()
