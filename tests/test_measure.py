"""Counting, timing, estimating, and the statistics of accuracies."""

from __future__ import annotations

from math import comb
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from compress.errors import UserError
from compress.measure import HOROWITZ_45NM, accuracy, available_threads, energy, latency, paired, profile, wilson
from compress.nn.quantized import FakeQuantize

EXAMPLE = torch.randn(2, 8, 13, 12, generator=torch.Generator().manual_seed(0))


class Halve(nn.Module):
    """A parametrization that zeroes the first half of a weight, with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        mask = torch.ones_like(weight)
        mask[: len(weight) // 2] = 0
        return weight * mask * self.scale


class Displaced(nn.Module):
    """Looks like a layer of `compress.nn`: says its own work, holds a convolution that is never called as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(16, 4, 1, bias=False)
        self.displacement = nn.Parameter(torch.tensor([[0.2, -0.4], [1.0, 0.0]]).repeat(8, 1, 1))
        self.integer = True

    def config(self) -> dict[str, int]:
        return {}

    def lower(self, target: str) -> nn.Module:
        raise NotImplementedError

    def macs(self, shape: tuple[int, ...]) -> int:
        return 1000 * shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x.repeat_interleave(2, 1), self.inner.weight)


AWKWARD = {
    "stride 2": nn.Conv2d(8, 6, 3, stride=2),
    "stride (2,1)": nn.Conv2d(8, 6, 3, stride=(2, 1), padding=1),
    "padding (1,0)": nn.Conv2d(8, 6, 3, padding=(1, 0)),
    "dilation 2": nn.Conv2d(8, 6, 3, dilation=2),
    "groups 2": nn.Conv2d(8, 6, (3, 5), groups=2, padding="same"),
    "depthwise": nn.Conv2d(8, 8, 3, groups=8),
    "1x1, stride 2, no bias": nn.Conv2d(8, 6, 1, stride=2, bias=False),
    "reflect": nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
    "transposed": nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
    "linear on the last axis": nn.Linear(12, 5),
    "a module used twice": nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1)] * 2),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_macs_are_those_of_the_operators_torch_runs(name: str) -> None:
    model = AWKWARD[name].eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(EXAMPLE[:1])
    assert 2 * profile(model, EXAMPLE).macs == counter.get_total_flops()
    assert profile(model, EXAMPLE).params == sum(p.numel() for p in model.parameters())


def test_resnet20_as_counted_by_hand() -> None:
    from compress.models import resnet20

    found = profile(resnet20(), torch.zeros(2, 3, 32, 32))
    stages = (
        32 * 32 * 9 * (3 * 16 + 6 * 16 * 16),
        16 * 16 * 9 * (16 * 32 + 5 * 32**2),
        8 * 8 * 9 * (32 * 64 + 5 * 64**2),
    )
    assert (found.params, found.macs) == (269_722, sum(stages) + 640)
    assert (found.uncounted, found.bytes_fp32, found.shift_elements) == ((), 4 * 269_722, 0)
    assert found.activation_bytes == 4 * (7 * 16 * 1024 + 6 * 32 * 256 + 6 * 64 * 64 + 10)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 4, 1))
    model[1].eval()
    parametrize.register_parametrization(model[0], "weight", Halve())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    profile(model, EXAMPLE)
    assert [m.training for m in model] == [True, False, True, True]
    assert model[0].parametrizations.weight[0].training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_a_masked_weight_counts_once_by_what_forward_sees() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False))
    parametrize.register_parametrization(model[0], "weight", Halve())
    found = profile(model, EXAMPLE)
    assert (found.params, found.nonzero) == (8 * 8 * 9, 4 * 8 * 9)
    assert found.macs == 8 * 8 * 9 * 11 * 10
    assert found.uncounted == ()
    assert profile(nn.Sequential(FakeQuantize(8, learn=True), *model), EXAMPLE) == found


def test_a_shared_module_counts_weights_once_and_work_twice() -> None:
    layer = nn.Conv2d(8, 8, 1)
    once, twice = (profile(nn.Sequential(*[layer] * n), EXAMPLE) for n in (1, 2))
    assert once.params == twice.params
    assert twice.macs == 2 * once.macs
    tied = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))
    tied[1].weight = tied[0].weight
    assert profile(tied, EXAMPLE).params == 64 + 8 + 8


