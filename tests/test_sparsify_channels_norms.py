"""What scales a channel where some ways out of its layers pass a batch norm and others do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_sparsify_channels import lasso, length, sparsify
from torch import Tensor, nn

from compress.errors import ConfigError


class HalfNormed(nn.Module):
    """Of the layers whose channels are added one has a batch norm behind it, with scales or without."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=affine)
        self.two = nn.Conv2d(2, 4, 3, bias=False)
        self.last, self.linear = nn.Conv2d(4, 5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.one(x)) + self.two(x))
        out: Tensor = self.linear(F.relu(self.last(x)).mean((2, 3)))
        return out


def test_what_no_norm_scales_counts_by_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = HalfNormed()
    wanted = sum(length(model.norm.weight[u], model.two.weight[u]) for u in range(4))
    wanted += sum(length(row) for row in model.last.weight)
    assert float(lasso(model, 2.0).penalty().detach()) == pytest.approx(2 * wanted, rel=1e-5)
    with torch.no_grad():
        model.norm.weight[:2] = 0
        model.two.weight[0] = 0  # of the second unit one layer is left, which carries it
    told: Any = sparsify(model, tmp_path, l1=1e-30, lr=1e-9).notes["near_zero"]
    assert told["two"] == {"before": 1, "after": 1, "of": 4}


class Ways(nn.Module):
    """What `stem` makes is scaled by one norm behind a depthwise layer and, for `plain`, by another or by none."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4) if both else nn.Identity()
        self.scaled, self.plain = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        out: Tensor = (self.scaled(self.norm(self.depthwise(x))) + self.plain(self.other(x))).mean((2, 3))
        return out


@pytest.mark.parametrize("both", [True, False])
def test_a_maker_counts_where_one_way_out_has_no_scales(both: bool) -> None:
    model = Ways(both)
    second: Any = model.other if both else model.stem
    wanted = sum(length(model.norm.weight[u], second.weight[u]) for u in range(4))
    assert float(lasso(model, 1.0).penalty().detach()) == pytest.approx(wanted, rel=1e-5)


def test_weights_before_a_norm_without_scales_stay(tmp_path: Path) -> None:
    model = HalfNormed(affine=False)
    sites = {site.name: site for site in sparsify(model, tmp_path).sites}
    for name in ("one", "two"):
        assert sites[name].after is None
        assert sites[name].why.startswith("its channels, or some that go with them, pass norm: a batch norm without")
    assert sites["last"].after is not None
    only = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(144, 3))
    with pytest.raises(ConfigError, match=r"the stage would change nothing.*pass 1: a batch norm without scales"):
        sparsify(only, tmp_path / "only")
