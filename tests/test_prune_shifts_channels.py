"""Channels that nothing reads: which groups go, which stay, and what is said of those."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import noise_task
from test_prune_shifts import network, prune, shift
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress.channels.slices import remove_unread, why_not_without
from compress.channels.unread import without_unread
from compress.measure import profile
from compress.nn.masked import MaskedWeight, mask_of, put_mask
from compress.nn.shift import ShiftConv2d
from compress.stages import Prune, PruneChannels, Shift
from compress.task import Work

EXAMPLE = noise_task().example


class Two(nn.Module):
    """Two shift layers one after the other, of which the first one's input is looked at in the network's own code."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.one, self.two = (shift([[(0, 1), (1, 0)]] * 6, outputs=8) for _ in range(2))
        self.head = nn.Linear(8, 3)
        for layer, gone in ((self.one, [0, 1, 2]), (self.two, [10, 11])):
            layer.pointwise.weight.data[:, gone] = 0  # all copies of the first channel and one more; of the last one

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        if self.how == "view":
            x = x.view(-1, 6, 9, 11)
        elif self.how == "refused" and x.shape[1] != 6:
            raise ValueError("six")
        y: Tensor = self.head(self.two(self.second(self.one(x)).relu()).mean((2, 3)))
        return y


@pytest.mark.parametrize("how", ["view", "refused", "computed"])
def test_only_the_group_that_fails_stays(how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Two(how).eval()
    reason = "does not run (six): its forward pass counts on a fixed width"
    if how == "computed":
        parametrize.register_parametrization(model.first, "weight", nn.Identity())
        reason = "first has weights that are computed from others"
    elif how == "view":
        reason = "counts on a fixed width"
    expected = model(EXAMPLE)
    edit = prune(copy.deepcopy(model), tmp_path, harm=0)
    told: Any = edit.notes["channels"]
    assert told["left"] == {"second": [5, 6]} and list(told["kept"]) == ["first"]
    assert told["kept"]["first"].startswith("1 of 6 channels that nothing reads stay: ")
    assert told["kept"]["first"].endswith(reason) and "`exclude`" not in told["kept"]["first"]
    thin: Any = edit.model
    assert (thin.first.out_channels, thin.second.out_channels, thin.two.in_channels) == (6, 5, 5)
    torch.testing.assert_close(thin(EXAMPLE), expected)
    assert int(mask_of(thin.one.pointwise).mask[0].sum()) == 9  # type: ignore[union-attr]


def test_masks_of_other_layers_stay_what_they_are() -> None:
    torch.manual_seed(0)
    model = Two("").eval()
    for layer in (model.second, model.head):
        put_mask(layer, MaskedWeight(), torch.rand_like(layer.weight) < 0.8)
    expected, left = model(EXAMPLE), mask_of(model.second).mask  # type: ignore[union-attr]
    thin, widths, kept = without_unread(model, ["one", "two"], {}, EXAMPLE)
    assert widths == {"first": [5, 6], "second": [5, 6]} and not kept
    assert torch.equal(mask_of(thin.second).mask, left[:5])  # type: ignore[union-attr,arg-type]
    assert torch.equal(mask_of(thin.head).mask, mask_of(model.head).mask)  # type: ignore[union-attr,arg-type]
    torch.testing.assert_close(thin(EXAMPLE), expected)


def test_where_nothing_can_be_followed_the_rest_is_done(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(shift([[(0, 1), (1, 0)]] * 6), 6)

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled():  # as while the graph is built
                raise ValueError("no gradients; please")
            y: Tensor = self.net(x)
            return y

    model = Odd().eval()
    with torch.no_grad():
        model.net[3].pointwise.weight[:, :3] = 0  # type: ignore[index]
        told: Any = prune(model, tmp_path, harm=0).notes["channels"]
    assert told["left"] == {} and list(told["kept"]) == ["the model itself"]
    said = told["kept"]["the model itself"]
    assert "cannot be followed through its forward pass (ValueError: no gradients; please)" in said
    assert said.endswith("nothing has to be done about it, and `channels: false` does not look for them")
    assert "`Prune`" not in said


class Beside(nn.Module):
    """A shift layer on two convolutions side by side; what the second one gives is in the answers, too."""

    def __init__(self) -> None:
        super().__init__()
        self.free, self.bound = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.shift = shift([[(0, 1), (1, 0)]] * 8, outputs=4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.free(x), self.bound(x)
        y: Tensor = self.shift(torch.cat((a, b), 1)) + b
        return y


def test_of_a_concatenation_each_group_tells_its_own() -> None:
    torch.manual_seed(0)
    model = Beside().eval()
    with torch.no_grad():
        model.shift.pointwise.weight[:, :2] = 0
    expected = model(EXAMPLE)
    thin, widths, kept = without_unread(model, ["shift"], {}, EXAMPLE)
    assert widths == {"free": [3, 4]} and kept == {}
    torch.testing.assert_close(thin(EXAMPLE), expected)
    with torch.no_grad():
        model.shift.pointwise.weight[:, [8, 9, 14, 15]] = 0
    _, widths, kept = without_unread(model, ["shift"], {}, EXAMPLE)
    said = "2 of 8 input channels that it does not read stay: its channels are the network's answers"
    assert widths == {"free": [3, 4]} and kept == {"shift": said}
    _, widths, kept = without_unread(model, ["shift"], {"free": "excluded by 'free'"}, EXAMPLE)
    other = "1 of 8 input channels that it does not read stay: free is left out (excluded by 'free')"
    assert widths == {} and kept == {"shift": f"{other}; {said}"}


def test_a_group_that_nothing_reads_at_all_is_told() -> None:
    torch.manual_seed(0)
    model = Beside().eval()
    with torch.no_grad():
        model.shift.pointwise.weight[:, :8] = 0
    thin, widths, kept = without_unread(model, ["shift"], {}, EXAMPLE)
    assert thin is model and widths == {}
    assert kept == {"free": "4 of 4 channels that nothing reads stay: a layer keeps one at least"}
    assert without_unread(model, ["another"], {}, EXAMPLE)[1:] == ({}, {})


def test_answers_are_compared_without_tf32() -> None:
    allowed = []

    class Looking(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            allowed.append(torch.backends.cudnn.allow_tf32)
            return super().forward(x)

    model = Looking(8, 3, 1)
    before = torch.backends.cudnn.allow_tf32
    assert before
    assert why_not_without(model, [], {}, EXAMPLE) == ""
    remove_unread(model, [], {}, EXAMPLE)
    assert allowed == [False] * 4 and torch.backends.cudnn.allow_tf32 == before


def test_channels_that_are_read_in_secret_stay() -> None:
    """By a hook, which the plain convolution that stands in for the layer in the dependency graph does not have."""
    torch.manual_seed(0)
    model: Any = network(ShiftConv2d(6, 6, 3, 2, padding=1), 6)
    with torch.no_grad():
        model[3].pointwise.weight[:, :2] = 0
    model[3].register_forward_hook(lambda _, inputs, output: output + inputs[0].mean((1, 2, 3), keepdim=True))
    thin, widths, kept = without_unread(model, ["3"], {}, EXAMPLE)
    assert thin is model and widths == {}
    assert kept["0"].startswith("1 of 6 channels that nothing reads stay: cutting the channels out changed the answers")
    assert kept["0"].endswith("in a way that the dependency graph does not see")


@pytest.mark.parametrize("masked", [False, True])
def test_a_depthwise_shift_loses_the_channels_that_pass_it(masked: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
    layers = (nn.Conv2d(8, 12, 1), depthwise, nn.ReLU(), nn.Conv2d(12, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3)).eval()
    task = noise_task()
    model = Shift(taps=3, include=["1"], images=16)(model, task, Work(tmp_path)).model
    if masked:
        model = Prune(amount=0.3, scope="layer", include=["1"])(model, task, Work(tmp_path)).model
    before = profile(model, task.example).params
    edit = PruneChannels(params=0.7, images=16, exclude=["3"])(model, task, Work(tmp_path))
    after, layer = profile(edit.model, task.example).params, edit.model.get_submodule("1")
    assert isinstance(layer, ShiftConv2d) and layer.in_channels == layer.out_channels == layer.groups < 12
    assert after <= 0.7 * before and edit.notes["params"]["achieved"] == round(after / before, 4)  # type: ignore[index,call-overload]
    assert layer.kernel().shape == (layer.groups, 1, 3, 3) and (mask_of(layer.pointwise) is not None) == masked
    again = ShiftConv2d(**layer.config())
    again.load_state_dict(copy.deepcopy(layer).state_dict(), strict=not masked)
