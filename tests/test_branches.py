"""Residual branches taken out as a whole: which ones can go, and what the rest of the package makes of what is left."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from awkward import noise_task
from thin_nets import Around, net
from torch import Tensor, nn

import compress
from compress import checkpoint
from compress.channels.branches import removable_branches
from compress.channels.costs import Costs
from compress.channels.groups import MAKERS, removable
from compress.channels.on_demand import OnDemand
from compress.channels.thinning import Thinning
from compress.lower import export_onnx, export_pt2
from compress.measure import counted, profile
from compress.models import resnet20
from compress.nn.masked import mask_of
from compress.nn.zero import Zero
from compress.reconstruct import plain_images
from compress.stage import Edit
from compress.stages import FineTune, FoldBatchNorm, Prune, PruneChannels, Quantize, Shift
from compress.surgery import layers
from compress.task import Work

SHAPE = (2, 8, 8)
RESNET = ("compress.models.resnet20", {"classes": 3, "channels": 2})


def can_go(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> set[str]:
    found = layers(model, MAKERS)
    example = torch.randn(2, *shape)
    free, _ = removable(model, found, dict.fromkeys(found, ""), example)
    return set(removable_branches(model, free, {}, example))


def network(seed: int = 0, shortcut: str = "pad") -> nn.Module:
    """ResNet-20 with statistics that are not those of a fresh one; the second block of its middle matters least."""
    torch.manual_seed(seed)
    model: Any = resnet20(3, 2, shortcut)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        model.layer2[1].bn2.weight *= 0.01
        model.layer2[1].bn2.bias *= 0.01
    return model.eval()  # type: ignore[no-any-return]


def thin(model: nn.Module, folder: Path, **settings: Any) -> Edit:
    chosen = {"macs": 0.9, "floor": 0, "multiple": 64, "images": 32, **settings}
    return PruneChannels(**chosen)(model, noise_task(SHAPE), Work(folder))


def answers(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x) for x, _ in noise_task(SHAPE).calibration])


def test_which_branches_can_go() -> None:
    blocks = {f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in range(3)}
    assert can_go(resnet20(3, 2)) == blocks == can_go(resnet20(3, 2, "conv"))
    assert can_go(net("residual")) == {f"layer{i}.0.conv1" for i in (1, 2, 3)}
    assert can_go(net("concatenated")) == can_go(net("gated")) == can_go(net("grouped")) == can_go(net("flat")) == set()
    # Of the inverted residuals those with a shortcut, and what they are made of is an expansion and a depthwise layer.
    assert len(can_go(net("mobile"))) == 2


def twice(net: Any, x: Tensor) -> Tensor:
    x = net.norm(net.conv2(net.conv1(x).relu())) + x
    return x + net.norm(net.other(x))  # type: ignore[no-any-return]


STAY = {
    "changes the shortcut in place": (lambda net, x: net.conv2(F.relu(net.conv1(x), inplace=True)) + x, {}),
    "read elsewhere": (lambda net, x: (y := net.conv2(net.conv1(x).relu())) + x + y.mean(), {}),
    "gives the sum its shape": (lambda net, x: net.conv2(net.conv1(x).relu()) + x.mean((1, 2, 3), keepdim=True), {}),
    "no addition": (lambda net, x: net.conv2(net.conv1(x).relu()) * x, {}),
    "a norm that stands elsewhere too": (twice, {"norm": nn.BatchNorm2d(4), "other": nn.Conv2d(4, 4, 1)}),
}


@pytest.mark.parametrize("why", STAY)
def test_branches_that_stay(why: str, tmp_path: Path) -> None:
    around, more = STAY[why]
    torch.manual_seed(0)
    model = Around(around, **copy.deepcopy(more)).eval()  # type: ignore[arg-type]  # a table of two kinds of values
    shape = (2, 4, 4)
    assert can_go(model, shape) == set()
    edit = PruneChannels(macs=0.8, floor=0, images=16)(model, noise_task(shape), Work(tmp_path))
    assert not any(isinstance(module, Zero) for module in edit.model.modules())


class Block(nn.Module):
    """Of two or three layers, in torchvision's way: one ReLU for all, in place, and so is the addition."""

    def __init__(self, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 16, 3, stride, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 1) if bottleneck else None
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(8, 8, 1, stride) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.conv3 is not None:
            out = self.conv3(self.relu(out))
        out += identity
        return self.relu(out)  # type: ignore[no-any-return]


def of_blocks(*blocks: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), *blocks, nn.Flatten(), nn.LazyLinear(3)).eval()
    model(torch.randn(2, 2, 7, 9))
    return model


