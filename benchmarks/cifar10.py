"""A recipe on CIFAR-10 with a published ResNet, from nothing but its weights: `cifar10.py RECIPE [MODEL]`."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import cifar, compress, figures, record

if len(sys.argv) < 2:
    sys.exit(__doc__)
recipe, model = sys.argv[1], (sys.argv[2:] or ["resnet20"])[0]
with tempfile.TemporaryDirectory() as folder:
    report, seconds = compress(Path(folder), f"recipe={recipe}", *cifar(model))
row = {"recipe": recipe, "model": model, "seed": 0, "wall_seconds": round(seconds, 1), **figures(report)}
record(f"cifar10-{recipe}-{model}", [row], script="cifar10", data="CIFAR-10, 10,000 test images")
