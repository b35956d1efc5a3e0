"""What fewer bits in one layer's weights do to the whole network's answers, and how many bytes they save."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.allocate import Choice
from compress.codecs import pack
from compress.nn.masked import mask_of
from compress.quantization import WeightGrid
from compress.reconstruct import execution_order
from compress.rounding import LayerRounding, weight_holder
from compress.task import Progress
from compress.train import divergence

MOST_FEATURES = 4096  # above this the equations of a layer take gigabytes: it is rounded to the nearest
RIDGE = 1e-2
SWEEPS = 3


@dataclass(frozen=True)
class Option:
    """A layer's weights at some bits: what goes into the layer, the bytes it packs into, and the divergence (nats)."""

    weight: Tensor
    bias: Tensor | None
    cost: int
    harm: float

    @property
    def choice(self) -> Choice:
        """It as something to share a budget out by."""
        return Choice(self.cost, self.harm)


def sensitivities(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    bits: Sequence[int],
    how: WeightGrid,
    adaptive: bool,
    images: Sequence[Tensor],
    progress: Progress,
) -> dict[str, dict[int, Option]]:
    """For every layer, and each number of bits for its weights, what that costs and does, all other layers in float.

    The divergence is that of the network's answers to `images` (batches) from those of the float network. With
    `adaptive` weights are rounded as `AdaRound` does, else to the nearest. The model is left as it was.
    """
    with torch.no_grad():
        wanted = [model(batch) for batch in images]
        problems = _problems(model, layers, images) if adaptive else {}
        found: dict[str, dict[int, Option]] = {}
        progress.start("how many bits each layer needs", len(layers))
        for name, layer in layers.items():
            holder = weight_holder(layer)
            assert holder is not None
            found[name] = {}
            for number in bits:
                weight, bias, cost = _rounded(holder, problems.get(name), how, number, name)
                with swapped({holder: (weight, bias)}):
                    off = sum(divergence(model(x), y) * len(x) for x, y in zip(images, wanted, strict=True))
                found[name][number] = Option(weight, bias, cost, off / sum(map(len, images)))
            progress.step(name)
        progress.end()
    return found


def _rounded(
    holder: nn.Conv2d | nn.Linear, problem: LayerRounding | None, how: WeightGrid, bits: int, name: str
) -> tuple[Tensor, Tensor | None, int]:
    """The weights at these bits, the bias that goes with them, and how many bytes the integers pack into."""
    grid = how.of(holder.weight, bits)
    if problem is None:
        integers = grid.integers(holder.weight)
        return grid.values(integers, holder.weight.dtype), holder.bias, pack(integers).bytes
    chosen = problem.chosen(grid, RIDGE, True, SWEEPS)
    return chosen.weight, chosen.bias, pack(chosen.integers).bytes


@contextlib.contextmanager
def swapped(values: Mapping[nn.Conv2d | nn.Linear, tuple[Tensor, Tensor | None]]) -> Iterator[None]:
    """The layers with these weights and biases, for a while."""
    before = {layer: (_held(layer).data, None if layer.bias is None else layer.bias.data) for layer in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: Mapping[nn.Conv2d | nn.Linear, tuple[Tensor, Tensor | None]]) -> None:
    for layer, (weight, bias) in values.items():
        _held(layer).data = weight.detach()
        if layer.bias is not None and bias is not None:
            layer.bias.data = bias.detach()


def _held(layer: nn.Module) -> Tensor:
    """The parameter that a weight is, or that is masked to give it."""
    weight = layer.weight if mask_of(layer) is None else layer.parametrizations.weight.original  # type: ignore[union-attr]  # a module, by torch
    assert isinstance(weight, Tensor)
    return weight


def _problems(model: nn.Module, layers: Mapping[str, nn.Module], images: Sequence[Tensor]) -> dict[str, LayerRounding]:
    """Each layer's rounding as a problem of its own inputs and outputs in the float network, gathered in one pass."""
    total = sum(map(len, images))
    calls = execution_order(model, dict(layers), images[0][:1])
    small = {name: layer for name, layer in layers.items() if name in calls and _features(layer) <= MOST_FEATURES}
    problems = {name: LayerRounding(layer, calls[name] * total) for name, layer in small.items()}

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, output: problems[name].add(inputs[0].detach(), output.detach())

    hooks = [layer.register_forward_hook(add(name)) for name, layer in small.items()]
    try:
        for batch in images:
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return problems


def _features(layer: nn.Module) -> int:
    holder = weight_holder(layer)
    assert holder is not None
    return holder.weight[0].numel()