def test_a_traced_model_gives_the_same_figures() -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    assert profile(symbolic_trace(model), EXAMPLE) == profile(model, EXAMPLE)


def test_what_could_not_be_counted_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(8, 1, 1))
            self.unused = nn.Conv2d(8, 8, 1)
            self.norm = nn.GroupNorm(2, 8)
            self.bn = nn.BatchNorm2d(8)
            self.own = type("MyConv", (nn.Conv2d,), {"forward": lambda self, x: nn.Conv2d.forward(self, x)})(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.own(self.bn(self.norm(nn.functional.conv2d(x * self.gain, self.unused.weight))))

    found = profile(nn.Sequential(Odd()), EXAMPLE)
    assert found.uncounted == ("0", "0.unused", "0.norm", "0.own")
    assert found.macs == 0


def test_layers_of_ours_say_their_own_work() -> None:
    found = profile(nn.Sequential(Displaced()), EXAMPLE)
    assert found.macs == 8000
    assert found.uncounted == ()
    assert found.shift_elements == 8 * 13 * 12  # of two copies a channel, one rounds to "not displaced"


def test_a_single_image_without_its_batch_is_refused() -> None:
    with pytest.raises(UserError, match=r"`example` \(shape \(3,\)\) must be a batch: \(N, C, H, W\)"):
        profile(nn.Linear(3, 3), torch.zeros(3))


def test_energy_by_hand() -> None:
    model = nn.Sequential(Displaced(), nn.Conv2d(4, 2, 1, bias=False))
    counts = profile(model, EXAMPLE)
    full, small = energy(counts), energy(counts, 8, 8)
    macs, params, outputs = 8000 + 8 * 156, 64 + 8 * 2 * 2 + 8, (4 + 2) * 156
    assert full.arithmetic_uj == pytest.approx(macs * 4.6e-6)
    assert full.weights_uj == pytest.approx(params * 640e-6)
    assert full.activations_uj == pytest.approx(2 * outputs * 5e-6)
    assert full.shifts_uj == pytest.approx(2 * 8 * 156 * 5e-6)
    assert small.arithmetic_uj == pytest.approx(macs * 0.3e-6)
    assert small.total_uj - small.arithmetic_uj == pytest.approx((full.total_uj - full.arithmetic_uj) / 4)
    assert energy(counts, 4, 8).arithmetic_uj == small.arithmetic_uj
    assert energy(counts, 8, 32).arithmetic_uj == full.arithmetic_uj
    assert HOROWITZ_45NM.second_hand
    with pytest.raises(UserError, match=r"`weight_bits` \(=64\) must lie between 1 and 32"):
        energy(counts, 64)


def test_wilson_matches_published_figures() -> None:
    assert wilson(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0, 16.11), abs=0.01)
    assert wilson(10, 10)[1] == 100
    assert accuracy(9173, 10000)["top1"] == pytest.approx(91.73)
    with pytest.raises(UserError, match=r"`correct` \(=3\) must lie between 0 and `total` \(=2\)"):
        wilson(3, 2)


def test_paired_by_hand() -> None:
    base = torch.tensor([True] * 90 + [False] * 10)
    result = torch.tensor([True] * 82 + [False] * 8 + [True] * 2 + [False] * 8)
    found = paired(base, result)
    assert (found["lost"], found["gained"], found["difference"]) == (8, 2, pytest.approx(-6))
    assert found["p"] == pytest.approx(2 * sum(comb(10, k) for k in range(3)) / 2**10)
    assert found["low"] < -6 < found["high"] < 0.5
    same = paired(base, base)
    assert (same["difference"], same["p"]) == (0, 1)
    assert same["low"] < 0 < same["high"]


