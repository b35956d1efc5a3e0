"""Ranges of a model's tensors, from images that it is shown.

Observers are torchao's. The histogram observer looks for the range of least squared error (Nagel et al., "A White
Paper on Neural Network Quantization", arXiv:2106.08295, section 3.1), the percentile is read off its histogram.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ConfigError, DataError
from compress.nn.places import place_quantizers
from compress.nn.quantized import FakeQuantize
from compress.task import Task, Work

OBSERVERS = ("histogram", "minmax", "average", "percentile")


@dataclass(frozen=True)
class Ranges:
    """How ranges are found: the observer, its percentile (for "percentile"), whether they lie around zero, on how many
    images. Raises ConfigError for settings that make no sense."""

    observer: str
    percentile: float
    symmetric: bool
    calibration_images: int

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise ConfigError(f"`observer` (={self.observer!r}) must be one of {', '.join(OBSERVERS)}.")
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"`percentile` (={self.percentile}) must be above 50 and at most 100; 99.99 is usual.")
        if self.calibration_images < 1:
            raise ConfigError(f"`calibration_images` (={self.calibration_images}) must be at least 1.")


def calibrated(
    model: nn.Module, bits: Mapping[str, int], how: Ranges, learn: bool, task: Task, work: Work
) -> dict[str, FakeQuantize]:
    """For every place (see `compress.nn.places`) in `bits` a quantizer whose range calibration images gave.

    Raises:
        DataError: there are no images, or a tensor is not finite, or nothing but zero.
    """
    # On the CPU wherever the model is: looking for the best range takes thousands of steps, each a few numbers.
    observers = {place: _Observed(place, number, how) for place, number in bits.items()}
    batches = [batch for batch in _first(task.calibration, how.calibration_images) if len(batch)]
    if not batches:
        raise DataError("calibration has no images; give the task some, or quantize weights only.")
    observed = place_quantizers(model, observers)
    work.progress.start("calibrate", len(batches))
    with torch.no_grad():
        for images in batches:
            observed(images.to(task.device))
            work.progress.step()
    work.progress.end()
    quantizers = {}
    for place, observer in observers.items():
        quantizers[place] = FakeQuantize(observer.bits, learn)
        quantizers[place].set_range(*observer.range())
    return quantizers


def _first(batches: Any, images: int) -> Iterator[Tensor]:
    left = images
    for batch, _ in batches:
        if left <= 0:
            return
        yield batch[:left]
        left -= len(batch)


class _Observed(nn.Module):
    """Looks at the tensor that passes."""

    def __init__(self, place: str, bits: int, how: Ranges) -> None:
        super().__init__()
        self.place, self.bits, self.how = place, bits, how
        self.observer: Any = _observer(how.observer, bits)  # torchao's, untyped

    def forward(self, x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            raise DataError(
                f"calibration met NaN or infinity at {self.place}; the model's weights or the images are broken."
            )
        self.observer(x)
        return x

    def range(self) -> tuple[float, int]:
        """(scale, zero point) of the unsigned grid."""
        low, high = float(self.observer.min_val), float(self.observer.max_val)
        if low == high == 0:
            raise DataError(
                f"calibration met nothing but zeros at {self.place}, which has no range; the layer in front of it is "
                "dead: `exclude` what reads it, or calibrate on other images."
            )
        if self.how.observer == "percentile":
            low, high = _percentiles(self.observer, self.how.percentile)
        if self.how.symmetric and low < 0:
            self.observer.qscheme = torch.per_tensor_symmetric
        if self.how.observer == "percentile":
            self.observer.min_val.fill_(min(low, 0.0))
            self.observer.max_val.fill_(max(high, 0.0))
            scale, zero_point = self.observer._calculate_qparams(self.observer.min_val, self.observer.max_val)
            return float(scale), int(zero_point)
        found, zero_point = self.observer.calculate_qparams()
        return float(found), int(zero_point)


def _percentiles(histogram: Any, percentile: float) -> tuple[float, float]:
    """Between them lie `percentile` of a hundred values, as many being left out below as above."""
    low, high = float(histogram.min_val), float(histogram.max_val)
    counts = histogram.histogram.double()
    share = counts.cumsum(0) / counts.sum()
    out = (1 - percentile / 100) / (2 if low < 0 < high else 1)
    width = (high - low) / len(counts)
    first = int((share > out).nonzero()[0]) if low < 0 else 0
    last = int((share >= 1 - out).nonzero()[0]) if high > 0 else len(counts) - 1
    return low + width * first, low + width * (last + 1)


def _observer(name: str, bits: int) -> nn.Module:
    observer = _torchao_observers()
    settings: dict[str, Any] = {
        "dtype": torch.uint8,
        "qscheme": torch.per_tensor_affine,
        "quant_min": 0,
        "quant_max": 2**bits - 1,
    }
    if name == "minmax":
        return observer.MinMaxObserver(**settings)  # type: ignore[no-any-return]  # untyped torchao
    if name == "average":
        return observer.MovingAverageMinMaxObserver(**settings)  # type: ignore[no-any-return]  # untyped torchao
    histogram = observer.HistogramObserver(**settings)
    histogram.dst_nbins = 2**bits  # it would search the range for 8 bits whatever was asked
    return histogram  # type: ignore[no-any-return]  # untyped torchao


def _torchao_observers() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torchao reports each GPU kernel that it cannot load on this machine
    try:
        from torchao.quantization.pt2e import observer
    finally:
        logging.disable(before)
    return observer
