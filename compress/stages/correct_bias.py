"""CorrectBias: after quantization, biases make good for what rounding added to the mean of each output channel.

What it does. Rounded weights and activations do not only add noise to a layer's output, they move its mean, and by much
in depthwise layers with nine weights to a channel. The mean is compared with that of the same network with its grids
switched off, on calibration images, and the difference is added to the bias, output channel by output channel. Layers
without a bias get one, parts of operators of `compress.nn` aside. Biases stay whole units of the integer kernels.

When to use it, and when not. Behind `Quantize`, where no training follows: below 8 bits, with one scale for a whole
layer, and in depthwise networks even with 8 bits and a scale for each channel. In other networks there is little to
correct then. In front of a fine-tuning it does no harm, but training does it by itself.

Knobs. `method`: `empirical` measures the means of outputs, layer by layer from the front, so that each one is corrected
for what is left of the errors before it, those of the activations' grids too. `analytic` corrects for the weights'
rounding alone: the error of the weights, summed over the kernel, times the mean input of each channel. That mean is
measured with the grids off as well; the paper takes it from batch norm, which is folded away by then. It takes no
account of the zeros along a padded border. `images`: how many calibration images. `include`, `exclude`: layers by name
pattern.

Measured. On a MobileNet with one scale a layer: `benchmarks/mobilenet.py`, its table in benchmarks/README.md.

Reference. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section
4.2 and appendix D.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.lower.tensors import round_biases
from compress.nn.quantized import FakeQuantizeWeight
from compress.quantization import without_grids
from compress.reconstruct import execution_order, plain_images, seen_by
from compress.stage import Edit, Site
from compress.surgery import describe, inside_ours, kind, layers_and_ours, matching, output_layers, require_change
from compress.task import Task, Work
from compress.walk import Walk

METHODS = ("empirical", "analytic")


@dataclass(frozen=True)
class CorrectBias:
    """Settings of the stage; see the module's card."""

    method: str = "empirical"
    images: int = 512
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "correct"
    needs: ClassVar[tuple[str, ...]] = ("Quantize", "MixedPrecision", "QuantizeDynamic")
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)
    ours: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"`method` (={self.method!r}) must be one of {', '.join(METHODS)}.")
        if self.images < 1:
            raise ConfigError(f"`images` (={self.images}) must be at least 1.")

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        found = layers_and_ours(model, self.kinds)
        kept = matching(list(found), self.include, self.exclude)
        if not any(isinstance(module, FakeQuantizeWeight) for module in model.modules()):
            raise ConfigError("the model's weights are not quantized; put `CorrectBias` behind `Quantize`.")
        was_training = model.training
        model.eval()
        calls = execution_order(model, found, task.example.to(task.device))
        parts = inside_ours(model, found)
        for name, layer in found.items():
            kept[name] = kept[name] or self._why_kept(layer, calls.get(name, 0), parts[name])
        sites = tuple(
            Site(name, describe(layer), None if kept[name] else "bias corrected", kept[name])
            for name, layer in found.items()
        )
        require_change(sites)
        taken = {name: found[name] for name in calls if not kept[name]}
        images = plain_images(task.calibration, self.images, task.device)
        work.progress.start("correct biases", len(taken))
        before, after = self._correct(model, taken, images, work)
        work.progress.end()
        notes: dict[str, Any] = {
            "method": self.method,
            "images": sum(map(len, images)),
            "mean_shift": {name: {"before": before[name], "after": after[name]} for name in taken},
        }
        return Edit(model.train(was_training), sites, notes)

    def _why_kept(self, layer: nn.Module, calls: int, part: str) -> str:
        if not any(isinstance(module, FakeQuantizeWeight) for module in layer.modules()):
            return "it has no quantized weights"
        if calls != 1:
            return "called several times, with a mean each time" if calls else "never reached by the forward pass"
        if not output_layers(layer):
            return "what it gives is not the output of its convolutions, so that they have no bias for it"
        if part and any(output.bias is None for output in output_layers(layer)):
            return f"it has no bias, and {part}, which has no place for one"
        if self.method == "analytic" and kind(layer) not in self.kinds:
            return "the analytic correction is for Conv2d and Linear; `method: empirical` corrects it"
        return ""

    @torch.no_grad()
    def _correct(
        self, model: nn.Module, layers: Mapping[str, nn.Module], images: Sequence[Tensor], work: Work
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Correct the layers, in this order; gives back how far their means were and are off, on average."""
        reference = without_grids(model)
        wanted = _Means(reference, layers).over(images)
        before = _off(_Means(model, layers).over(images), wanted)
        if self.method == "analytic":
            for name, mean in _Means(reference, layers, inputs=True).over(images).mean.items():
                _add(layers[name], _analytic(layers[name], reference.get_submodule(name), mean))
                work.progress.step(name)
        else:
            try:
                walk = Walk(model, images)
            except ValueError:
                _one_by_one(model, layers, wanted.mean, images, work)
            else:
                _walked(walk, layers, wanted.mean, images, work)
        round_biases(model)
        return before, _off(_Means(model, layers).over(images), wanted)


class _Means:
    """The mean of each channel of some layers' outputs (or inputs), over images and positions, in float64."""

    def __init__(self, model: nn.Module, names: Iterable[str], inputs: bool = False) -> None:
        self.model, self.inputs = model, inputs
        self.names = list(names)
        self.mean: dict[str, Tensor] = {}
        self.numbers: dict[str, int] = {}

    def over(self, images: Sequence[Tensor]) -> _Means:
        hooks = [self._watch(name) for name in self.names]
        try:
            for batch in images:
                self.model(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return self

    def _watch(self, name: str) -> Any:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen = inputs[0] if self.inputs else output
            already = self.numbers.get(name, 0)
            total = already + seen.numel()
            mean = _mean(layer, seen)
            self.mean[name] = mean if not already else (self.mean[name] * already + mean * seen.numel()) / total
            self.numbers[name] = total

        return self.model.get_submodule(name).register_forward_hook(add)


def _channels(layer: nn.Module) -> int:
    """The axis of the channels."""
    return -1 if kind(output_layers(layer)[0]) is nn.Linear else 1


def _mean(layer: nn.Module, x: Tensor) -> Tensor:
    axes = [axis for axis in range(x.dim()) if axis != _channels(layer) % x.dim()]
    return x.mean(axes, dtype=torch.double)


def _off(now: _Means, wanted: _Means) -> dict[str, float]:
    return {name: float(f"{float((now.mean[name] - mean).abs().mean()):.3g}") for name, mean in wanted.mean.items()}


def _add(layer: nn.Module, shift: Tensor) -> None:
    """Add to the biases of the convolutions that give the layer's output channels."""
    start = 0
    for part in output_layers(layer):
        assert isinstance(part, nn.Conv2d | nn.Linear)
        piece = shift[start : start + len(part.weight)].to(part.weight.dtype)
        start += len(part.weight)
        if part.bias is None:
            part.bias = nn.Parameter(piece.clone())
        else:
            part.bias += piece
    assert start == len(shift)


def _walked(
    walk: Walk, layers: Mapping[str, nn.Module], wanted: Mapping[str, Tensor], images: Sequence[Tensor], work: Work
) -> None:
    """All images go through the network once: where they come to a layer it is corrected, and so are they."""
    for name, layer in layers.items():
        outputs = walk.outputs(layer)
        assert outputs is not None  # in the order of the forward pass, each called once
        shift = wanted[name] - _mean_of([_mean(layer, output) for output in outputs], images)
        _add(layer, shift)
        shape = [1] * outputs[0].dim()
        shape[_channels(layer)] = -1
        for output in outputs:
            output += shift.to(output.dtype).view(shape)
        work.progress.step(name)


def _mean_of(means: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
    """The mean over all images, from those over each batch of them."""
    weights = torch.tensor([len(batch) for batch in images], dtype=torch.double, device=means[0].device)
    return torch.stack(list(means)).mul(weights.unsqueeze(1)).sum(0) / weights.sum()


def _one_by_one(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    wanted: Mapping[str, Tensor],
    images: Sequence[Tensor],
    work: Work,
) -> None:
    """The same with a pass up to each layer: for a network that cannot be walked through."""
    for name, layer in layers.items():
        means = [_mean(layer, seen_by(model, layer, 1, batch)[0][1]) for batch in images]
        _add(layer, wanted[name] - _mean_of(means, images))
        work.progress.step(name)


def _analytic(layer: nn.Module, original: nn.Module, mean: Tensor) -> Tensor:
    """The error of the weights, summed over the kernel, times the mean input of each channel."""
    assert isinstance(layer.weight, Tensor) and isinstance(original.weight, Tensor)
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    error = original.weight.double() - layer.weight.double()
    error = error.reshape(groups, len(error) // groups, error.shape[1], -1).sum(3)
    return (error @ mean.view(groups, -1, 1)).flatten()
