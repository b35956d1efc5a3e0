"""MobileNet-V1 0.75 with one scale for each layer's weights: what equalizing and correcting win back, without training.

Top-1 among 1000 classes on the 500 validation images of imagenette-mini (10 of ImageNet's classes), with the paired
difference to the float network. Calibration images are training images of these ten classes, which biases that are
measured on them may come to prefer. Rows in float tell what equalizing alone changes, rounding aside.
"""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import data_root, record
from imagenette import imagenette
from torch import Tensor

from compress import checkpoint
from compress.data import make_task
from compress.measure import accuracy, paired
from compress.models import mobilenet_v1
from compress.models.weights import load_weights
from compress.stage import Stage
from compress.stages import AdaRound, CorrectBias, Equalize, Quantize
from compress.task import Work
from compress.train import logits

INPUT = {"mean": [0.5] * 3, "std": [0.5] * 3}
IMAGES = 256  # of the training images, that ranges are calibrated on
MEANS = 192  # that biases are corrected on
ROUNDED = 128  # that AdaRound solves on
SETTINGS: dict[str, Any] = {"classes": 1000, "width": 0.75}

CHANNEL, TENSOR = (Quantize(granularity=each, calibration_images=IMAGES) for each in ("channel", "tensor"))
CORRECT = CorrectBias(images=MEANS)
KEEP, REPLACE = (Equalize(relu6=each, images=IMAGES) for each in ("keep", "replace"))
VARIANTS: dict[str, list[Stage]] = {
    "float": [],
    "float, equalized, ReLU6 kept": [KEEP],
    "float, equalized, ReLU6 replaced": [REPLACE],
    "int8 per channel": [CHANNEL],
    "int8 per channel, corrected": [CHANNEL, CORRECT],
    "int8 per tensor": [TENSOR],
    "int8 per tensor, corrected": [TENSOR, CORRECT],
    "int8 per tensor, equalized, ReLU6 replaced, corrected": [REPLACE, TENSOR, CORRECT],
    "int8 per tensor, equalized, ReLU6 kept": [KEEP, TENSOR],
    "int8 per tensor, equalized, ReLU6 kept, corrected": [KEEP, TENSOR, CORRECT],
    "int8 per tensor, equalized, ReLU6 kept, AdaRound": [KEEP, TENSOR, AdaRound(images=ROUNDED)],
}

images = imagenette()
task = make_task(images, input=INPUT, batch_size=32, calibration_images=IMAGES)
base = mobilenet_v1(**SETTINGS)
load_weights(base, data_root() / "weights" / "mobilenet_v1_0.75_224.pt")
base.eval()
context = {
    "model": "MobileNet-V1 0.75",
    "data": "imagenette-mini val, 500 images",
    "calibration_images": IMAGES,
    "correct_bias_images": MEANS,
    "ada_round_images": ROUNDED,
    "seed": task.seed,
}
float_answers: Tensor = torch.empty(0)
rows: list[dict[str, Any]] = []
for name, stages in VARIANTS.items():
    model, seconds, notes = copy.deepcopy(base), {}, {}
    with tempfile.TemporaryDirectory() as path:
        for stage in stages:
            started = time.perf_counter()
            edit = stage(model, task, Work(Path(path)))
            model = edit.model
            seconds[type(stage).__name__] = round(time.perf_counter() - started, 1)
            notes |= {key: edit.notes[key] for key in ("dead_channels", "channels_clipped") if key in edit.notes}
        model.eval()
        build = ("compress.models.mobilenet_v1", SETTINGS)
        size = checkpoint.save(model, Path(path, "model"), build=build, input=task.input, provenance={}, results={})
    out, labels = logits(model, task.test, task.device)
    answers = out.argmax(1)
    float_answers = float_answers if stages else answers
    right = answers == labels
    rows.append({"variant": name, **accuracy(int(right.sum()), len(right))})
    rows[-1]["paired"] = paired(float_answers == labels, right)
    rows[-1] |= {"changed_answers": int((answers != float_answers).sum()), "bytes": size, "seconds": seconds, **notes}
    record("mobilenet", rows, **context)
