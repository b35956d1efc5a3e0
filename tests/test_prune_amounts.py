"""Amounts of `Prune` that cannot be, the closest ones that are named instead, and what the notes say was asked."""

from __future__ import annotations

import re

import pytest
import torch
from test_prune import digits, prune, zeros
from torch import nn

from compress.errors import ConfigError


def closest(message: str, end: str) -> float:
    """The amount that a message names."""
    found = re.search(rf"{end} (0\.\d+)", message)
    assert found is not None, message
    return float(found[1])


def test_amounts_of_all_weights_together_name_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"must lie between 0 and 0.99: of 3504 weights 0 are zero already, and 35"):
        prune(digits(), amount=0.995)
    model = prune(digits(), amount=0.8, refit=False).model
    with pytest.raises(ConfigError, match=r"`amount` \(=0.7\) must lie between 0.8 and 0.99") as caught:
        prune(model, amount=0.7)  # 2803 of 3504 are zero, so that 0.7999 of them are too few
    prune(model, amount=closest(str(caught.value), "and"))


@pytest.mark.parametrize("settings", [{"amount": 0.7}, {"layers": {"0": 0.7}, "amount": 0.4}])
def test_amounts_of_one_layer_name_the_closest(settings: dict[str, object]) -> None:
    where = "layers.0" if "layers" in settings else "amount"
    with pytest.raises(ConfigError, match=rf"`{where}` \(=0.7\) must be at most 0.5 for 0, of whose 1152 .* 576") as no:
        prune(digits(), **settings, scope="layer", floor=0.5, refit=False)
    near = closest(str(no.value), "at most")
    edit = prune(digits(), layers={"0": near}, amount=0.4, scope="layer", floor=0.5, refit=False)
    assert edit.notes["zeros"]["0"] == pytest.approx(near, abs=1e-3)  # type: ignore[index,call-overload]
    with pytest.raises(ConfigError, match=r"must be at least 0.5 for 0, of whose 1152 weights \d+ are zero already"):
        prune(edit.model, amount=0.3, scope="layer")


@pytest.mark.parametrize(("scope", "end"), [("global", "between"), ("layer", "at least")])
def test_an_end_that_is_named_is_not_refused_for_its_last_digit(scope: str, end: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(792, 32))
    with torch.no_grad():
        model[1].weight.flatten()[:10007] = 0  # 0.394847 of 25344
    with pytest.raises(ConfigError) as caught:
        prune(model, amount=0.3, scope=scope, refit=False)
    near = closest(str(caught.value), end)
    assert near == 0.3949
    assert prune(model, amount=near, scope=scope, refit=False).notes["requested"] == near


def test_the_notes_say_what_was_asked() -> None:
    assert prune(digits(), layers={"*": 0.9}, refit=False).notes["requested"] == 0.9
    assert prune(digits(), layers={"*": 0.9}, amount=0.3, refit=False).notes["requested"] == 0.9
    assert prune(digits(), pattern="2:4", refit=False).notes["requested"] == 0.5
    notes = prune(digits(), layers={"0": 0.75, "7": 0.5}, amount=0.25, refit=False).notes
    asked = (0.75 * 1152 + 0.25 * 2304 + 0.5 * 48) / 3504
    assert notes["requested"] == pytest.approx(asked)
    assert notes["achieved"] == pytest.approx(asked, abs=1e-3)


def test_outputs_that_lose_their_last_weight_are_counted() -> None:
    assert "emptied_outputs" not in prune(digits(), amount=0.3, refit=False).notes
    model = digits()
    model[0].weight.data[3:5] *= 1e-3  # type: ignore[index,operator]
    model[0].weight.data[9] = 0  # type: ignore[index,operator]  # it had none before
    edit = prune(model, amount=0.5, refit=False)
    gone = zeros(edit.model)["0"].flatten(1).all(1)
    assert gone.nonzero().flatten().tolist() == [3, 4, 9]
    assert edit.notes["emptied_outputs"] == {"0": 2}
