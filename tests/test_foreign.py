"""What networks of other people's code bring along: hooks on weights, other types of number, layers of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.utils.prune
from awkward import noise_task
from torch import Tensor, nn

from compress.errors import ConfigError
from compress.measure import profile
from compress.run import run
from compress.stages import Prune

SHAPE = (3, 8, 8)


def net(layer: nn.Module | None = None) -> nn.Sequential:
    middle = layer or nn.Conv2d(8, 8, 3, padding=1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()


HOOKS: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "pruned": (lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.4), "torch.nn.utils.prune.remove"),  # type: ignore[no-untyped-call]
    "weight norm": (lambda layer: nn.utils.weight_norm(layer), "torch.nn.utils.remove_weight_norm"),
    "spectral norm": (lambda layer: nn.utils.spectral_norm(layer), "torch.nn.utils.remove_spectral_norm"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("how", HOOKS)
def test_weights_that_a_hook_makes_are_refused_with_the_remedy(how: str, tmp_path: Path) -> None:
    hook, remedy = HOOKS[how]
    model = net()
    hook(model[1])
    with pytest.raises(ConfigError, match=rf"a hook makes the weight of `1` anew .*; call {remedy} on that module"):
        run([Prune(amount=0.5)], noise_task(SHAPE), model=model, out=tmp_path, measure="none", export=[])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_than_float32_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    said = rf"the model's `0.weight` is of type {str(dtype)[6:]}, .*; call `.float\(\)` on the model"
    with pytest.raises(ConfigError, match=said):
        run([Prune(amount=0.5)], noise_task(SHAPE), model=net().to(dtype), out=tmp_path, measure="none", export=[])


class Standardized(nn.Conv2d):
    """Computes its weight anew, and is a convolution in all else."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Twofold(nn.Conv2d):
    """A forward of its own: what it costs is not known."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(super().forward(input))


def test_the_work_of_a_convolution_that_only_makes_its_weight_otherwise_is_counted() -> None:
    example = noise_task(SHAPE).example
    plain = profile(net(), example)
    assert profile(net(Standardized(8, 8, 3, padding=1)), example) == plain
    other = profile(net(Twofold(8, 8, 3, padding=1)), example)
    assert other.uncounted == ("1",) and other.macs == plain.macs - 8 * 8 * 9 * 36
