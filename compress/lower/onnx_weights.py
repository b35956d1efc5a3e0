"""Weights as integers in an ONNX graph, in the fewest bytes that runtimes still take for int8.

Few different numbers stand several to a byte, next to a table of what each byte means. `Cast -> Gather -> Reshape` of
constants is computed when a runtime loads the file, which then finds the int8 weights it has integer kernels for.
(onnxruntime 1.31 and OpenVINO 2026.4 do so. Int4 straight into a `DequantizeLinear` makes both of them compute in
float, so ONNX's own int4 is for layers that do so anyway; OpenVINO refuses ONNX's int2.)
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

Array = np.ndarray[Any, Any]

OPSET_OF_INT4 = 21
_NODES = 400  # bytes that the nodes around a table take, and their names


def packed(numbers: Array) -> tuple[Array, Array] | None:
    """As many of few different numbers in a byte as fit: codes (bytes,) and their table (codes, numbers in a byte).

    `table[codes]` is `numbers` again, in the order of memory. None where not even two fit, or the last byte were not
    full.
    """
    values = np.unique(numbers)
    fitting = [n for n in range(2, 9) if len(values) ** n <= 256 and numbers.size % n == 0]
    if not fitting:
        return None
    digits = len(values) ** np.arange(max(fitting))
    codes = np.searchsorted(values, numbers.reshape(-1, max(fitting))) @ digits
    every = np.arange(len(values) ** max(fitting))[:, None]
    return codes.astype(np.uint8), values[every // digits % len(values)]


def dequantized(
    graph: ir.Graph,
    node: ir.Node,
    index: int,
    numbers: Array,
    scale: Array,
    name: str,
    zero_point: Array | None = None,
) -> None:
    """Let input `index` of the node come from `numbers` through a dequantize, with a scale for each output (axis 0)."""
    grid = [scale] if zero_point is None else [scale, zero_point]
    if all((part == part.flat[0]).all() for part in grid):
        grid = [part.flat[0].reshape(()) for part in grid]
    parts = [initializer(graph, f"{name}_{kind}", part) for kind, part in zip(("scale", "zero"), grid, strict=False)]
    if numbers.dtype == np.int8:
        source = _integers(graph, node, numbers, name)
    else:
        source = initializer(graph, f"{name}_{numbers.dtype}", numbers)
    value = _before(graph, node, "DequantizeLinear", [source, *parts], {"axis": 0} if grid[0].ndim else {})
    node.replace_input_with(index, value)


def dequantized_groups(
    graph: ir.Graph, node: ir.Node, numbers: Array, scale: Array, name: str, zero_point: Array | None
) -> None:
    """Let the weights of a node between quantized tensors come from `numbers`, several scales for each output.

    Written as OpenVINO has it for linear layers; other forms runtimes take for weights with one scale.
    """
    outputs, shape = len(numbers), numbers.shape
    source = _integers(graph, node, numbers.reshape(outputs, scale.size // outputs, -1), name)
    one = initializer(graph, "one", np.array(1, np.float32))
    value = _before(graph, node, "DequantizeLinear", [source, one], {})
    spread = (outputs, scale.size // outputs, 1)
    value = _scaled(graph, node, value, scale, name, zero_point, spread)
    node.replace_input_with(1, _shaped(graph, node, value, shape, name))


def widened(
    graph: ir.Graph, node: ir.Node, numbers: Array, scale: Array, name: str, zero_point: Array | None = None
) -> None:
    """Let the weights of a node that computes in float come from `numbers`, which a runtime makes float on loading.

    There may be several scales for each output, one after the other. With a cast in place of the dequantize:
    onnxruntime computes that anew for every image. Numbers from -8 to 7 are ONNX's own int4.
    """
    outputs, shape = len(numbers), numbers.shape
    spread = (outputs, *[1] * (numbers.ndim - 1))
    if scale.size > outputs:
        numbers, spread = numbers.reshape(outputs, scale.size // outputs, -1), (outputs, scale.size // outputs, 1)
    if numbers.min() >= -8 and numbers.max() <= 7:
        graph.opset_imports[""] = max(graph.opset_imports[""], OPSET_OF_INT4)
        source = initializer(graph, f"{name}_int4", numbers.astype(ml_dtypes.int4))
    else:
        source = _integers(graph, node, numbers.astype(np.int8), name)
    value = _before(graph, node, "Cast", [source], {"to": ir.DataType.FLOAT})
    value = _scaled(graph, node, value, scale, name, zero_point, spread)
    if numbers.shape != shape:
        value = _shaped(graph, node, value, shape, name)
    node.replace_input_with(1, value)


def _scaled(
    graph: ir.Graph,
    node: ir.Node,
    value: ir.Value,
    scale: Array,
    name: str,
    zero_point: Array | None,
    spread: tuple[int, ...],
) -> ir.Value:
    """(value - zero_point) * scale, both in the shape `spread`."""
    for operator, kind, part in (("Sub", "zero", zero_point), ("Mul", "scale", scale)):
        if part is not None:
            each = initializer(graph, f"{name}_{kind}", part.astype(np.float32).reshape(spread))
            value = _before(graph, node, operator, [value, each], {})
    return value


def _integers(graph: ir.Graph, node: ir.Node, numbers: Array, name: str) -> ir.Value:
    """The int8 numbers as they are or packed, whichever is smaller; less each channel's lowest where that helps."""
    lowest = numbers.min(tuple(range(1, numbers.ndim)), keepdims=True)
    for offset in (None, lowest):
        few = numbers if offset is None else numbers.astype(np.int16) - offset
        pair = packed(few) if few.max() <= 127 else None
        if pair is None or pair[0].size + pair[1].size + _NODES > numbers.size:
            continue
        codes = initializer(graph, f"{name}_codes", pair[0])
        table = initializer(graph, f"table_{len(pair[1])}", pair[1].astype(np.int8))
        value = _before(graph, node, "Cast", [codes], {"to": ir.DataType.INT32})
        value = _before(graph, node, "Gather", [table, value], {"axis": 0})
        value = _shaped(graph, node, value, numbers.shape, name)
        if offset is None:
            return value
        return _before(graph, node, "Add", [value, initializer(graph, f"{name}_offset", offset)], {})
    return initializer(graph, f"{name}_int8", numbers)


def _shaped(graph: ir.Graph, node: ir.Node, value: ir.Value, shape: tuple[int, ...], name: str) -> ir.Value:
    wanted = initializer(graph, f"{name}_shape", np.array(shape, np.int64))
    return _before(graph, node, "Reshape", [value, wanted], {})


def _before(
    graph: ir.Graph, node: ir.Node, operator: str, inputs: list[ir.Value], attributes: dict[str, Any]
) -> ir.Value:
    made = ir.node(operator, inputs, attributes)
    graph.insert_before(node, made)
    return made.outputs[0]


def initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """The initializer of this content, whose name is `name` or begins with it; made where there is none."""
    while (known := graph.initializers.get(name)) is not None:
        same = known.const_value is not None and known.const_value.numpy()
        if isinstance(same, np.ndarray) and same.dtype == array.dtype and np.array_equal(same, array):
            return known
        name += "_"
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
