"""A recipe on CIFAR-10 with a published ResNet, from nothing but its weights: `cifar10.py RECIPE [MODEL]`.

What it computes is kept in `outputs/benchmarks/cifar10`: run again, it only measures the times anew.
"""

from __future__ import annotations

import sys

from common import ROOT, cifar, compress, figures, record

if len(sys.argv) < 2:
    sys.exit(__doc__)
recipe, model = sys.argv[1], (sys.argv[2:] or ["resnet20"])[0]
folder = ROOT / "outputs" / "benchmarks" / "cifar10"
folder.mkdir(parents=True, exist_ok=True)
report, seconds = compress(folder, f"recipe={recipe}", *cifar(model), out=f"{recipe}-{model}")
row = {"recipe": recipe, "model": model, "seed": 0, "wall_seconds": round(seconds, 1), **figures(report)}
record(f"cifar10-{recipe}-{model}", [row], script="cifar10", data="CIFAR-10, 10,000 test images")
