"""The gate: keep a change only where it pays, in multiply-adds, in bytes of weights, or in time really measured."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.files import write
from compress.stage import Keep
from compress.surgery import kind
from compress.task import Work

if TYPE_CHECKING:
    from compress.measure import Latency

GATES = ("none", "macs", "bytes", "latency")
FASTER = 0.9  # of the time before, in every round
ROUNDS = 3
SECONDS = 0.25  # of work in each


def check_gate(gate: str) -> None:
    """Raise `ConfigError` for a gate that there is not."""
    if gate not in GATES:
        raise ConfigError(f"`gate` (={gate!r}) must be one of {', '.join(GATES)}.")


@dataclass(frozen=True)
class Gate:
    """Judges one layer at a time. What was measured is stored in the stage's folder, and replayed from there."""

    by: str
    work: Work

    def require(self, old: nn.Module, new: nn.Module, x: Tensor) -> str:
        """The cost before and after; raises `Keep` unless `new` costs less than `old` on inputs like `x` (N, C, H, W).

        In time, less means at least 10 % less in each of three rounds, in the target runtime, for one image; a layer
        that a file can hold in several forms is judged by the one that the file would take.
        """
        if self.by == "macs":
            return _fewer("MACs", _macs(old, x), _macs(new, x))
        if self.by == "bytes":
            return _fewer("bytes of weights", _bytes(old), _bytes(new))
        measured = self._measured(old, new, x)
        before, after = measured["before_ms"], measured["after_ms"]
        figures = f"on {self.work.target}: {before:.3g} ms -> {after:.3g} ms"
        if measured["slowest_ratio"] > FASTER:
            raise Keep(f"{'slower' if after >= before else 'not 10 % faster in each round'} {figures}")
        return figures

    def _measured(self, old: nn.Module, new: nn.Module, x: Tensor) -> dict[str, float]:
        from compress.lower.forms import fastest

        file = self.work.folder / "gate.json"
        known: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        forms = new.forms(self.work.target) if hasattr(kind(new), "forms") else {}  # type: ignore[operator]  # ours
        shown = " or ".join(map(_told, forms.values())) or _told(new)
        question = f"{self.work.target}: {_told(old)} -> {shown} at {list(x.shape[1:])}"
        if question not in known:
            if forms:
                new = fastest(forms, tuple(x.shape[1:]), self.work.target)
            times = timed({"before": old, "after": new}, x.shape[1:], self.work.target)
            known[question] = {f"{name}_ms": time.p50_ms for name, time in times.items()}
            known[question]["slowest_ratio"] = times["after"].ratio_high
            write(file, json.dumps(known, indent=1).encode())
        return known[question]


def _fewer(unit: str, before: int, after: int) -> str:
    if after >= before:
        raise Keep(f"no fewer {unit}: {before:,} -> {after:,}")
    return f"{unit}: {before:,} -> {after:,}"


def _told(layer: nn.Module) -> str:
    """Everything that makes a layer as fast as it is, in one line."""
    config = json.dumps(layer.config()) if hasattr(layer, "config") else ""  # type: ignore[operator]  # ours
    return " ".join(f"{layer!r} {config}".split())


def _macs(layer: nn.Module, x: Tensor) -> int:
    from compress.measure import profile

    return profile(layer, x).macs


def _bytes(layer: nn.Module) -> int:
    """Weights in their own type; whole-pixel displacements and channel orders in one byte for each number."""
    total = 0
    for name, tensor in layer.state_dict().items():
        small = not tensor.is_floating_point() or (name.endswith("displacement") and getattr(layer, "integer", False))
        total += tensor.numel() * (1 if small else tensor.element_size())
    return total


def timed(
    layers: Mapping[str, nn.Module], shape: Sequence[int], target: str, seconds: float = SECONDS
) -> dict[str, Latency]:
    """Each layer's latency in `target` for one image of `shape` (C, H, W), in rounds; ratios are to the first."""
    from compress.measure import latency

    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        paths = {name: _written(layer, example, Path(folder) / name, target) for name, layer in layers.items()}
        return latency(paths, example, target=target, rounds=ROUNDS, seconds=seconds)


def _written(layer: nn.Module, example: Tensor, path: Path, target: str) -> Path:
    from compress.lower.onnx_file import export_onnx
    from compress.lower.pt2 import export_pt2

    if target in ("onnxruntime", "openvino"):
        path = path.with_suffix(".onnx")
        export_onnx(layer, example, path, input={}, target=target)
    else:
        path = path.with_suffix(".pt2")
        export_pt2(layer, example, path)
    return path
