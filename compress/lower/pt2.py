"""A model as a `torch.export` file, which `torch.export.load` reads without this package."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from compress.errors import UserError
from compress.files import write
from compress.lower.parity import parity
from compress.lower.plain import integer_weights, lower, matching_scales
from compress.nn.zero import Zero


def export_pt2(
    model: nn.Module, example: Tensor, path: Path, *, forms: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write `model` to `path` with core torch operators only and a dynamic batch.

    Weights that are integers times a scale stay int8 in the file. `example` is a batch of at least two, (N, C, H, W).
    `forms` is as in `lower`.

    Returns:
        {"file", "bytes", "parity": [{"batch", "max_abs", "top1_agreement"}, ...]} of what the file, read again, gives.
    """
    plain = lower(model, "torch", forms).cpu()
    for name, scale in matching_scales(model, plain).items():
        _keep_integers(plain.get_submodule(name), scale)
    program = exported(plain, example)
    for node in program.graph.nodes:
        for trail in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn"):
            node.meta.pop(trail, None)  # where in the source a node came from: most of a small file, and paths of ours
    content = io.BytesIO()
    torch.export.save(program, content)
    write(path, content.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own pytree code, on every load
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.11 only reads it
        file = torch.export.load(path).module()
    rows = parity(copy.deepcopy(model).cpu().eval(), file, example)
    return {"file": str(path), "bytes": path.stat().st_size, "parity": rows}


def exported(plain: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The model as a graph of core operators whose batch is free. `example` must hold at least two images.

    Raises:
        UserError: torch cannot follow its forward pass.
    """
    if len(example) < 2:
        raise ValueError(f"`example` has {len(example)} image; give at least 2, or the batch size becomes fixed.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own pytree code, on every export
        batch = torch.export.Dim("batch", min=1)
        images = example[:2].detach().cpu().clone()  # the file keeps them, and the storage behind a slice with them
        try:
            program = torch.export.export(plain, (images,), dynamic_shapes=({0: batch},))
        except Exception as error:  # the forward pass is foreign code, and torch has a dozen ways to say no
            why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"
            raise UserError(
                f"no file can be made of this network, torch.export stops with {why}. Its forward pass must not decide "
                "by what the images show; `export: []` with `measure: none` does without files."
            ) from error
    if any(isinstance(module, Zero) for module in plain.modules()):
        _leave_out_zeros(program.graph_module)
    return program


def _leave_out_zeros(module: fx.GraphModule) -> None:
    """Read past additions of a `Zero`, and past a ReLU of what a ReLU gave, which they leave behind."""
    aten = torch.ops.aten
    additions, clips = (aten.add.Tensor, aten.add_.Tensor), (aten.relu.default, aten.relu_.default)
    for node in list(module.graph.nodes):
        other = None
        if node.target in clips and node.args[0].target in clips:
            other = node.args[0]
        elif node.target in additions and len(node.all_input_nodes) == 2 and not node.kwargs:
            others = [each for each in node.all_input_nodes if not _is_zero(each)]
            if len(others) == 1 and others[0].meta["val"].shape == node.meta["val"].shape:
                other = others[0]
        # What is returned has its name in the program's signature; what is changed has to be a tensor of its own.
        if other is None or any(user.op == "output" or str(user.target).endswith("_.default") for user in node.users):
            continue
        node.replace_all_uses_with(other)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()


def _is_zero(node: fx.Node) -> bool:
    made = node.meta.get("nn_module_stack", {}).values()
    return any(cls is Zero or cls == f"{Zero.__module__}.{Zero.__qualname__}" for _, cls in made)


class _Integers(nn.Module):
    """A parametrization: int8 in the state, float to those who read it."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, integers: Tensor) -> Tensor:
        return integers.to(self.scale.dtype) * self.scale

    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        # a tuple, because torch wants a lone tensor to keep its dtype
        return ((weight / self.scale).round().to(torch.int8),)


def _keep_integers(layer: nn.Module, scale: Tensor) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if integer_weights(weight, scale) is not None:
        shape = (-1, *[1] * (weight.dim() - 1))
        parametrize.register_parametrization(layer, "weight", _Integers(scale.view(shape)), unsafe=True)
