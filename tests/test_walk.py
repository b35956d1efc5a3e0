"""Executing a network operation by operation, as far as it is asked for: against running it as a whole."""

from __future__ import annotations

import copy

import pytest
import torch
from random_task import warm
from torch import Tensor, nn

from compress import walk
from compress.models import mobilenet_v2, resnet20, squeezenet1_1
from compress.reconstruct import Pairs, execution_order, seen_by
from compress.surgery import layers, replace
from compress.walk import Walk

NETS = {
    "resnet20": lambda: warm(resnet20(), (3, 16, 16)),
    "mobilenet_v2": lambda: warm(mobilenet_v2(classes=10), (3, 32, 32)),
    "squeezenet": lambda: squeezenet1_1(classes=10).eval(),
}


def images(name: str, shape: tuple[int, ...] = (3, 64, 64)) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, *shape), torch.randn(2, *shape)]


def close(got: Tensor, wanted: Tensor) -> None:
    """The same numbers, added up in another order: a walk lays maps out channels-last."""
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", NETS)
def test_every_layer_sees_and_gives_what_it_does_in_a_whole_pass(name: str) -> None:
    model = NETS[name]()
    batches = images(name)
    walked = Walk(model, batches)
    found = layers(model, (nn.Conv2d, nn.Linear))
    for layer_name in execution_order(model, found, batches[0]):
        layer = found[layer_name]
        inputs = walked.inputs(layer)
        again = walked.inputs(layer)
        outputs = walked.outputs(layer)
        assert inputs is not None and again is not None and outputs is not None
        for batch, x, same, y in zip(batches, inputs, again, outputs, strict=True):
            ((wanted_x, wanted_y),) = seen_by(model, layer, 1, batch)
            assert torch.equal(x, same)
            close(x, wanted_x)
            close(y, wanted_y)
    assert walked.inputs(found["conv1"] if "conv1" in found else next(iter(found.values()))) is None


def test_layers_are_replaced_on_the_way() -> None:
    model = NETS["resnet20"]()
    original, batches = copy.deepcopy(model), images("resnet20")
    pairs = Pairs(model, original, batches)
    found, old = layers(model, (nn.Conv2d,)), layers(original, (nn.Conv2d,))
    for name, layer in found.items():
        seen = list(pairs.of(layer, old[name], 1))
        for batch, (x, y) in zip(batches, seen, strict=True):
            close(x, seen_by(model, layer, 1, batch)[0][0])
            close(y, seen_by(original, old[name], 1, batch)[0][1])
        new = copy.deepcopy(layer)
        new.weight.data.mul_(1.1)
        replace(model, layer, new)
    assert pairs._walks is not None


def test_what_cannot_be_walked_is_run_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x) if x.sum() > 0 else -self.conv(x)
            return out

    batches = images("")
    with pytest.raises(ValueError, match=r"cannot be traced \(TraceError: [^`]*\)"):
        Walk(Branching(), batches)
    with pytest.raises(ValueError, match=r"cannot be traced \(TraceError: .*, in `0`\)"):
        Walk(nn.Sequential(Branching()), batches)
    model = Branching().eval()
    (first, _) = Pairs(model, model, batches).of(model.conv, model.conv, 1)
    assert torch.equal(first[0], batches[0])
    net = NETS["resnet20"]()
    backwards = Pairs(net, net, batches)
    for name in ("layer2.0.conv1", "layer1.0.conv1"):  # the second was passed already
        layer = net.get_submodule(name)
        for batch, (x, y) in zip(batches, backwards.of(layer, layer, 1), strict=True):
            wanted_x, wanted_y = seen_by(net, layer, 1, batch)[0]
            close(x, wanted_x)
            close(y, wanted_y)
    monkeypatch.setattr(walk, "MOST_BYTES", 10_000)
    with pytest.raises(ValueError, match="bytes of tensors at a time are too many"):
        Walk(net, batches)


def test_a_forward_that_takes_views_of_its_maps_gets_them_in_the_plain_layout() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.linear = nn.Linear(4 * 64, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            out: Tensor = self.linear(y.view(y.size(0), -1))
            return out

    model, batches = Viewing().eval(), images("", (3, 8, 8))
    outputs = Walk(model, batches).outputs(model.linear)
    assert outputs is not None and torch.equal(outputs[0], model(batches[0]))


def test_no_more_is_held_than_is_still_read() -> None:
    model = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(20))).eval()
    walked = Walk(model, images(""))
    for layer in model:
        walked.outputs(layer)
        assert len(walked.known[0]) <= 2
