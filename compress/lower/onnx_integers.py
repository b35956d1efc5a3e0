"""Quantized ONNX graphs in the shape that runtimes fuse into integer kernels.

A runtime takes a convolution for an integer one where everything around it is written down: input and output behind a
quantize/dequantize pair, weights as int8 and the bias as int32 behind a dequantize. So every tensor has one pair,
shared by its readers; what only moves numbers has its input's pair behind it again; a ReLU goes where the grid behind
it starts at zero anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from compress.lower.onnx_weights import dequantized, dequantized_groups, initializer, widened
from compress.lower.plain import Grid, Steps

_MOVES = {
    *("Slice", "Pad", "Reshape", "Flatten", "Transpose", "MaxPool", "Squeeze", "Unsqueeze", "Identity", "Gather"),
    *("DepthToSpace", "SpaceToDepth", "Expand"),
}
_LAYERS = ("Conv", "ConvTranspose", "Gemm")
_INT32 = 2**31 - 1


@torch.library.custom_op("compress::pair", mutates_args=())
def _pair_operator(x: Tensor, scale: float, zero_point: int, largest: int) -> Tensor:
    """Only ever exported: stands for a quantize/dequantize pair between torch and the ONNX file."""
    return Grid(scale, zero_point, largest).forward(x)


@_pair_operator.register_fake
def _(x: Tensor, scale: float, zero_point: int, largest: int) -> Tensor:
    return torch.empty_like(x)


class Pair(nn.Module):
    """A `Grid` in the form that `translations` writes."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        pair: Tensor = _pair_operator(x, self.grid.scale, self.grid.zero_point, self.grid.largest)
        return pair


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How the exporter writes a `Pair`: quantize, cut to the integers of fewer than 8 bits, dequantize."""
    from onnxscript import opset18

    op: Any = opset18  # its types describe a graph's values, not what stands for them while the exporter writes

    def pair(x: Any, scale: float, zero_point: int, largest: int) -> Any:
        step = op.Constant(value_float=scale)
        zero = op.Constant(value=ir.tensor(np.array(zero_point, np.uint8)))
        integers = op.QuantizeLinear(x, step, zero)
        if largest < 255:
            integers = op.Min(integers, op.Constant(value=ir.tensor(np.array(largest, np.uint8))))
        return op.DequantizeLinear(integers, step, zero)

    return {torch.ops.compress.pair.default: pair}


def integers(model: ir.Model, weights: Mapping[str, Steps], target: str = "onnxruntime") -> dict[str, str]:
    """Write `weights` (initializer -> its grid) as integers, in place.

    Returns:
        the weights whose layers `target` computes in float, with the reason.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type == "QuantizeLinear":
            _drop_clip(node)
        if node.op_type == "ReduceMean":
            _pool_globally(node)
    kept = {}
    done: set[str] = set()
    for node in list(graph):
        moves = node.op_type in _MOVES or _moves_by_convolution(node)
        if node.op_type in _LAYERS:
            name = node.inputs[1].name or ""  # type: ignore[union-attr]  # a layer has weights
            if reason := _layer(graph, node, name, weights, target, done):
                kept[name] = reason
        if moves:
            _pair_behind(graph, node)
    for name in weights:
        if name not in done and name not in kept:
            kept[name] = "the exporter wrote it in another form"
    for value in [v for v in graph.initializers.values() if not v.uses() and not v.is_graph_output()]:
        del graph.initializers[value.name]  # type: ignore[arg-type]  # an initializer has a name
    return kept


def _layer(graph: ir.Graph, node: ir.Node, name: str, weights: Mapping[str, Steps], target: str, done: set[str]) -> str:
    """Put the weights, and the bias where the input is quantized, behind a dequantize; gives back why not, or ""."""
    steps = weights.get(name)
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    on_grid = source is not None and source.op_type == "DequantizeLinear"
    if steps is None and on_grid and _one_hot(node):  # among floats the integers would only have to be converted back
        steps = Steps(torch.ones(len(_array(node.inputs[1]))))
    if steps is None:
        if on_grid:
            _shield(graph, node)
        return ""
    if node.op_type == "Gemm" and not _is_plain_gemm(node):
        return "its matrix product has factors"
    array = _array(node.inputs[1])
    found = steps.integers(torch.from_numpy(array.copy()))
    if found is None:
        return "its weights are not integers times the scales"
    done.add(name)
    numbers, scale = found.numpy(), steps.scale.numpy()
    zero = None if steps.zero_point is None else steps.zero_point.numpy()
    if len(scale) > len(array):
        if zero is not None:
            numbers = (numbers.reshape(len(scale), -1) + zero.reshape(-1, 1)).reshape(array.shape)
        (dequantized_groups if on_grid else widened)(graph, node, numbers.astype(np.int8), scale, name, zero)
        each = array.size // len(scale)
        return (
            f"its weights have a scale for every {each}, which integer kernels do not take: stored as integers, "
            "computed in float"
        )
    largest = int(np.abs(numbers).max())
    if not on_grid:
        offset = zero if largest > 127 else None
        shifted = numbers if offset is None else numbers + offset.reshape(-1, *[1] * (array.ndim - 1))
        widened(graph, node, shifted, scale, name, offset)
        return ""
    if largest > 127:
        assert zero is not None
        zero = zero.astype(np.int8)
        numbers = numbers + zero.reshape(-1, *[1] * (array.ndim - 1))
    else:  # exact; the bias is rounded to units of this scale
        spread = 2 ** ((127 // max(largest, 1)).bit_length() - 1)
        numbers, scale = numbers * spread, scale / np.float32(spread)
        # onnxruntime fuses a matrix product only where its weights have one
        zero = np.zeros(len(scale), np.int8) if node.op_type == "Gemm" else None
    dequantized(graph, node, 1, numbers.astype(np.int8), scale, name, zero)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        assert source is not None
        step = _array(source.inputs[1]) * scale
        units = np.round(_array(bias).astype(np.float64) / step.astype(np.float64))
        if np.abs(units).max() > _INT32:
            return "its bias is too large for 32 bits in units of its weights"
        dequantized(graph, node, 2, units.astype(np.int32), step, bias.name or "")
    if largest > 127 and target == "openvino":
        return "its weights have zero points: stored as integers, computed in float"
    return ""


def _shield(graph: ir.Graph, node: ir.Node) -> None:
    """Keep onnxruntime from rounding float weights, which it does between quantized tensors, one scale for all.

    A maximum with the smallest number there is stops it, and changes nothing.
    """
    output = node.outputs[0]
    if output.is_graph_output():
        return
    readers = list(output.uses())
    lowest = initializer(graph, "lowest", np.array(np.finfo(np.float32).min))
    stop = ir.node("Max", [output, lowest])
    stop.outputs[0].name = f"{output.name}_float"
    graph.insert_after(node, stop)
    for reader, index in readers:
        reader.replace_input_with(index, stop.outputs[0])


def _pair_behind(graph: ir.Graph, node: ir.Node) -> None:
    """The grid of the node's input again behind the node."""
    source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if source is None or source.op_type != "DequantizeLinear":
        return
    if node.op_type == "Pad" and not _pads_zero(node):
        return
    for output in node.outputs:
        if not output.uses() or output.is_graph_output():
            continue
        readers = list(output.uses())
        quantize = ir.node("QuantizeLinear", [output, *source.inputs[1:]])
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *source.inputs[1:]])
        quantize.outputs[0].name = f"{output.name}_quantized"
        dequantize.outputs[0].name = f"{output.name}_dequantized"
        graph.insert_after(node, [quantize, dequantize])
        for reader, index in readers:
            reader.replace_input_with(index, dequantize.outputs[0])


