"""A model as an ONNX file that runs without this package."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.files import write
from compress.lower.fill import Filling
from compress.lower.parity import parity
from compress.lower.plain import Grid, computed_in_float, lower, matching_steps
from compress.lower.pt2 import exported
from compress.surgery import replace

OPSET = 18


def export_onnx(
    model: nn.Module,
    example: Tensor,
    path: Path,
    *,
    input: Mapping[str, Any],
    normalize: bool = False,
    target: str = "onnxruntime",
    forms: Mapping[str, str] | None = None,
    filling: Filling | None = None,
) -> dict[str, Any]:
    """Write `model` to `path` with a dynamic batch; its input is called "input", its output "logits".

    A quantized model becomes one that runtimes execute on integers: int8 weights, int32 biases, one
    quantize/dequantize pair for each tensor. `example` is a normalised batch of at least two, (N, C, H, W). `input`
    describes what the network wants and is stored in the file's metadata; with `normalize` the file takes the raw
    numbers (0 .. `input["scale"]`) and normalises them itself, which the metadata says. `forms` is as in `lower`.
    `filling` says which channels are filled up with zeros; none of a quantized model. Both are in the metadata too.

    Returns:
        {"file", "bytes", "float_layers", "parity": [{"batch", "max_abs", "top1_agreement"}, ...]}: `float_layers`
        names the layers that a quantized model has in float in this file, with the reason.
    """
    from compress.lower import onnx_integers

    plain = lower(model, target, forms).cpu()
    plain = plain if filling is None else filling(plain)
    steps, lost = matching_steps(model, plain)
    for module in list(plain.modules()):
        if isinstance(module, Grid):
            plain = replace(plain, module, onnx_integers.Pair(module))
    example = example.detach().cpu()
    written = Normalized(plain, input) if normalize else plain
    raw = written.undo(example) if isinstance(written, Normalized) else example
    prefix = "model" if normalize else ""
    with _quiet():
        program = torch.onnx.export(
            exported(written, raw),
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=["input"],
            output_names=["logits"],
            custom_translation_table=onnx_integers.translations(),
            verbose=False,
        )
    assert program is not None

    def initializer(layer: str) -> str:
        return ".".join(filter(None, (prefix, layer, "weight")))

    weights = {initializer(name): grid for name, grid in steps.items()}
    kept = {initializer(name): reason for name, reason in (lost | computed_in_float(model)).items()}
    kept |= onnx_integers.integers(program.model, weights, target)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces: a quarter of a small file, and paths of the machine it was made on
        node.doc_string = None
    for value in [*program.model.graph.initializers.values(), *program.model.graph.inputs]:
        value.metadata_props.clear()
    program.model.metadata_props["input"] = json.dumps({**input, "normalized_by_file": normalize})
    if forms:
        program.model.metadata_props["forms"] = json.dumps(dict(forms))
    if filling is not None:
        program.model.metadata_props["filled"] = json.dumps({"layers": list(filling.readers), "to": filling.multiple})
    write(path, program.model_proto.SerializeToString())
    original = copy.deepcopy(model).cpu().eval()
    rows = parity(Normalized(original, input) if normalize else original, _runtime(path), raw)
    return {"file": str(path), "bytes": path.stat().st_size, "float_layers": kept, "parity": rows}


class Normalized(nn.Module):
    """The model with its normalisation in front: takes raw numbers, (N, C, H, W), channels in the order it wants."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, input: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.scale = float(input["scale"])
        self.register_buffer("mean", torch.tensor(input["mean"]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(input["std"]).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Any:
        return self.model((x / self.scale - self.mean) / self.std)

    def undo(self, x: Tensor) -> Tensor:
        """The raw numbers that normalise to `x`."""
        return (x * self.std + self.mean) * self.scale


def _runtime(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about torchvision and its own future."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
