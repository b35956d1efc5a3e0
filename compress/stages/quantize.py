"""Quantize: weights on an integer grid per output channel, activations on one per tensor.

What it does. Batch norm is folded into the convolutions. The weights of `Conv2d`, `Linear` and the convolutions inside
layers of ours are rounded to `weight_bits`, with one scale for each output channel. Tensors between them are rounded to
`activation_bits`: each once, behind its ReLU, for everybody who reads it, the residual path too; the ranges come from
calibration images through torchao's observers. What the model returns stays float. Fine-tuning afterwards is
quantization-aware training: weight scales follow the weights, activation ranges stay.

When to use it, and when not. Int8 is close to free: it costs a few tenths of a point at most and needs no training, so
it belongs at the end of nearly every recipe. Below 8 bits fine-tune afterwards; below 5 expect a loss. A model that
cannot be traced gets its weights quantized only: a smaller file, not a faster model.

Knobs. `weight_bits`, `activation_bits`: 2 to 8. `observer`: `histogram` clips rare large values where that lowers the
squared error, `minmax` keeps everything in range. `calibration_images`: how many of the task's are looked at.
`include`, `exclude`: layers by name pattern; what is excluded computes in float.

Measured. See the table in the README (`benchmarks/cifar10.py`), recipes `int8` and `int8_qat`.

Reference. Jacob et al., CVPR 2018; Nagel et al., "A White Paper on Neural Network Quantization", arXiv:2106.08295.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from compress.errors import ConfigError, DataError
from compress.lower.fold import fold_batch_norm
from compress.lower.tensors import Tensors, quantizable, round_biases
from compress.nn.places import place_quantizers, quantizer_places, trace
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight
from compress.stage import Edit, Site
from compress.surgery import describe, is_ours, kind, leaves, matching, require_change
from compress.task import Task, Work

OBSERVERS = ("histogram", "minmax")


@dataclass(frozen=True)
class Quantize:
    """Settings of the stage; see the module's card."""

    weight_bits: int = 8
    activation_bits: int = 8
    observer: str = "histogram"
    calibration_images: int = 1024
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "quantize"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Linear)

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if not 2 <= bits <= 8:
                raise ConfigError(f"`{name}` (={bits}) must be between 2 and 8; for more, leave the stage out.")
        if self.observer not in OBSERVERS:
            raise ConfigError(f"`observer` (={self.observer!r}) must be one of {', '.join(OBSERVERS)}.")
        if self.calibration_images < 1:
            raise ConfigError(f"`calibration_images` (={self.calibration_images}) must be at least 1.")

    def __call__(self, model: nn.Module, task: Task, work: Work) -> Edit:
        if is_quantized(model):
            raise ConfigError("the model is quantized already; keep one of the two `Quantize` stages.")
        found = {name: layer for name, layer in leaves(model) if kind(layer) in self.kinds or is_ours(layer)}
        kept = self._kept(found)
        was_training = model.training
        model.eval()
        for layer in found.values():
            if hasattr(layer, "settle"):
                layer.settle()  # type: ignore[operator]  # a method, by the layers' contract
        before = {name: describe(layer) for name, layer in found.items()}
        folded = fold_batch_norm(model)
        graph, untraced = _trace(model)
        tensors = Tensors()
        if graph is not None:
            floating = _floating(model, graph, task.example.to(task.device))
            _keep_unreached(kept, found, graph, model)
            chosen = [layer for name, layer in found.items() if not kept[name]]
            tensors = quantizable(graph, model, chosen, floating)
        taken = [name for name in found if not kept[name]]
        sites = tuple(self._site(name, before[name], kept[name], tensors, untraced) for name in found)
        require_change(sites)
        ranges: dict[str, tuple[float, int]] = {}
        if graph is not None:
            ranges = self._calibrate(model, tensors.places, task, work)
            model = place_quantizers(model, {place: self._quantizer(ranges[place]) for place in tensors.places})
        for name in taken:
            for layer in _weighted(found[name]):
                _quantize_weight(layer, self.weight_bits)
        round_biases(model)
        notes: dict[str, Any] = {
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits if graph is not None else None,
            "places": len(tensors.places),
            "batch_norms_folded": len(folded),
        }
        if untraced:
            notes["activations"] = f"float: {untraced}"
        return Edit(model.to(task.device).train(was_training), sites, notes)

    def _kept(self, found: Mapping[str, nn.Module]) -> dict[str, str]:
        kept = matching(list(found), self.include, self.exclude)
        for name, layer in found.items():
            if not kept[name] and not _weighted(layer):
                kept[name] = "it only displaces its input: there are no weights to quantize"
            elif not kept[name] and getattr(layer, "integer", True) is False:
                kept[name] = "it moves by fractions of a pixel, which mixes its weights; set `quantize: true` in Shift"
        return kept

    def _site(self, name: str, before: str, why: str, tensors: Tensors, untraced: str) -> Site:
        if why:
            return Site(name, before, None, why)
        weights = f"int{self.weight_bits} weights per channel"
        if untraced:
            return Site(name, before, weights, f"activations stay float: {untraced}")
        if all(tensors.inputs.get(name, [None])):
            return Site(name, before, f"{weights}, uint{self.activation_bits} activations")
        return Site(name, before, weights, "activations stay float: its input is no float tensor of the trace")

    def _quantizer(self, range_: tuple[float, int]) -> FakeQuantize:
        quantizer = FakeQuantize(self.activation_bits)
        quantizer.set_range(*range_)
        return quantizer

    def _calibrate(self, model: nn.Module, places: list[str], task: Task, work: Work) -> dict[str, tuple[float, int]]:
        """Run the calibration images through the float model; gives back (scale, zero point) of each place."""
        observers = {place: _Observed(place, self._observer(task.device)) for place in places}
        observed = place_quantizers(model, observers)
        batches = list(_first(task.calibration, self.calibration_images))
        work.progress.start("calibrate", len(batches))
        with torch.no_grad():
            for images in batches:
                observed(images.to(task.device))
                work.progress.step()
        work.progress.end()
        return {place: observer.range() for place, observer in observers.items()}

    def _observer(self, device: torch.device) -> nn.Module:
        observer = _torchao_observers()
        settings: dict[str, Any] = {
            "dtype": torch.uint8,
            "qscheme": torch.per_tensor_affine,
            "quant_min": 0,
            "quant_max": 2**self.activation_bits - 1,
        }
        if self.observer == "minmax":
            return observer.MinMaxObserver(**settings).to(device)  # type: ignore[no-any-return]  # untyped torchao
        histogram = observer.HistogramObserver(**settings)
        histogram.dst_nbins = 2**self.activation_bits  # it would search the range for 8 bits whatever was asked
        return histogram.to(device)  # type: ignore[no-any-return]  # untyped torchao


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight or activation of the model is quantized."""
    return bool(quantizer_places(model)) or any(isinstance(m, FakeQuantizeWeight) for m in model.modules())


def _torchao_observers() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao reports each GPU kernel that it cannot load on this machine
    try:
        from torchao.quantization.pt2e import observer
    finally:
        logging.disable(before)
    return observer


class _Observed(nn.Module):
    def __init__(self, place: str, observer: nn.Module) -> None:
        super().__init__()
        self.place, self.observer = place, observer

    def forward(self, x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            raise DataError(
                f"calibration met NaN or infinity at {self.place}; the model's weights or the images are broken."
            )
        self.observer(x)
        return x

    def range(self) -> tuple[float, int]:
        scale, zero_point = self.observer.calculate_qparams()  # type: ignore[operator]  # torchao's, untyped
        return float(scale), int(zero_point)


def _trace(model: nn.Module) -> tuple[fx.Graph | None, str]:
    try:
        return trace(model), ""
    except ValueError as error:
        return None, str(error)


def _floating(model: nn.Module, graph: fx.Graph, example: Tensor) -> set[str]:
    """Names of the nodes that are float tensors."""
    names = set()

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.is_floating_point():
                names.add(n.name)
            return value

    with torch.no_grad():
        Watch(model, graph=graph).run(example)
    return names


def _keep_unreached(kept: dict[str, str], found: Mapping[str, nn.Module], graph: fx.Graph, model: nn.Module) -> None:
    reached = {id(model.get_submodule(str(n.target))) for n in graph.nodes if n.op == "call_module"}
    for name, layer in found.items():
        if not kept[name] and id(layer) not in reached:
            kept[name] = "never reached by the forward pass"


def _weighted(layer: nn.Module) -> list[nn.Module]:
    return [module for module in layer.modules() if kind(module) in (nn.Conv2d, nn.Linear)]


def _quantize_weight(layer: nn.Module, bits: int) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    grid = FakeQuantizeWeight(bits, len(weight)).to(weight.device)
    grid.follow(weight)
    parametrize.register_parametrization(layer, "weight", grid.eval())


def _first(batches: Any, images: int) -> Iterator[Tensor]:
    left = images
    for batch, _ in batches:
        if left <= 0:
            return
        yield batch[:left]
        left -= len(batch)
