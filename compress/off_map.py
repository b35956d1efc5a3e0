"""Fixed displacements that reach past the map they move: channels that nothing but zeros come out of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.nn.displace import Shift2d
from compress.nn.plain_shift import around
from compress.nn.shift import ShiftConv2d
from compress.nn.taps import round_half_away, window


def off_the_map(model: nn.Module, example: Tensor) -> list[str]:
    """The layers with fixed displacements of which some read nothing of their map for such images, as sentences."""
    found: dict[str, str] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda layer, inputs: found.update(_told(name, layer, inputs[0].shape[-2:]))

    fixed = [(name, module) for name, module in model.named_modules() if _gives_zeros_outside(module)]
    hooks = [layer.register_forward_pre_hook(look(name)) for name, layer in fixed]
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()(example[:1].to(_device(model)))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return list(found.values())


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device("cpu"))


def _gives_zeros_outside(module: nn.Module) -> bool:
    """Whether it is a shift that does not learn and reads zeros, not a mirrored or repeated map, past the edge."""
    shifts = isinstance(module, Shift2d | ShiftConv2d)
    return shifts and not module.learn and getattr(module, "padding_mode", "zeros") == "zeros"


def _told(name: str, layer: nn.Module, size: torch.Size) -> dict[str, str]:
    assert isinstance(layer, Shift2d | ShiftConv2d)
    off = torch.zeros(layer.displacement.shape[:-1], dtype=torch.bool)
    for axis, side in enumerate(size):
        first, step = _first_read(layer, axis)
        outputs = -(-side // step) if isinstance(layer, Shift2d) else _outputs(layer, axis, side)
        off |= (first >= side) | (first + (outputs - 1) * step < 0)
    if not bool(off.any()):
        return {}
    farthest = int(round_half_away(layer.displacement.detach()).abs().max())
    what = "channels" if isinstance(layer, Shift2d) else "copies of channels"
    return {
        name: f"`{name}` displaces {int(off.sum())} of {off.numel()} {what} off its map of {size[0]}x{size[1]} pixels "
        f"(displacements up to {farthest}): they would be all zeros. Give larger images, or smaller displacements."
    }


def _first_read(layer: Shift2d | ShiftConv2d, axis: int) -> tuple[Tensor, int]:
    """Which row (or column) of the map the first output reads in each copy, and how many each further one goes on."""
    moved = layer.displacement.detach()[..., axis].cpu()
    moved = round_half_away(moved) if layer.quantize else moved.trunc()  # between pixels the nearer to the centre too
    if isinstance(layer, Shift2d):
        return moved, layer.stride
    before = around(layer, layer.padding, layer.kernel_size)[2 - 2 * axis]
    low = window(layer.kernel_size[axis])[0]
    return (moved - low) * layer.dilation[axis] - before, layer.stride[axis]


def _outputs(layer: ShiftConv2d, axis: int, side: int) -> int:
    before, after = around(layer, layer.padding, layer.kernel_size)[2 - 2 * axis :][:2]
    reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
    return (side + before + after - reach - 1) // layer.stride[axis] + 1
