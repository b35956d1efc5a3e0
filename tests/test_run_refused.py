"""Runs that are refused before the work, and those that stop on the way: what they say, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from awkward import noise_task
from safetensors import safe_open
from test_run import BUILD, QUICK, SHAPE, quick_run
from torch import Tensor, nn

import compress
from compress.errors import ConfigError, UserError
from compress.run import run
from compress.stages import FineTune, Prune


def test_bad_calls(tmp_path: Path) -> None:
    task = noise_task(SHAPE)
    with pytest.raises(ConfigError, match="exactly one of `build` and `model` must be given"):
        run([QUICK["Shift"]], task, out=tmp_path)
    with pytest.raises(ConfigError, match="`stages` must hold at least one stage"):
        run([], task, build=BUILD, out=tmp_path)
    with pytest.raises(ConfigError, match="two stages of one class need names of their own"):
        run([QUICK["Shift"], QUICK["Shift"]], task, build=BUILD, out=tmp_path)
    with pytest.raises(ConfigError, match=r"`stages.shift` \(Shift\) cannot come after `stages.quantize`"):
        run([QUICK["Quantize"], QUICK["Shift"]], task, build=BUILD, out=tmp_path)
    for name, value in (("target", "abacus"), ("measure", "al"), ("forms", "any"), ("export", ["onx"])):
        with pytest.raises(ConfigError, match=f"`{name}` .*(onx|abacus|al|any).* must be "):
            run([QUICK["Shift"]], task, build=BUILD, out=tmp_path, **{name: value})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


class Deciding(nn.Module):
    """Its forward pass decides by what the images show: torch.export cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(SHAPE[0], 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x).mean((2, 3))
        return y if y.sum() > 0 else -y


def test_a_network_that_no_file_can_hold_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"torch.export stops with .*`export: \[\]` with `measure: none`"):
        run([QUICK["Shift"]], noise_task(SHAPE), model=Deciding(), out=tmp_path, export=["onnx"], measure="none")
    assert not list(tmp_path.glob("*.json"))
    run([QUICK["Shift"]], noise_task(SHAPE), model=Deciding(), out=tmp_path, measure="none")


def test_a_floor_stops_a_run_that_has_lost_its_accuracy(tmp_path: Path) -> None:
    stages = {"prune": Prune(amount=0.95, images=16), "recover": FineTune(1, lr=1e-5), "int8": QUICK["Quantize"]}
    said = r"after `recover` .* % of val get the base's answer, and `floor` \(=1\) asks for more"
    with pytest.raises(UserError, match=said):
        quick_run(tmp_path / "out", stages, floor=1, export=["onnx"], train=FineTune(epochs=5, lr=0.05))
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in report["rows"]] == ["base", "prune", "recover", "result"] and not report["exports"]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert all(f'"{name}"' in str(file.metadata()) for name in ("prune", "recover"))
        assert '"int8"' not in str(file.metadata())
    with pytest.raises(UserError, match=r"after `result` .* asks for more"):
        quick_run(tmp_path / "end", {"prune": stages["prune"]}, floor=1, train=FineTune(epochs=5, lr=0.05))
    quick_run(tmp_path / "fine", floor=0.0)
    with pytest.raises(ConfigError, match=r"`floor` \(=80\) must be a share of val"):
        quick_run(tmp_path / "wrong", floor=80)


def test_an_export_that_fails_leaves_checkpoint_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise UserError("no file can be made of this network.")

    monkeypatch.setattr("compress.place.write_file", fails)
    with pytest.raises(UserError, match=f"no file can be made .* What there is lies in {tmp_path}"):
        run([QUICK["Shift"]], noise_task(SHAPE), build=BUILD, out=tmp_path, export="onnx", measure="none")
    assert compress.load(tmp_path / "model.safetensors")
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["failure"].startswith("no file") and report["exports"] == []
