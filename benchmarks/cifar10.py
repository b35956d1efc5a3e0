"""A recipe on CIFAR-10 with a published ResNet, from its weights alone: `cifar10.py RECIPE [MODEL] [KEY=VALUE ...]`.

Settings that differ from the recipe's make a row of their own. What is computed is kept in `outputs/benchmarks`: when
run again, it only measures the times. `--finished FOLDER` takes the run that ended in this folder, on a machine
with a GPU say (the same recipe, model, seed and stages, and `measure=none`), and measures only its times here.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from common import MODELS, ROOT, cifar, compress, figures, finished, record

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("recipe")
parser.add_argument("model", nargs="?", default="resnet20")
parser.add_argument("settings", nargs="*")
parser.add_argument("--finished", type=Path)
given = parser.parse_args()
if given.model not in MODELS:
    sys.exit(f"MODEL (={given.model}) must be one of {', '.join(MODELS)}; settings come after it")
folder = ROOT / "outputs" / "benchmarks" / "cifar10"
folder.mkdir(parents=True, exist_ok=True)
name = "-".join([given.recipe, given.model, *(re.sub(r"\W+", "_", each) for each in given.settings)])
if given.finished:
    report = finished(given.finished, given.recipe, given.model, given.settings)
else:
    report, _ = compress(folder, f"recipe={given.recipe}", *cifar(given.model), *given.settings, out=name)
row = {"recipe": given.recipe, "model": given.model, "settings": given.settings, "seed": report["seed"]}
row |= {"wall_seconds": round(report["seconds"], 1), **figures(report)}
arguments = [given.recipe, given.model, *given.settings]
record(f"cifar10-{name}", [row], "cifar10", arguments, data="CIFAR-10, 10,000 test images")
