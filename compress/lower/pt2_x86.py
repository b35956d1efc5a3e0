"""A quantized model as a `torch.export` file that `torch.compile` turns into int8 convolutions on x86 processors.

`model.pt2` holds core operators only, in which no compiler finds integer convolutions. Inductor, the compiler behind
`torch.compile`, looks for a dequantize in front of a convolution or linear layer and one behind its int8 weights, and
makes a oneDNN kernel of them, together with the ReLU and the quantize that follow. These are operators of the
namespace `quantized_decomposed`, which come with torch but are not registered by `import torch`. So to use the file:

    import torch
    import torch._inductor.config
    import torch.ao.quantization.fx                # registers the operators; loading fails without; no torchao needed
    torch._inductor.config.freezing = True         # weights become constants; without it nothing is fused
    model = torch.compile(torch.export.load("model.x86.pt2").module())
    with torch.no_grad():
        logits = model(images)

The file says so itself: it is a zip archive, with the text under extra/README. Run without `torch.compile` it computes
what the model computes, slowly. Numbers half-way between two integers may round to the other one, compiled or not.

A conversion to uint8 loses what exceeds the grid only at 255: where a grid has fewer integers, a clip in front of it
says so, and the compiler takes that into the convolution as well.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx  # registers the operators
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from compress.errors import ConfigError
from compress.files import write
from compress.lower.parity import parity
from compress.lower.plain import Grid, integer_weights, lower, matching_scales
from compress.lower.pt2 import exported
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight
from compress.stage import Stage
from compress.surgery import leaves, output_layers, replace

README = """To load and run this file on an x86 processor with int8 convolutions:

import torch
import torch._inductor.config
import torch.ao.quantization.fx
torch._inductor.config.freezing = True
model = torch.compile(torch.export.load("model.x86.pt2").module())
with torch.no_grad():
    logits = model(images)
