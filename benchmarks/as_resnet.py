"""A published active-shift network, AS-ResNet-w32, in whole pixels: what each way costs, before and after distillation.

The cosine of the centred logits with those of the float network on two photographs and their mirror images, and top-1
among 1000 classes on the 500 validation images of imagenette-mini (10 of ImageNet's classes). What is solved for is
solved for on training images of these ten classes, which the network thereby comes to prefer: top-1 flatters it, and
the photographs, which show other classes, do not. Distillation learns the float network's answers to the same training
images, without labels.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from common import data_root, record
from imagenette import imagenette
from torch import Tensor, nn

from compress.data import make_task
from compress.measure import accuracy, paired
from compress.models import as_resnet_w32
from compress.models.weights import load_weights, read_weights
from compress.nn.displace import Shift2d
from compress.stages import ConvertShift, FineTune
from compress.surgery import layers
from compress.task import Task, Work
from compress.train import logits

INPUT = {"order": "bgr", "scale": 1.0, "mean": [103.94, 116.78, 123.68], "std": [1 / 0.017352] * 3}
IMAGES = 256  # that the convolutions are solved on
RECOVER = FineTune(epochs=2, lr=3e-4, optimizer="adamw", distill=1.0, clip=1.0, batch_norm="frozen")


def rounded(chosen: Callable[[Shift2d], bool]) -> Callable[[nn.Module, Task], nn.Module]:
    """Plain rounding, which the stage does not offer where there is a stride."""

    def convert(model: nn.Module, task: Task) -> nn.Module:
        for layer in layers(model, (Shift2d,)).values():
            assert isinstance(layer, Shift2d)
            layer.quantize = chosen(layer)
        return model

    return convert


def converted(**settings: Any) -> Callable[[nn.Module, Task], nn.Module]:
    def convert(model: nn.Module, task: Task) -> nn.Module:
        with tempfile.TemporaryDirectory() as path:
            return ConvertShift(images=IMAGES, **settings)(model, task, Work(Path(path))).model

    return convert


def distilled(**settings: Any) -> Callable[[nn.Module, Task], nn.Module]:
    def convert(model: nn.Module, task: Task) -> nn.Module:
        task = replace(task, teacher=copy.deepcopy(model))
        model = converted(**settings)(model, task)
        with tempfile.TemporaryDirectory() as path:
            return RECOVER(model, task, Work(Path(path))).model

    return convert


VARIANTS: dict[str, Callable[[nn.Module, Task], nn.Module]] = {
    "float": lambda model, task: model,
    "all rounded": rounded(lambda layer: True),
    "strided rounded, others bilinear": rounded(lambda layer: layer.stride > 1),
    "others rounded, strided bilinear": rounded(lambda layer: layer.stride == 1),
    "strided pooled, others bilinear": converted(others="keep", refit=False),
    "strided pooled, others bilinear, refit": converted(others="keep"),
    "strided pooled, others rounded": converted(refit=False),
    "strided pooled, others rounded, refit": converted(),
    "strided pooled, others bilinear, distilled": distilled(others="keep", refit=False),
    "strided pooled, others rounded, distilled": distilled(refit=False),
    "strided pooled, others rounded, refit, distilled": distilled(),
}


def centred(out: Tensor) -> Tensor:
    return out - out.mean(1, keepdim=True)


@torch.no_grad()
def answer(model: nn.Module, images: Tensor) -> Tensor:
    out: Tensor = model(images)
    return out


weights = data_root() / "weights"
golden = read_weights(weights / "as-resnet-w32-golden.safetensors")
photographs = torch.stack([golden["cat.input"], golden["fish-bike.input"]])
photographs = torch.cat((photographs, photographs.flip(-1)))
images = imagenette()
task = make_task(images, input=INPUT, batch_size=32, calibration_images=IMAGES)
base = as_resnet_w32()
load_weights(base, weights / "as-resnet-w32.safetensors")
base.eval()
wanted = answer(base, photographs)
off = wanted[:2] - torch.stack([golden["cat.logits"], golden["fish-bike.logits"]])
float_right = torch.empty(0)
rows: list[dict[str, Any]] = []
for name, convert in VARIANTS.items():
    model = convert(copy.deepcopy(base), task).eval()
    out, labels = logits(model, task.test, task.device)
    right = out.argmax(1) == labels
    float_right = right if name == "float" else float_right
    cosine = torch.cosine_similarity(centred(answer(model, photographs)), centred(wanted)).mean()
    rows.append({"variant": name, "cosine": round(float(cosine), 4), **accuracy(int(right.sum()), len(right))})
    rows[-1]["paired"] = paired(float_right, right)
    rows[-1]["whole_pixel_layers"] = sum(bool(layer.integer) for layer in layers(model, (Shift2d,)).values())
context = {
    "model": "AS-ResNet-w32",
    "recover": asdict(RECOVER),
    "data": "imagenette-mini val, 500 images",
    "calibration_images": IMAGES,
}
record("as_resnet", rows, **context, golden_max_abs=float(off.abs().max()))
