"""Layers of very many inputs: what is computed grows with their outputs, and they say that they saw no images."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import noise_task
from torch import Tensor, nn

from compress.lowrank.factors import Shape
from compress.lowrank.harm import harms
from compress.lowrank.ranks import Basis
from compress.stages import Factorize, PruneChannels
from compress.task import Work


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 63, 24), nn.Linear(24, 3)).eval()


@pytest.mark.parametrize("settings", [{"params": 0.4}, {"ratio": 0.3}, {"method": "svd", "macs": 0.2}])
def test_no_matrix_is_as_large_as_the_inputs(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("compress.stages.factorize", "compress.lowrank.harm"):
        monkeypatch.setattr(f"{place}.MOST_FEATURES", 500)
    eigh = torch.linalg.eigh

    def small(matrix: Tensor) -> Any:
        assert len(matrix) <= 24
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", small)
    edit = Factorize(**settings, images=16)(wide(), noise_task(), Work(tmp_path))
    why = {site.name: site.why for site in edit.sites if site.after is not None}
    assert why["3"] == "fitted to its weights alone: 1008 weights for each output are too many"
    assert not any(text for name, text in why.items() if name != "3")


def test_a_wide_layer_without_data_is_the_truncation_of_its_weights(tmp_path: Path) -> None:
    model: Any = wide()
    values = torch.linalg.svdvals(model[3].weight.detach().double())
    kernel = Shape.of(nn.Conv2d(1008, 24, 1), "svd").kernel(_as_1x1(model[3]))[0]
    basis = Basis.of(kernel, Shape.of(_as_1x1(model[3]), "svd"))
    torch.testing.assert_close(basis.kept, values.square().cumsum(0).unsqueeze(0))
    assert basis.first is None and basis.last is not None
    torch.testing.assert_close(basis.core @ basis.last.mT, kernel)


def _as_1x1(layer: nn.Linear) -> nn.Conv2d:
    new = nn.Conv2d(layer.in_features, layer.out_features, 1)
    new.weight = nn.Parameter(layer.weight.detach()[..., None, None])
    return new


def test_first_order_harm_of_outputs_alone_is_what_small_changes_do() -> None:
    """As for Tucker, where the channels have ranks too."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    layer = model[0]
    x = torch.randn(64, 6, 7, 7) * torch.arange(1, 7).view(1, 6, 1, 1)
    found = harms(model.eval(), {"0": layer}, "svd", [x] * 20, seed=0)["0"]
    assert found.shape == (1, 8)
    kernel = layer.weight.detach().double().flatten(2).permute(1, 2, 0)
    looked = x[:32].double()  # what the channels carry is judged on these
    basis = Basis.of(kernel, Shape.of(layer, "svd"), torch.einsum("nchw,ndhw->cd", looked, looked))
    with torch.no_grad():
        wanted = model(x)
        for last in (1, 3, 6):
            new = (basis.core[..., :last] @ basis.last[:, :last].mT).permute(2, 0, 1)  # type: ignore[index]
            changed = copy.deepcopy(model)
            changed[0].weight.copy_(new.reshape(layer.weight.shape))
            moved = changed(x) - wanted
            direct = float((moved - moved.mean(1, keepdim=True)).square().sum(1).mean())
            assert float(found[0, last - 1]) == pytest.approx(direct, rel=0.15)
    assert float(found[0, -1]) < 1e-9


def test_a_layer_that_nobody_reads_does_no_harm(tmp_path: Path) -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.unread, self.linear = nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).relu()
            self.unread(x)
            out: Tensor = self.linear(x.mean((2, 3)))
            return out

    edit = Factorize(macs=0.7, images=16)(Unread().eval(), noise_task(), Work(tmp_path))
    assert edit.notes["ranks"] == {"unread": [1, 1]}


def test_readers_of_channels_that_are_too_wide_to_be_solved_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.channels.thinning.MOST_FEATURES", 500)
    edit = PruneChannels(macs=0.7, images=16, include=["0", "3"])(wide(), noise_task(), Work(tmp_path))
    assert edit.notes["not_solved"] == {"3": "1008 weights for each output are too many"}
    edit = PruneChannels(macs=0.7, images=16, refit=False)(wide(), noise_task(), Work(tmp_path))
    assert "not_solved" not in edit.notes
