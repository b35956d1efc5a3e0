"""A model as a file of any kind: which exporter writes it, and which forms its layers take."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress.lower.fill import FILLED, choose_filling
from compress.lower.forms import choose, in_float
from compress.lower.onnx_file import export_onnx
from compress.lower.plain import lower
from compress.lower.pt2 import export_pt2
from compress.lower.pt2_x86 import export_pt2_x86

# How the file of each kind ends.
EXPORTS = {"onnx": ".onnx", "pt2": ".pt2", "pt2_x86": ".x86.pt2"}
SUFFIXES = {"onnxruntime": ".onnx", "openvino": ".onnx"}  # of the file that a target runs; others take a .pt2


def write_file(
    model: nn.Module,
    example: Tensor,
    path: Path,
    *,
    input: Mapping[str, Any],
    target: str = "onnxruntime",
    forms: str = "default",
    store: Path | None = None,
    normalize: bool = False,
) -> dict[str, Any]:
    """Export `model` to `path`, whose ending is one of `EXPORTS`; gives back what the exporter says, and the forms.

    `example` is a normalised batch of at least two, on which the file is compared with the model. `forms` is
    "measured" or "default": which of its equal forms a layer takes, and whether channels are filled up with zeros. It
    is measured only for the kind of file that `target` runs, and kept in the folder `store`. The model is left as it
    was.
    """
    model, example = copy.deepcopy(model).cpu().eval(), example.detach().cpu()
    measured = forms == "measured" and path.suffix == SUFFIXES.get(target, ".pt2")
    chosen = choose(model, example, target, store) if measured else {}
    names = {name: choice.form for name, choice in chosen.items()}
    said: dict[str, Any] = {"file": path.name, "forms": {name: asdict(choice) for name, choice in chosen.items()}}
    if path.suffix == EXPORTS["onnx"]:
        settings: dict[str, Any] = {"normalize": normalize, "target": target, "forms": names}
        fills = measured and in_float(model)
        found = choose_filling(lower(model, target, names), example, target, store) if fills else None
        if found is not None:
            filling, choice = found
            said["filling"] = {"layers": list(filling.readers), **asdict(choice)}
            settings["filling"] = filling if choice.form == FILLED else None
        written = export_onnx(model, example, path, input=input, **settings)
    elif path.name.endswith(EXPORTS["pt2_x86"]):
        written = export_pt2_x86(model, example, path, forms=names)
    else:
        written = export_pt2(model, example, path, forms=names)
    return written | said
