"""The gate: a change that does not pay is not made, and what was measured is asked once."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from awkward import noise_task
from torch import nn

from compress.errors import ConfigError
from compress.gate import Gate
from compress.nn.shift import ShiftConv2d
from compress.stage import Keep
from compress.stages import Shift
from compress.task import Work

X = torch.randn(1, 8, 9, 11, generator=torch.Generator().manual_seed(0))


def convolution(size: int) -> nn.Conv2d:
    return nn.Conv2d(8, 8, size, padding=size // 2)


def test_an_unknown_gate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`gate` \(='time'\) must be one of none, macs, bytes, latency"):
        Shift(gate="time")


@pytest.mark.parametrize("by", ["macs", "bytes"])
def test_counted_gates_ask_for_fewer(by: str, tmp_path: Path) -> None:
    gate = Gate(by, Work(tmp_path))
    assert " -> " in gate.require(convolution(3), convolution(1), X)
    with pytest.raises(Keep, match=r"no fewer (MACs|bytes of weights): "):
        gate.require(convolution(3), convolution(3), X)


def test_a_measured_decision_is_stored_and_replayed(tmp_path: Path) -> None:
    gate = Gate("latency", Work(tmp_path))
    with contextlib.suppress(Keep):  # which of the two is faster is not for a test to say
        gate.require(convolution(5), convolution(3), X)
    file = tmp_path / "gate.json"
    ((question, figures),) = json.loads(file.read_text()).items()
    assert question.startswith("onnxruntime: Conv2d(8, 8, kernel_size=(5, 5), stride=(1, 1), padding=(2, 2)) -> ")
    assert question.endswith(" at [8, 9, 11]")
    assert figures["before_ms"] > 0 and figures["after_ms"] > 0 and figures["slowest_ratio"] > 0

    for slowest_ratio, after_ms, verdict in ((0.9, 0.5, None), (0.95, 0.5, "not 10 % faster"), (1.2, 1.5, "slower")):
        answer = {"before_ms": 1.0, "after_ms": after_ms, "slowest_ratio": slowest_ratio}
        file.write_text(json.dumps({question: answer}))
        if verdict is None:
            gate.require(convolution(5), convolution(3), X)
        else:
            with pytest.raises(Keep, match=f"{verdict}.* on onnxruntime: 1 ms -> {after_ms} ms"):
                gate.require(convolution(5), convolution(3), X)


def test_a_layer_with_several_forms_is_judged_by_the_one_that_a_file_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ms = {"before": 1.0, "dense": 1.0, "depthwise": 0.5}
    judged = []

    def timed(layers: dict[str, nn.Module], *_: object) -> dict[str, SimpleNamespace]:
        if "before" in layers:
            judged.append(layers["after"])
        ratios = {name: ms.get(name, 0.5) for name in layers}
        return {name: SimpleNamespace(p50_ms=r, ratio=r, ratio_high=r) for name, r in ratios.items()}

    monkeypatch.setattr("compress.gate.timed", timed)
    new = ShiftConv2d(64, 64, 3, 3, padding=1)
    x = torch.randn(1, 64, 16, 16)
    Gate("latency", Work(tmp_path)).require(nn.Conv2d(64, 64, 3, padding=1), new, x)
    ms["depthwise"] = 0.95  # not 10 % faster than dense: the file stays with that
    (tmp_path / "again").mkdir()
    Gate("latency", Work(tmp_path / "again")).require(nn.Conv2d(64, 64, 3, padding=1), new, x)
    assert [type(layer) for layer in judged] == [nn.Sequential, nn.Conv2d]


def test_a_network_that_gets_no_cheaper_is_refused_with_the_figures(tmp_path: Path) -> None:
    model = nn.Sequential(convolution(3), nn.ReLU(), convolution(3))
    with pytest.raises(ConfigError, match=r"every layer was kept: no fewer MACs: 57,024 -> 57,024 \(e.g. 0\)"):
        Shift(taps=9, gate="macs")(model, noise_task(), Work(tmp_path))