def _pool_globally(mean: ir.Node) -> None:
    """A mean over height and width as the pooling that it is: only that has an integer kernel."""
    keep = mean.attributes.get("keepdims")
    axes = mean.inputs[1] if len(mean.inputs) > 1 else None
    shape = mean.inputs[0].shape if mean.inputs[0] is not None else None
    if axes is None or _constant(axes) is None or shape is None or len(shape) != 4:
        return
    if (keep is not None and keep.as_int() != 1) or sorted(int(a) % 4 for a in _array(axes)) != [2, 3]:
        return
    pool = ir.node("GlobalAveragePool", [mean.inputs[0]], outputs=None)
    pool.outputs[0].name = f"{mean.outputs[0].name}_pooled"
    assert mean.graph is not None
    mean.graph.insert_before(mean, pool)
    mean.outputs[0].replace_all_uses_with(pool.outputs[0], replace_graph_outputs=True)
    mean.graph.remove(mean, safe=True)


def _pads_zero(node: ir.Node) -> bool:
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return True
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return value is None or (_constant(value) is not None and not _array(value).any())


def _drop_clip(quantize: ir.Node) -> None:
    """Read past a ReLU or clip that the grid makes anyway."""
    clip = quantize.inputs[0].producer() if quantize.inputs[0] is not None else None
    if clip is None or clip.op_type not in ("Relu", "Clip") or len(clip.outputs[0].uses()) != 1:
        return
    step, zero = float(_array(quantize.inputs[1])), int(_array(quantize.inputs[2]))
    cut = [node for node, _ in quantize.outputs[0].uses() if node.op_type == "Min"]
    largest = int(_array(cut[0].inputs[1])) if cut else 255
    low, high = 0.0, float("inf")
    if clip.op_type == "Clip":
        bounds = [*clip.inputs[1:], None, None][:2]
        if any(bound is not None and _constant(bound) is None for bound in bounds):
            return
        low, high = (
            float(_array(bound)) if bound is not None else default
            for bound, default in zip(bounds, (float("-inf"), float("inf")), strict=True)
        )
    if -zero * step >= low and (largest - zero) * step <= high * (1 + 1e-5):
        quantize.replace_input_with(0, clip.inputs[0])
        assert clip.graph is not None
        clip.graph.remove(clip, safe=True)


def _moves_by_convolution(node: ir.Node) -> bool:
    return node.op_type == "Conv" and len(node.inputs) == 2 and _one_hot(node)


def _one_hot(node: ir.Node) -> bool:
    """Whether a depthwise convolution only moves each channel: one weight is 1, the others are 0."""
    weight = node.inputs[1]
    if weight is None or _constant(weight) is None or node.op_type != "Conv":
        return False
    array = _array(node.inputs[1])
    return array.shape[1] == 1 and bool(((array == 0) | (array == 1)).all() and (array.sum((1, 2, 3)) == 1).all())


def _is_plain_gemm(node: ir.Node) -> bool:
    def number(name: str) -> float:
        attribute = node.attributes.get(name)
        return 1.0 if attribute is None else float(attribute.value)

    transposed = node.attributes.get("transB")
    return transposed is not None and transposed.as_int() == 1 and number("alpha") == 1 and number("beta") == 1


def _constant(value: ir.Value) -> Any:
    return ir.convenience.get_const_tensor(value)


def _array(value: ir.Value | None) -> np.ndarray[Any, Any]:
    assert value is not None
    tensor = _constant(value)
    assert tensor is not None, f"{value.name} is not a constant"
    return np.asarray(tensor.numpy())