@pytest.mark.parametrize("bottleneck", [False, True])
def test_blocks_that_work_in_place(bottleneck: bool, tmp_path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model, task = of_blocks(Block(1, bottleneck), Block(2, bottleneck)), noise_task((2, 7, 9))
    # The zeros that the second one would have to add to are not of its input's size.
    assert can_go(model, (2, 7, 9)) == {f"2.conv{2 if bottleneck else 1}"}
    before = profile(model, task.example).macs
    stage = PruneChannels(macs=0.75, floor=0, multiple=16, images=16, include=["2.conv*"])
    edit = stage(model, task, Work(tmp_path))
    (end,) = [module for module in edit.model.modules() if isinstance(module, Zero)]
    achieved = round(profile(edit.model, task.example).macs / before, 4)
    assert end.like_input and edit.notes["macs"] == {"requested": 0.75, "achieved": achieved}
    assert not any(left for left, _ in dict(edit.notes["channels"]).values())  # type: ignore[call-overload]
    trained = FineTune(epochs=1, lr=1e-3)(edit.model, task, Work(tmp_path)).model
    for name, write in (("model.onnx", partial(export_onnx, input={})), ("model.pt2", export_pt2)):
        result: Any = write(trained, task.example, tmp_path / name)
        assert result["parity"][0]["top1_agreement"] == 1
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert kinds["Add"] == 1 and not kinds["ConstantOfShape"] and not kinds["Expand"]


@pytest.mark.parametrize("amount", ["macs", "params"])
def test_the_stream_gets_narrower_around_what_went(amount: str, tmp_path: Path) -> None:
    model, task = of_blocks(Block(1, True), Block(1, True), Block(1, False)), noise_task((2, 7, 9))
    for share in (0.06, 0.6):
        edit = PruneChannels(**{amount: share}, floor=0, images=16)(model, task, Work(tmp_path))  # type: ignore[arg-type]
        model, achieved = edit.model, edit.notes[amount]["achieved"]  # type: ignore[index,call-overload]
        assert achieved <= share and sum(isinstance(module, Zero) for module in model.modules()) >= 2
    assert model[0].out_channels < 8  # type: ignore[index]


def test_costs_are_what_is_counted_without_branches() -> None:
    for model, shape in ((of_blocks(Block(1, True), Block(1, True)), (2, 7, 9)), (network(), SHAPE)):
        example, found = torch.randn(2, *shape), layers(model, MAKERS)
        free, _ = removable(model, found, dict.fromkeys(found, ""), example)
        branches = removable_branches(model, free, {}, example)
        gone = next(iter(branches))
        totals = {name: Costs(model, free, example, name, branches).total({gone: 0}) for name in ("macs", "params")}
        branches[gone].take_out(model)
        assert totals == {name: counted(model, example)[name] for name in ("macs", "params")}


def test_of_two_branches_that_are_added_one_can_go() -> None:
    def both(net: Any, x: Tensor) -> Tensor:
        return net.conv2(net.conv1(x).relu()) + net.conv4(net.conv3(x).relu())  # type: ignore[no-any-return]

    more = {"conv3": nn.Conv2d(4, 8, 3, padding=1), "conv4": nn.Conv2d(8, 4, 3, padding=1)}
    assert can_go(Around(both, **more).eval()) == {"conv1"}
    assert can_go(Around(lambda net, x: net.conv2(net.act(net.conv1(x))) + x, act=nn.ReLU(inplace=True)).eval()) == {
        "conv1"
    }


def test_what_is_excluded_keeps_its_branch(tmp_path: Path) -> None:
    for settings in ({"exclude": ["layer2.1.conv2"]}, {"include": ["layer*.conv1"]}):
        edit = thin(network(), tmp_path, multiple=1, **settings)
        assert dict(edit.notes["channels"])["layer2.1.conv1"][0] > 0  # type: ignore[call-overload]


def test_harm_is_measured_with_the_mean_of_the_branch(tmp_path: Path) -> None:
    model: Any = network()
    task = noise_task(SHAPE)
    found = layers(model, MAKERS)
    free, _ = removable(model, found, dict.fromkeys(found, ""), task.example)
    images = plain_images(task.calibration, 32, task.device)
    plan = Thinning(model, free, images, {}, 1e-4)
    group = next(group for group in plan.groups if group.name == "layer3.1.conv1")
    equations = plan.equations(lambda _: None)
    order = plan.order(group, equations)
    assert sorted(order.tolist()) == list(range(64))
    with torch.no_grad():
        wanted = [model(x) for x in images]
        harm = plan.harms(group, order, [0], equations, OnDemand(model, images), wanted)[0]
        seen: list[Tensor] = []
        norm = model.layer3[1].bn2
        norm.register_forward_hook(lambda _, inputs, y: seen.append(y))
        for x in images:
            model(x)
        mean = torch.cat(seen).mean((0, 2, 3), keepdim=True)
        norm.register_forward_hook(lambda _, inputs, y: mean.expand_as(y))
        off = sum(float((model(x) - y).square().sum()) for x, y in zip(images, wanted, strict=True))
    assert harm == pytest.approx(off / sum(float(y.square().sum()) for y in wanted), rel=1e-2)


@pytest.mark.parametrize("shortcut", ["pad", "conv"])
@pytest.mark.parametrize("by", ["reconstruction", "l1"])
def test_the_branch_that_matters_least_goes(by: str, shortcut: str, tmp_path: Path) -> None:
    model = network(shortcut=shortcut)
    wanted, before = answers(model), counted(model, torch.randn(2, *SHAPE))
    edit = thin(model, tmp_path, by=by, include=["layer*"], macs=0.95)
    block: Any = edit.model.layer2[1]  # type: ignore[index,union-attr]
    assert type(block.bn2) is Zero and all(type(m) is nn.Identity for m in (block.conv1, block.bn1, block.conv2))
    sites = {site.name: site for site in edit.sites}
    assert sites["layer2.1.conv1"].after == "Identity()" and sites["layer2.1.conv2"].after == "Identity()"
    assert edit.notes["channels"]["layer2.1.conv1"] == [0, 32]  # type: ignore[index,call-overload]
    assert float((answers(edit.model) - wanted).square().mean()) < 0.01 * float(wanted.square().mean())
    after = counted(edit.model, torch.randn(2, *SHAPE))
    gone = [name for name, (left, _) in dict(edit.notes["channels"]).items() if not left]  # type: ignore[call-overload]
    assert before["macs"] - after["macs"] == sum(2 * 9 * 32 * 32 * 16 for _ in gone) and gone == ["layer2.1.conv1"]
    assert before["params"] - after["params"] == 2 * 9 * 32 * 32 + 4 * 32


def test_without_a_floor_of_zero_every_branch_keeps_a_channel(tmp_path: Path) -> None:
    edit = thin(network(), tmp_path, floor=0.01, multiple=1, macs=0.05)
    assert min(left for left, _ in dict(edit.notes["channels"]).values()) == 1  # type: ignore[call-overload]
    assert not any(isinstance(module, Zero) for module in edit.model.modules())


def test_all_branches_can_go(tmp_path: Path) -> None:
    edit = thin(network(), tmp_path, macs=0.02, refit=False)
    assert sum(isinstance(module, Zero) for module in edit.model.modules()) == 9
    assert set(layers(edit.model, (nn.Conv2d,))) == {"conv1"} and answers(edit.model).isfinite().all()


def test_what_is_left_is_saved_trained_exported_and_compressed_further(tmp_path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    task = noise_task(SHAPE)
    model = Prune(amount=0.3, images=16, exclude=["layer3*"])(network(), task, Work(tmp_path)).model
    model = thin(model, tmp_path, macs=0.6, multiple=32).model
    assert sum(isinstance(module, Zero) for module in model.modules()) >= 2
    masked = {name for name, layer in layers(model, (nn.Conv2d,)).items() if mask_of(layer) is not None}
    assert masked == {name for name in layers(model, (nn.Conv2d,)) if not name.startswith("layer3")}
    model = FineTune(epochs=1, lr=1e-3)(model, task, Work(tmp_path)).model
    model = Shift(taps=2, images=16, include=["layer3*"])(model, task, Work(tmp_path)).model
    model = PruneChannels(macs=0.8, images=16, allocation="uniform")(model, task, Work(tmp_path)).model
    for quantized in (False, True):
        if quantized:
            model = FoldBatchNorm()(model, task, Work(tmp_path)).model
            model = Quantize(calibration_images=16)(model, task, Work(tmp_path)).model
        path = tmp_path / "model.safetensors"
        checkpoint.save(model, path, build=RESNET, input=task.input, provenance={}, results={})
        assert torch.equal(answers(compress.load(path)), answers(model))
        result = export_onnx(model, task.example, tmp_path / "model.onnx", input={}, target="onnxruntime")
        assert all(row["top1_agreement"] == 1 for row in result["parity"]) and not result["float_layers"]
        kinds = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
        assert kinds["Add"] == 9 - sum(isinstance(module, Zero) for module in model.modules())
        assert kinds["Relu"] <= kinds["Conv"] and not kinds["ConstantOfShape"]
        result = export_pt2(model, task.example, tmp_path / "model.pt2")
        assert all(row["top1_agreement"] == 1 for row in result["parity"])
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {"input": task.example.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), model(task.example).detach(), rtol=1e-4, atol=1e-4)


def test_times_are_those_of_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[nn.Module] = []

    def stand_in(networks: dict[str, nn.Module], *_: object) -> dict[str, Any]:
        timed.append(networks["after"])
        return {"before": SimpleNamespace(p50_ms=1.0), "after": SimpleNamespace(p50_ms=0.5)}

    monkeypatch.setattr("compress.time_budget.timed", stand_in)
    edit = thin(network(), tmp_path, macs=0, latency=0.6, multiple=64)
    zeros = [sum(isinstance(module, Zero) for module in each.modules()) for each in (*timed, edit.model)]
    assert len(timed) == 1 and zeros[0] == zeros[1] > 0


def test_masks_of_shift_layers_in_a_branch_go_with_it(tmp_path: Path) -> None:
    task = noise_task(SHAPE)
    model = Shift(taps=2, images=16, include=["layer2*"])(network(), task, Work(tmp_path)).model
    model = Prune(amount=0.3, images=16)(model, task, Work(tmp_path)).model
    model = thin(model, tmp_path, macs=0.92, include=["layer2*"]).model
    assert any(isinstance(module, Zero) for name, module in model.named_modules() if name.startswith("layer2"))
    assert answers(model).isfinite().all()