"""
_quantized, _aten = torch.ops.quantized_decomposed, torch.ops.aten
_QUANTIZE, _DEQUANTIZE = _quantized.quantize_per_tensor.default, _quantized.dequantize_per_tensor.default
_LAYERS = (_aten.conv2d.default, _aten.conv2d.padding, _aten.linear.default)
_MOVES = {
    *(_aten.slice.Tensor, _aten.pad.default, _aten.constant_pad_nd.default, _aten.view.default, _aten.reshape.default),
    *(_aten.flatten.using_ints, _aten.unflatten.int, _aten.permute.default, _aten.transpose.int, _aten.clone.default),
    *(_aten.squeeze.dims, _aten.unsqueeze.default, _aten.index_select.default, _aten.contiguous.default),
    *(_aten.max_pool2d.default, _aten.pixel_shuffle.default, _aten.pixel_unshuffle.default, _aten.dropout.default),
}
_TRAILS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


def pt2_x86_problems(stages: Mapping[str, Stage]) -> list[str]:
    """Why a recipe with these stages cannot end in this file, as sentences. Empty when it can."""
    quantizing = [stage for stage in stages.values() if stage.kind == "quantize"]
    if any(getattr(stage, "runs_in", "") == "torchao" for stage in quantizing):
        return [
            "`export` (=pt2_x86) computes on integers on a CPU, and `QuantizeDynamic` is for GPUs; use `Quantize`, or "
            "export pt2."
        ]
    if not quantizing:
        return [
            "`export` (=pt2_x86) is for quantized models, and no stage here quantizes; add a `Quantize` stage, or "
            "export pt2."
        ]
    if all(getattr(stage, "activation_bits", 8) is None for stage in quantizing):
        return [
            "`export` (=pt2_x86) computes on integers, and `activation_bits` (=null) leaves activations in float; "
            "set `activation_bits`, or export pt2."
        ]
    return []


def export_pt2_x86(
    model: nn.Module, example: Tensor, path: Path, *, forms: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write a quantized model to `path` in the operators that Inductor makes int8 kernels of, with a dynamic batch.

    `example` is a batch of at least two, (N, C, H, W). `forms` is as in `lower`.

    Returns:
        {"file", "bytes", "float_layers", "parity": [{"batch", "max_abs", "top1_agreement"}, ...]} of what the file,
        read again and not compiled, gives; `float_layers` names the layers that compute in float, with the reason.

    Raises:
        ConfigError: nothing in the model is quantized.
    """
    if not any(isinstance(module, FakeQuantize | FakeQuantizeWeight) for module in model.modules()):
        raise ConfigError("`export` (=pt2_x86) is for quantized models, and nothing in this one is; export pt2.")
    plain = lower(model, "torch", forms).cpu()
    scales = matching_scales(model, plain)
    for module in list(plain.modules()):
        if isinstance(module, Grid):
            plain = replace(plain, module, _Pair(module))
    graph = _graph(plain, example)
    kept = _integers(graph, scales, _reasons(model))
    _clip(graph.graph)
    graph.recompile()
    program = exported(graph, example)
    for node in program.graph.nodes:
        for trail in _TRAILS:
            node.meta.pop(trail, None)  # as in `export_pt2`
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"README": README})
    write(path, content.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own pytree code, on every load
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch 2.11 only reads it
        file = torch.export.load(path).module()
    rows = parity(copy.deepcopy(model).cpu().eval(), file, example)
    return {"file": str(path), "bytes": path.stat().st_size, "float_layers": kept, "parity": rows}


class _Pair(nn.Module):
    """A `Grid` as a quantize and a dequantize."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = (grid.scale, grid.zero_point, 0, grid.largest, torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        pair: Tensor = _DEQUANTIZE(_QUANTIZE(x, *self.grid), *self.grid)
        return pair


def _graph(plain: nn.Module, example: Tensor) -> fx.GraphModule:
    """The model's operators with its own tensors under their names, free to be edited and exported again."""
    module = exported(plain, example).module()
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.find_nodes(op="call_module", target="_guards_fn"):  # checks shapes; the file has its own
        module.graph.erase_node(node)
    return module


def _integers(module: fx.GraphModule, scales: Mapping[str, Tensor], why: Callable[[str], str]) -> dict[str, str]:
    """Put int8 weights behind a dequantize wherever a layer reads a tensor on a grid, in place.

    Returns:
        the layers that stay float, with the reason; for weights that are no integers it is `why(layer)`.
    """
    one_hot = {node for node in module.graph.nodes if node.target in _LAYERS and _is_one_hot(module, node)}
    moving = one_hot | {node for node in module.graph.nodes if node.target in _MOVES and _pads_zero(node)}
    kept = {}
    for node in list(module.graph.nodes):
        if node.target is _aten.max_pool2d.default and (grid := _grid(node, moving)):
            _pair_behind(node, grid)  # the kernel of a pool and a quantize takes the pool's own grid for granted
        if node.target not in _LAYERS:
            continue
        source, weight = node.args[:2]
        name, grid = weight.target.rpartition(".")[0], _grid(source, moving)
        tensor = module.get_parameter(weight.target)
        scale = torch.ones(len(tensor)) if node in one_hot else scales.get(name)
        integers = None if scale is None else integer_weights(tensor, scale)
        if integers is None or scale is None:
            kept[name] = why(name)
        elif grid is None:
            kept[name] = "its input is not quantized"
        elif _pads_unevenly(node, tensor):
            kept[name] = "its padding is larger at the end, and oneDNN's integer kernels pad both ends alike"
        else:
            if source.target is not _DEQUANTIZE:
                _pair_behind(source, grid)
            node.replace_input_with(weight, _dequantized(module, node, name, integers, scale))
    for node in module.graph.find_nodes(op="get_attr"):
        if not node.users:
            module.graph.erase_node(node)
            place, _, last = node.target.rpartition(".")
            delattr(module.get_submodule(place), last)
    return kept


def _grid(node: fx.Node, moving: set[fx.Node]) -> tuple[Any, ...] | None:
    """The arguments of the dequantize that this tensor comes from, with nothing but moves of its numbers between."""
    if node.target is _DEQUANTIZE:
        return node.args[1:]
    if node.target is _aten.cat.default:
        grids = {_grid(part, moving) for part in node.args[0]}  # type: ignore[union-attr,arg-type]  # nodes here
        return grids.pop() if len(grids) == 1 else None
    return _grid(node.args[0], moving) if node in moving else None  # type: ignore[arg-type]  # a node here


def _pads_zero(node: fx.Node) -> bool:
    if node.target is _aten.pad.default and node.args[2:3] not in ((), ("constant",)):
        return True
    after = {_aten.pad.default: 3, _aten.constant_pad_nd.default: 2}
    return node.target not in after or not any(node.args[after[node.target] :])


def _pads_unevenly(node: fx.Node, weight: Tensor) -> bool:
    if node.target is not _aten.conv2d.padding or "same" not in node.args:
        return False
    dilation: Any = node.args[5] if len(node.args) > 5 else (1, 1)
    return any(reach * (size - 1) % 2 for reach, size in zip(dilation, weight.shape[2:], strict=True))


def _is_one_hot(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a depthwise convolution only moves each channel: one weight is 1, the others are 0; no bias."""
    weight = module.get_parameter(node.args[1].target)  # type: ignore[union-attr,arg-type]  # its weights
    if weight.dim() != 4 or weight.shape[1] != 1 or any(node.args[2:3]):
        return False
    return bool(((weight == 0) | (weight == 1)).all() and (weight.sum((1, 2, 3)) == 1).all())


def _pair_behind(node: fx.Node, grid: tuple[Any, ...]) -> None:
    with node.graph.inserting_after(node):
        quantize = node.graph.call_function(_QUANTIZE, (node, *grid))
    with node.graph.inserting_after(quantize):
        dequantize = node.graph.call_function(_DEQUANTIZE, (quantize, *grid))
    node.replace_all_uses_with(dequantize, delete_user_cb=lambda user: user is not quantize)


def _dequantized(module: fx.GraphModule, node: fx.Node, name: str, integers: Tensor, scale: Tensor) -> fx.Node:
    """These weights in front of `node`. A layer used twice has them twice: Inductor wants one reader for each."""
    place = module.get_submodule(name)
    more = sum(key.startswith("weight_integers") for key, _ in place.named_buffers(recurse=False)) or ""
    tensors = {"integers": integers, "scale": scale.clone(), "zero_point": torch.zeros(len(scale), dtype=torch.int64)}
    with node.graph.inserting_before(node):
        values: list[fx.node.Argument] = []
        for key, tensor in tensors.items():
            place.register_buffer(f"weight_{key}{more}", tensor)
            values.append(node.graph.get_attr(f"{name}.weight_{key}{more}".lstrip(".")))
        arguments = (*values, 0, -127, 127, torch.int8)
        return node.graph.call_function(_quantized.dequantize_per_channel.default, arguments)


def _clip(graph: fx.Graph) -> None:
    """Say what a grid of fewer than 8 bits cuts off; a ReLU in front of it does nothing more."""
    for node in graph.find_nodes(op="call_function", target=_QUANTIZE):
        source, scale, zero, _, largest, _ = node.args
        if largest == 255:
            continue
        if zero == 0 and source.target in (_aten.relu.default, _aten.relu_.default) and len(source.users) == 1:
            source = source.args[0]
        with graph.inserting_before(node):
            above = graph.call_function(_aten.clamp_min.default, (source, -zero * scale))
            node.update_arg(0, graph.call_function(_aten.clamp_max.default, (above, (largest - zero) * scale)))
    graph.eliminate_dead_code()


def _reasons(model: nn.Module) -> Callable[[str], str]:
    """What tells why the weights of a layer are no integers with a scale for each output channel."""
    found = {name: [_last(part) for part in output_layers(layer)] for name, layer in leaves(model)}

    def why(name: str) -> str:
        grids = next((found[place] for place in _upwards(name) if found.get(place)), [None])
        if not all(isinstance(grid, FakeQuantizeWeight) for grid in grids):
            return "its weights are not quantized"
        if not all(grid.symmetric for grid in grids if isinstance(grid, FakeQuantizeWeight)):
            return "its weights less their zero points do not fit int8"
        return "its weights have more scales than one for each output channel"

    return why


def _upwards(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), -1, -1)]


def _last(layer: nn.Module) -> nn.Module | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    last: nn.Module = list(layer.parametrizations.weight)[-1]  # type: ignore[union-attr,arg-type]  # untyped in torch
    return last
