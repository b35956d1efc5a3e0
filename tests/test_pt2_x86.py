"""The file for `torch.compile` on x86: the model's numbers, int8 kernels in the lowered graph, what stays float."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from awkward import AWKWARD
from random_task import quantize, task, warm
from torch import Tensor, fx, nn

import compress
from compress.errors import ConfigError
from compress.lower import export_pt2_x86
from compress.lower.pt2_x86 import pt2_x86_problems
from compress.models import small
from compress.nn.fire import Fire
from compress.nn.shift import ShiftConv2d
from compress.nn.squeeze_excite import SqueezeExcitation
from compress.stages import FineTune, Quantize

SHAPE = (3, 16, 16)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def lowered(path: Path, x: Tensor) -> fx.GraphModule:
    """The file after Inductor's fusions and before its code generation; the kernels in it run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's and the compiler's own
        from torchao.quantization.pt2e.lowering import lower_pt2e_quantized_to_x86

        return lower_pt2e_quantized_to_x86(torch.export.load(path).module(), (x,))


def kernels(graph: fx.GraphModule) -> Counter[str]:
    """How many layers became integer kernels, how many stayed."""
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    layers = [name for name in names if re.search(r"conv|linear|addmm|\.mm\.", name) and "prepack" not in name]
    return Counter("int8" if re.search("qconv|qlinear", name) else "float" for name in layers)


def exported(
    model: nn.Module, folder: Path, **settings: Any
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any], Tensor]:
    shape = settings.pop("shape", SHAPE)
    quantized = quantize(model, folder, shape, **settings).model
    x = torch.randn(4, *shape)
    report = export_pt2_x86(quantized, x, folder / "model.x86.pt2")
    assert max(row["max_abs"] for row in report["parity"]) < 1e-5
    assert [row["batch"] for row in report["parity"]] == [1, 2, 7]
    return torch.no_grad()(quantized), report, x


def headed(*layers: nn.Module) -> nn.Module:
    return warm(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)))


def shift() -> nn.Module:
    layer = ShiftConv2d(8, 16, 3, 1, padding=1)
    with torch.no_grad():
        layer.displacement[:4, 0] = -1
    return layer


def gated() -> nn.Module:
    layer = SqueezeExcitation(16, 4)
    nn.init.normal_(layer.fc2.weight)
    return layer


def stem() -> tuple[nn.Module, ...]:
    return nn.Conv2d(3, 8, 3), nn.ReLU()


def tiny() -> nn.Module:
    return headed(*stem(), nn.Conv2d(8, 16, 3), nn.ReLU())


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and the layers that compute on integers
    "fire, max pool": (lambda: headed(*stem(), nn.MaxPool2d(2), Fire(8, 16, 4, 8, 8, reorder=True), nn.ReLU()), 5),
    "shift, one tap": (lambda: headed(*stem(), shift(), nn.ReLU()), 4),
    "squeeze and excite": (lambda: headed(*stem(), nn.Conv2d(8, 16, 3), gated(), nn.ReLU()), 5),
    "relu6, hardswish": (lambda: headed(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 16, 3), nn.Hardswish()), 3),
}


@pytest.mark.parametrize("name", NETS)
def test_layers_become_integer_kernels_that_compute_the_same(name: str, tmp_path: Path) -> None:
    make, count = NETS[name]
    model, report, x = exported(make(), tmp_path)
    graph = lowered(tmp_path / "model.x86.pt2", x)
    assert report["float_layers"] == {} and kernels(graph) == {"int8": count}
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0.02 * float(model(x).abs().max()))