def test_the_paired_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = torch.Generator().manual_seed(1)
    base = torch.rand(1000, 400, generator=rng) < 0.9
    flips = torch.rand(1000, 400, generator=rng) < 0.05
    covered = 0
    for was, now in zip(base, base ^ flips, strict=True):  # truth: 5 % of 90 lost, 5 % of 10 gained: -4 points
        found = paired(was, now)
        covered += found["low"] <= -4 <= found["high"]
    assert 930 <= covered <= 975


def test_paired_refuses_what_cannot_be_compared() -> None:
    right = torch.ones(3, dtype=torch.bool)
    with pytest.raises(UserError, match=r"`result_correct` \(torch.float32\) must be bool"):
        paired(right, torch.ones(3))
    with pytest.raises(UserError, match="the same images in the same order"):
        paired(right, right[:2])


def onnx_chain(path: Path, width: int, convolutions: int) -> Path:
    """3x3 convolutions on 3 x 32 x 32, dynamic batch."""
    nodes, weights, before, channels = [], [], "image", 3
    for i in range(convolutions):
        values = np.random.default_rng(i).standard_normal((width, channels, 3, 3), dtype=np.float32)
        weights.append(numpy_helper.from_array(values / 10, f"w{i}"))
        nodes.append(helper.make_node("Conv", [before, f"w{i}"], [f"y{i}"], kernel_shape=[3, 3], pads=[1] * 4))
        before, channels = f"y{i}", width
    sides = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", c, 32, 32])
        for name, c in (("image", 3), (before, width))
    ]
    graph = helper.make_graph(nodes, "chain", sides[:1], sides[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("latency")
    return {"base": onnx_chain(folder / "base.onnx", 64, 6), "result": onnx_chain(folder / "result.onnx", 4, 1)}


IMAGE = torch.zeros(2, 3, 32, 32)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_latency_of_two_files(
    target: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip(target)
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch has no place in this process')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = latency(files, IMAGE, target=target, rounds=2, batch=3, threads=1, seconds=0.02)
    base, result = found["base"], found["result"]
    assert (base.ratio, base.ratio_low, base.ratio_high) == (1, 1, 1)
    assert result.ratio_low <= result.ratio <= result.ratio_high < 1  # it does 1/500 of the work
    assert 0 < result.p50_ms <= result.p95_ms
    assert (result.file, result.batch, result.threads, len(result.rounds_ms)) == ("result.onnx", 3, 1, 2)
    assert result.calls >= 10
    assert result.runtime.startswith(target)
    assert result.precision == {"onnxruntime": "as in the file", "openvino": "f32"}[target]


def test_latency_of_a_torch_program(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    program = torch.export.export(model, (IMAGE,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, tmp_path / "model.pt2")
    found = latency({"base": tmp_path / "model.pt2"}, IMAGE, target="torch", rounds=1, seconds=0.01)
    assert found["base"].runtime == f"torch {torch.__version__}"
    assert found["base"].threads == available_threads()


def test_latency_says_what_is_wrong_before_it_starts(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"`target` \(='tflite'\) must be one of: onnxruntime, openvino, torch"):
        latency(files, IMAGE, target="tflite")
    with pytest.raises(UserError, match=r"`rounds` \(=0\) must be at least 1"):
        latency(files, IMAGE, rounds=0)
    with pytest.raises(UserError, match=r"`paths\['base'\]` \(=.*base.onnx\) must be a .pt2 file for `target` 'torch'"):
        latency(files, IMAGE, target="torch")
    with pytest.raises(UserError, match=r"`paths\['gone'\]` .* must be a file; there is none"):
        latency({"gone": tmp_path / "gone.onnx"}, IMAGE)
    with pytest.raises(UserError, match="`paths` is empty"):
        latency({}, IMAGE)
    monkeypatch.setattr("compress.measure.timing.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package openvino, which is not installed: pip install 'compress-c"):
        latency(files, IMAGE, target="openvino")


def test_latency_reports_a_process_that_fails(files: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"(?s)'result' \(=.*broken.onnx\) in onnxruntime could not .* code 1.*broken"):
        latency({"base": files["base"], "result": broken}, IMAGE, rounds=1)
    with pytest.raises(UserError, match=r"could not be measured: no answer in 0.001 s"):
        latency(files, IMAGE, rounds=1, timeout_s=0.001)
