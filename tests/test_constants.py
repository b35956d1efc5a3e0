"""Networks whose forward makes tensors of its own: a trace knows them again, and keeps one of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from awkward import noise_task
from torch import Tensor, nn

import compress
from compress.nn.places import trace
from compress.run import run
from compress.stages import PruneChannels, Quantize
from compress.task import Work

SHAPE = (3, 8, 8)
TASK = noise_task(SHAPE)


class Weighed(nn.Module):
    """Picks channels by a tensor and scales them by another, both made in the forward pass."""

    def __init__(self, training_scale: float = 0.9) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(6, 3)
        self.training_scale = training_scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x).relu()).relu()
        scale = torch.tensor([0.3, self.training_scale - 0.3 if self.training else 0.6]).sum()
        out: Tensor = self.fc((x[:, torch.arange(6)] * scale).mean((2, 3)))
        return out


def constants(model: nn.Module) -> list[str]:
    return [name for name in vars(model) if name.startswith("_tensor_constant")]


def test_a_trace_keeps_one_tensor_for_each_that_the_forward_makes() -> None:
    model = Weighed()
    texts = {str(trace(model)) for _ in range(3)}
    assert len(texts) == 1 and len(constants(model)) == 2


def test_a_tensor_that_depends_on_the_mode_is_still_refused() -> None:
    with pytest.raises(ValueError, match="something else in training mode"):
        trace(Weighed(training_scale=1.9))


def test_such_a_network_is_quantized_with_its_activations_and_loaded_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    result = run(
        [Quantize(calibration_images=16)],
        TASK,
        build=("test_constants.Weighed", {}),
        out=tmp_path / "run",
        export=["onnx"],
        measure="none",
        cache=None,
    )
    notes = result.report["rows"][1]["notes"]
    assert notes["activation_bits"] == 8 and notes["places"] >= 3
    assert result.checkpoint is not None
    loaded = compress.load(result.checkpoint, allow=["test_constants"])
    assert torch.equal(loaded(TASK.example), result.model(TASK.example))


def test_channels_that_no_tensor_picks_can_go(tmp_path: Path) -> None:
    edit = PruneChannels(macs=0.8, images=16, include=["conv1"])(Weighed().eval(), TASK, Work(tmp_path))
    assert edit.model.conv1.out_channels < 8 and edit.model(TASK.example).shape == (2, 3)  # type: ignore[operator]