class Branches(nn.Module):
    """Every awkward layer on the same images."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict({name.replace(" ", "_"): make() for name, make in AWKWARD.items()})

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x).mean((2, 3)) for branch in self.branches.values()], 1)


def test_every_convolution_becomes_one_or_is_named(tmp_path: Path) -> None:
    model, report, x = exported(Branches().eval(), tmp_path, shape=(8, 16, 16))
    graph = lowered(tmp_path / "model.x86.pt2", x)
    uses = sum(1 if name == "at the root" else 2 for name in AWKWARD)
    ((name, why),) = report["float_layers"].items()
    assert name == "branches.padding_same,_even_kernel.2" and why.startswith("its padding is larger at the end")
    assert kernels(graph) == {"int8": uses - 1, "float": 1}
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0.02 * float(model(x).abs().max()))


def test_fewer_bits_are_clipped_by_the_kernel(tmp_path: Path) -> None:
    model, _, x = exported(small(channels=3), tmp_path, activation_bits=4, weight_bits=4)
    graph = lowered(tmp_path / "model.x86.pt2", x)
    assert kernels(graph) == {"int8": 10}
    loud = 4 * x  # more than calibration saw: most tensors are cut off at their grid's end
    torch.testing.assert_close(graph(loud), model(loud), rtol=0, atol=0.1)
    fused = [str(node.args) for node in graph.graph.nodes if "qconv_pointwise" in str(node.target)]
    assert sum("hardtanh" in arguments for arguments in fused) >= 4


@pytest.mark.parametrize(
    ("settings", "count", "why"),
    [
        ({"grid": "power_of_two", "weight_bits": 4}, 3, ""),
        ({"symmetric": False, "weight_bits": 4}, 3, ""),
        ({"symmetric": False}, 0, "its weights less their zero points do not fit int8"),
        ({"granularity": "group", "group_size": 1}, 0, "its weights have more scales than one for each output channel"),
        ({"exclude": ["2"]}, 2, "its weights are not quantized"),
        ({"activation_bits": None}, 0, "its input is not quantized"),
    ],
)
def test_weights_that_no_kernel_takes_stay_float_with_the_reason(
    settings: dict[str, Any], count: int, why: str, tmp_path: Path
) -> None:
    _, report, x = exported(tiny(), tmp_path, **settings)
    assert kernels(lowered(tmp_path / "model.x86.pt2", x))["int8"] == count == 3 - len(report["float_layers"])
    assert set(report["float_layers"].values()) == ({why} if why else set())


def test_the_file_says_what_it_needs_and_loads_with_it(tmp_path: Path) -> None:
    model, _, x = exported(tiny(), tmp_path)
    with zipfile.ZipFile(tmp_path / "model.x86.pt2") as file:
        (readme,) = [name for name in file.namelist() if name.endswith("extra/README")]
        text = file.read(readme).decode()
    assert "import torch.ao.quantization.fx" in text and "freezing = True" in text
    torch.save((x, model(x).detach()), tmp_path / "x.pt")
    run = text.partition("\n\n")[2].replace("torch.compile(", "(").replace("images", "x")  # compiling takes a while
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        f"import torch; x, y = torch.load('x.pt')\n{run}"
        "assert torch.allclose(logits, y, rtol=0, atol=1e-5)\n"
        "assert not any(name in sys.modules for name in ('compress', 'torchao', 'onnx'))\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_integers_replace_the_float_weights(tmp_path: Path) -> None:
    exported(tiny(), tmp_path)
    state = torch.export.load(tmp_path / "model.x86.pt2").state_dict
    kinds = Counter(tensor.dtype for name, tensor in state.items() if "weight" in name)
    assert kinds == {torch.int8: 3, torch.float32: 3, torch.int64: 3}  # integers, scales, zero points


def test_a_model_with_nothing_quantized_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`export` \(=pt2_x86\) is for quantized models, and nothing in this one is"):
        export_pt2_x86(small(channels=3), torch.randn(2, *SHAPE), tmp_path / "model.x86.pt2")


def test_a_recipe_that_quantizes_nothing_is_refused_before_it_runs(tmp_path: Path) -> None:
    assert pt2_x86_problems({"int8": Quantize()}) == []
    refused = [({"tune": FineTune()}, "add a `Quantize` stage"), ({"w": Quantize(activation_bits=None)}, "set `activ")]
    for stages, remedy in refused:
        (problem,) = pt2_x86_problems(stages)
        assert problem.startswith("`export` (=pt2_x86)") and remedy in problem
        with pytest.raises(ConfigError, match=remedy):
            compress.run(stages, task(), model=small(channels=3), out=tmp_path / "out", export=["pt2_x86"])


def test_a_run_writes_the_file(tmp_path: Path) -> None:
    model = tiny()
    settings: dict[str, Any] = {"out": tmp_path / "out", "export": ["pt2", "pt2_x86"], "measure": "none", "cache": None}
    report = compress.run({"int8": Quantize()}, task(), model=model, **settings).report
    assert [export["file"] for export in report["exports"]] == ["model.pt2", "model.x86.pt2"]
    assert report["exports"][1]["float_layers"] == {}
    assert (tmp_path / "out" / "model.x86.pt2").stat().st_size == report["exports"][1]["bytes"]
