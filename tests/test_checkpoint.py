from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saved import HOME, INPUT, RESNET, SMALL, STEPPED, Stepped, save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compress import checkpoint, models
from compress.errors import CheckpointError, UserError
from compress.nn.places import place_quantizers, quantizer_places, trace
from compress.nn.quantized import FakeQuantize, FakeQuantizeWeight
from compress.nn.shift import ShiftConv2d
from compress.surgery import kind, replace


def batch(channels: int = 1, size: int = 8) -> Tensor:
    return torch.randn(5, channels, size, size, generator=torch.Generator().manual_seed(3))


def fold_away(model: nn.Module) -> nn.Module:
    """Convolutions with a bias in place of convolution and batch norm; the function changes, the structure is real."""
    for module in list(model.modules()):
        if kind(module) is nn.Conv2d:
            new = copy.deepcopy(module)
            new.bias = nn.Parameter(torch.randn(module.out_channels) / 10)
            replace(model, module, new)
        elif kind(module) is nn.BatchNorm2d:
            replace(model, module, nn.Identity())
    return model


def shifted(model: nn.Module, learn: bool = True) -> nn.Module:
    for module in list(model.modules()):
        if kind(module) is nn.Conv2d and module.kernel_size == (3, 3) and module.in_channels > 3:
            new = ShiftConv2d(
                *(module.in_channels, module.out_channels, 3, 3, module.stride, module.padding),
                bias=module.bias is not None,
                learn=learn,
            )
            with torch.no_grad():
                new.displacement.add_(0.3 * torch.randn(new.displacement.shape))
            replace(model, module, new)
    return model


def quantized(model: nn.Module, bits: int = 8) -> nn.Module:
    model = fold_away(model).eval()
    for module in list(model.modules()):
        if isinstance(module, ShiftConv2d):
            module.settle()
    for module in list(model.modules()):
        if kind(module) in (nn.Conv2d, nn.Linear):
            grid = FakeQuantizeWeight(bits, module.weight.shape[0])
            grid.follow(module.weight)
            parametrize.register_parametrization(module, "weight", grid)
    places = {}
    model.eval()
    for number, node in enumerate(trace(model).nodes):
        place = node.meta.get("place", "")
        if any(f":{operator}:" in place for operator in ("relu", "add", "input")):
            places[place] = FakeQuantize()
            places[place].set_range(0.03 + 0.001 * number, number)
    return place_quantizers(model, places).eval()


def plain(model: nn.Module) -> nn.Module:
    return model.eval()


def masked_width(model: nn.Module) -> nn.Module:
    model.layer1[0].conv1 = nn.Conv2d(24, 7, 3, padding=1, bias=False)
    model.layer1[0].bn1 = nn.BatchNorm2d(7, eps=1e-3)
    model.layer1[0].conv2 = nn.Conv2d(7, 24, 3, padding=1, bias=False)
    return model.eval()


def sequence(model: nn.Module) -> nn.Module:
    model.layer3[0].conv2 = nn.Sequential(
        nn.Conv2d(96, 96, (3, 1), padding=(1, 0), groups=96, bias=False),
        nn.Sequential(nn.Conv2d(96, 96, 1), nn.Dropout(0.2), nn.LeakyReLU(0.3)),
    )
    return model.eval()


def used_twice(model: nn.Module) -> nn.Module:
    shared = nn.Conv2d(24, 24, 3, padding=1, bias=True)
    model.layer1[0].conv1 = model.layer1[0].conv2 = shared
    return model.eval()


def half(model: nn.Module) -> nn.Module:
    return model.to(torch.bfloat16).eval()


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": plain,
    "folded": fold_away,
    "widths": masked_width,
    "sequence": sequence,
    "used twice": used_twice,
    "bfloat16": half,
    "shifted": shifted,
    "quantized": quantized,
    "four bits": lambda model: quantized(model, 4),
    "shifted and quantized": lambda model: quantized(shifted(model)),
}


