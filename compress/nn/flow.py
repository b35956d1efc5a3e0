"""What a traced operation does to the numbers that it gets: it moves them about, or cuts them off, or neither."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import fx, nn
from torch.nn.utils import parametrize

# What moves numbers about without changing them: its output is on the same grid as its input.
MOVES = {
    *("getitem", "pad", "max_pool2d", "flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze"),
    *("chunk", "split", "contiguous", "expand", "narrow", "select", "roll", "flip", "clone", "detach", "movedim"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unflatten", "unbind", "index_select"),
}
MOVING_LAYERS = {
    *(nn.Identity, nn.MaxPool2d, nn.Flatten, nn.Unflatten, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Dropout, nn.Dropout2d),
}
ADDITIONS = {"add", "iadd", "add_"}
CLIPS = {"relu", "relu_", "relu6", "clamp_min", "clamp_min_"}
CLIPPING_LAYERS = {nn.ReLU, nn.ReLU6}


def called(node: fx.Node, model: nn.Module) -> nn.Module | None:
    """The layer that a node calls; None for an operator."""
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def operator_name(node: fx.Node) -> str:
    """The name of the function or method that a traced node calls; "" for any other node."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def in_place(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node changes the tensor that it reads."""
    layer = called(node, model)
    if layer is not None:
        return bool(getattr(layer, "inplace", False))
    return re.search(r"[a-z]_$", operator_name(node)) is not None or bool(node.kwargs.get("inplace"))


def is_one_of(node: fx.Node, model: nn.Module, names: Collection[str], layers: Collection[type[nn.Module]]) -> bool:
    """Whether a node calls one of these operators, or a layer of exactly one of these kinds."""
    layer = called(node, model)
    if layer is not None:
        return parametrize.type_before_parametrizations(layer) in layers
    return operator_name(node) in names


def moves(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node only moves numbers about."""
    known = is_one_of(node, model, MOVES, MOVING_LAYERS) or _displaces(called(node, model))
    return known and bool(node.all_input_nodes)


def clips(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node only cuts numbers off."""
    return is_one_of(node, model, CLIPS, CLIPPING_LAYERS)


def source(node: fx.Node, model: nn.Module) -> fx.Node:
    """The node whose numbers these are, moved or not."""
    while moves(node, model):
        node = node.all_input_nodes[0]
    return node


def _displaces(layer: nn.Module | None) -> bool:
    """Whether this is a layer of ours without convolutions, which displaces its input by whole pixels."""
    if layer is None:
        return False
    kind = parametrize.type_before_parametrizations(layer)
    ours = hasattr(kind, "lower") and hasattr(kind, "config")
    return ours and not hasattr(layer, "output_convolutions") and bool(getattr(layer, "integer", False))
