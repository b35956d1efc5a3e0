"""Training by compiled kernels: the same numbers, and a plain message where nothing can be compiled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import noise_task
from torch import nn

from compress.compiled import Compiled
from compress.errors import ConfigError
from compress.models import shift_resnet20
from compress.nn.displace import Shift2d
from compress.stages import FineTune
from compress.task import Work
from compress.train import fit

REAL = torch.compile


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that torch.compile is given, which run as they are: to make kernels of them takes a minute."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **more: REAL(model, backend=keep, **more))
    return graphs


def trained(model: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    work = Work(folder, "base")
    folder.mkdir()
    return fit(model, noise_task(), work, FineTune(epochs=2, lr=0.05, **settings))[0]


def test_it_trains_to_the_same_numbers(tmp_path: Path, traced: list[torch.fx.GraphModule]) -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), Shift2d(6, learn=True, quantize=False),
            nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip
        results.append(trained(model, tmp_path / str(compiled), compile=compiled).state_dict())
    assert len(traced) > 1  # and displacing, which is not in them, stands between
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile makes its kernels for CPUs with a C++ compiler")
def test_with_the_compilers_own_kernels_too(tmp_path: Path) -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(252, 3))
        results.append(trained(model, tmp_path / str(compiled), compile=compiled).state_dict())
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_images_of_another_shape_are_not_compiled_for(traced: list[torch.fx.GraphModule]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(1), nn.Linear(144, 3))
    compiled = Compiled(model)
    for count in (4, 4, 3):
        x = torch.randn(count, 3, 8, 8)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(traced) == 2  # the first is the trial that says whether torch can compile at all


def test_a_network_of_shifts_is_compiled_in_parts(traced: list[torch.fx.GraphModule]) -> None:
    model = shift_resnet20(shift="active").eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(Compiled(model)(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(traced) > 9


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Any, **_: Any) -> Any:
        def run(*_: Any) -> Any:
            raise RuntimeError("no C++ compiler was found\nand more")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ConfigError, match=r"`compile` \(=true\).*cpu.*no C\+\+ compiler was found\).*set it to false"):
        Compiled(nn.Linear(2, 2))