def make_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[name](models.small()).eval()


@pytest.mark.parametrize("form", ["packed", "training"])
@pytest.mark.parametrize("name", KINDS)
def test_the_same_logits_and_structure_come_back(name: str, form: str, tmp_path: Path) -> None:
    model = make_model(name)
    size = save(model, tmp_path / "model.safetensors", form=form)
    again = checkpoint.load(tmp_path / "model.safetensors")
    assert size == (tmp_path / "model.safetensors").stat().st_size
    assert not again.training and again.input == INPUT
    assert not any(p.is_meta for p in (*again.parameters(), *again.buffers()))
    assert list(again.state_dict()) == list(model.state_dict())
    assert quantizer_places(again) == quantizer_places(model)
    x = batch().to(next(model.parameters()).dtype)
    settled = copy.deepcopy(model)
    for module in settled.modules():
        if form == "packed" and isinstance(module, ShiftConv2d):
            module.settle()
    with torch.no_grad():
        assert torch.equal(settled(x), again(x))
    if form == "training":
        for (key, before), after in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(before, after), key
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("name", ["shifted and quantized", "used twice"])
def test_training_goes_on_exactly(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    save(model, tmp_path / "model.safetensors", form="training")
    losses = []
    for net in (model, checkpoint.load(tmp_path / "model.safetensors")):
        net.train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(batch() + step), torch.arange(5))
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1]


