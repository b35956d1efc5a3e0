"""How many displacements of a network are zero, counted by hand."""

from __future__ import annotations

import torch
from test_report import row
from torch import nn

from compress.nn.displace import Shift2d, ShiftPool2d
from compress.nn.shift import ShiftConv2d
from compress.page import headline
from compress.rows import displacements
from compress.wording import displacements_text, remarks


def shift_conv(places: list[list[list[float]]], quantize: bool = True) -> ShiftConv2d:
    """A layer whose copies stand at these (y, x), channel by channel; every weight is 1."""
    layer = ShiftConv2d(len(places), 4, 3, len(places[0]), padding=1, learn=True, quantize=quantize)
    with torch.no_grad():
        layer.displacement.copy_(torch.tensor(places))
        layer.pointwise.weight.fill_(1)
    return layer


def test_a_displacement_is_zero_when_it_rounds_to_zero_on_both_axes() -> None:
    layer = shift_conv([[[0.4, -0.4], [0.0, 0.5], [-1.2, 0.0]], [[0.0, 0.0], [1.0, 1.0], [-1.0, 0.3]]])
    assert displacements(nn.Sequential(layer)) == {"all": 6, "zero": 2, "empty": 0}
    layer = shift_conv([[[0.4, -0.4], [0.0, 0.5]], [[0.0, 0.0], [1.0, 1.0]]], quantize=False)
    assert displacements(layer) == {"all": 4, "zero": 1, "empty": 0}
    assert displacements(nn.Conv2d(2, 2, 3)) is None


def test_copies_that_met_are_counted_as_the_network_is_saved() -> None:
    # Channel 0: three met at the centre. Channel 1: two met off the centre. Channel 2: none met.
    layer = shift_conv([
        [[0.0, 0.1], [0.2, 0.0], [-0.3, 0.0]],
        [[0.9, 0.0], [1.0, 0.2], [0.0, 0.0]],
        [[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]],
    ])  # fmt: skip
    counted = {"all": 9, "zero": 1 + 2 + 1 + 1 + 1, "empty": 3}
    assert displacements(nn.Sequential(layer)) == counted
    assert layer.learn and layer.displacement[0, 2, 0] == -0.3  # counting changes nothing
    layer.settle()
    assert int(layer.displacement.any(-1).sum()) == 6  # those left over stand somewhere else, without weight
    assert displacements(nn.Sequential(layer)) == counted


def test_a_copy_without_weight_moves_nothing() -> None:
    layer = ShiftConv2d(4, 6, 3, 2, padding=1, groups=2)  # one copy at the centre, one displaced
    with torch.no_grad():
        layer.pointwise.weight.fill_(1)
        layer.pointwise.weight[3:, 3] = 0  # second group: the displaced copy of its second channel
        layer.pointwise.weight[:2, 1] = 0  # one output of the first group still reads this one
    assert displacements(layer) == {"all": 8, "zero": 5, "empty": 1}


def test_shift_layers_that_stand_alone_are_counted_too() -> None:
    model = nn.Sequential(Shift2d(20), ShiftPool2d(9, 3, 2, 1, (0, 0)), nn.ReLU())
    # 18 of 20 and 9 of 9 channels take the nine directions in turn; the two left over stay where they are.
    assert displacements(model) == {"all": 29, "zero": 2 + 2 + 1, "empty": 0}
    learned = Shift2d(3, learn=True)
    with torch.no_grad():
        learned.displacement.copy_(torch.tensor([[0.49, 0.0], [-0.5, 0.0], [0.0, 3.0]]))
    assert displacements(nn.Sequential(learned, learned)) == {"all": 3, "zero": 1, "empty": 0}
    assert learned.learn and isinstance(learned.displacement, nn.Parameter)


def test_zero_displacements_in_words() -> None:
    assert displacements_text({"all": 2496, "zero": 1528, "empty": 0}) == "61.2 % of 2,496 displacements are zero"
    assert displacements_text({"all": 8, "zero": 5, "empty": 1}).endswith(
        " are zero (1 copies without weight among them)"
    )


def test_a_report_says_how_many_are_zero() -> None:
    first, last = {"all": 8, "zero": 2, "empty": 0}, {"all": 8, "zero": 5, "empty": 1}
    rows = [row("base"), *(row(n, displacements=d) for n, d in (("shift", first), ("recover", last), ("result", last)))]
    assert headline(rows)[-1][:2] == ("Zero displacements", "62.5 %")
    assert [line for line in remarks({"rows": rows}) if "displacements" in line] == [
        "shift: 25.0 % of 8 displacements are zero",
        "recover: 62.5 % of 8 displacements are zero (1 copies without weight among them)",
    ]