def test_saving_does_not_touch_the_model_and_repeats_its_bytes(tmp_path: Path) -> None:
    model = make_model("shifted and quantized").train()
    before = copy.deepcopy(model.state_dict())
    grads = [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    save(model, tmp_path / "a.safetensors")
    save(model, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert model.training and grads == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    checkpoint.load(tmp_path / "a.safetensors")
    assert torch.equal(random, torch.get_rng_state())
    assert str(tmp_path).encode() not in (tmp_path / "a.safetensors").read_bytes()


def test_a_reloaded_model_saves_to_the_same_bytes(tmp_path: Path) -> None:
    save(make_model("shifted and quantized"), tmp_path / "a.safetensors")
    save(checkpoint.load(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_integers_stay_integers(tmp_path: Path) -> None:
    model = make_model("quantized")
    save(model, tmp_path / "model.safetensors")
    again = checkpoint.load(tmp_path / "model.safetensors")
    found = 0
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            mine, other = module.parametrizations.weight, again.get_submodule(name).parametrizations.weight
            integers = mine[0].integers(mine.original)
            assert torch.equal(other[0].integers(other.original), integers)
            assert torch.equal(other.original, integers * mine[0].scale.view(-1, *[1] * (integers.dim() - 1)))
            found += 1
    assert found == 10


def test_the_size_of_int8_resnet20(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = quantized(models.resnet20())
    given = INPUT | {"mean": [0.5] * 3, "std": [0.2] * 3, "size": [32, 32]}
    save(model, tmp_path / "model.safetensors", build=RESNET, input=given)
    weights = [m.weight.numel() for m in model.modules() if kind(m) in (nn.Conv2d, nn.Linear)]
    scales_and_biases = 4 * 2 * sum(m.weight.shape[0] for m in model.modules() if kind(m) in (nn.Conv2d, nn.Linear))
    data = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") <= 9000
    assert len(data) <= sum(weights) + scales_and_biases + 9000
    training = save(model, tmp_path / "training.safetensors", build=RESNET, input=given, form="training")
    assert training > 4 * sum(weights)


def test_masks_and_zeros_cost_bits(tmp_path: Path) -> None:
    model = make_model("plain")
    dense = save(model, tmp_path / "dense.safetensors")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 4:
                p.mul_(torch.rand(p.shape) < 0.1)
    assert save(model, tmp_path / "sparse.safetensors") < 0.2 * dense
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert save(model, tmp_path / "zero.safetensors") < 20_000
    checkpoint.load(tmp_path / "zero.safetensors")


def test_read_gives_the_blueprint(tmp_path: Path) -> None:
    recipe = {"stages": {"b": {"taps": 4}, "a": {"epochs": 10}}, "title": 'ünï"\\'}
    save(make_model("shifted"), tmp_path / "model.safetensors", provenance={"recipe": recipe})
    said = checkpoint.read(tmp_path / "model.safetensors")
    assert said["build"] == list(SMALL) and said["form"] == "packed" and said["format"] == 1
    assert said["provenance"] == {"recipe": recipe} and list(said["provenance"]["recipe"]["stages"]) == ["b", "a"]
    assert said["results"] == {"accuracy": 97.5} and said["input"] == INPUT
    shift = next(row for row in said["modules"] if row[0] == "ShiftConv2d")
    assert shift[1]["taps"] == 3 and "layer1.0.conv1" in shift[2] and "padding_mode" not in shift[1]


def test_a_foreign_base_needs_to_be_allowed(tmp_path: Path) -> None:
    model = Stepped()
    save(model, tmp_path / "model.safetensors", build=STEPPED)
    assert checkpoint.foreign(SMALL) is None
    assert f"allow=['{HOME}']" in str(checkpoint.foreign(STEPPED))
    with pytest.raises(CheckpointError, match=rf"allow=\['{HOME}'\]"):
        checkpoint.load(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="neither in"):
        checkpoint.load(tmp_path / "model.safetensors", allow=[HOME[:-1]])
    with pytest.raises(UserError, match="must be a list"):
        checkpoint.load(tmp_path / "model.safetensors", allow=HOME)
    again = checkpoint.load(tmp_path / "model.safetensors", allow=[HOME])
    assert again.a is again.b and again.first.weight is again.second.weight
    assert torch.equal(again(batch()), model(batch()))


def test_a_shared_module_is_replaced_in_both_places(tmp_path: Path) -> None:
    model = Stepped()
    replace(model, model.a, nn.Conv2d(1, 4, 3, padding=1))
    assert model.a is model.b
    save(model, tmp_path / "model.safetensors", build=STEPPED)
    again = checkpoint.load(tmp_path / "model.safetensors", allow=[HOME])
    assert again.a is again.b and again.a.kernel_size == (3, 3)
    assert torch.equal(again(batch()), model(batch()))


def test_a_layer_of_torch_can_be_the_base(tmp_path: Path) -> None:
    build = ("torch.nn.Conv2d", {"in_channels": 1, "out_channels": 4, "kernel_size": 3, "padding": 1})
    model = nn.Conv2d(1, 4, 3, padding=1)
    save(model, tmp_path / "a.safetensors", build=build)
    assert torch.equal(checkpoint.load(tmp_path / "a.safetensors")(batch()), model(batch()))
    root = ShiftConv2d(1, 4, 3, 9, padding=1, quantize=False)
    save(root, tmp_path / "b.safetensors", build=build)
    again = checkpoint.load(tmp_path / "b.safetensors")
    assert type(again) is ShiftConv2d and torch.equal(again(batch()), root(batch()))


def test_a_fresh_process_loads_it_lightly_and_bit_equal(tmp_path: Path) -> None:
    model = make_model("shifted and quantized")
    save(model, tmp_path / "model.safetensors")
    torch.save({"x": batch(), "y": model(batch()).detach()}, tmp_path / "truth.pt")
    code = """
        import sys, torch
        from compress import checkpoint
        torch.set_num_threads(int(sys.argv[1]))
        model = checkpoint.load("model.safetensors")
        truth = torch.load("truth.pt", weights_only=True)
        assert torch.equal(model(truth["x"]), truth["y"])
        heavy = {"hydra", "omegaconf", "torchao", "tensorly", "torch_pruning", "onnx", "onnxruntime", "rich", "sklearn"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    environment = os.environ | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    command = [sys.executable, "-c", textwrap.dedent(code), str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
