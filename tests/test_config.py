"""Settings: recipes as a Hydra group, stages and factories held against their types, problems told all at once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import nn

from compress import plan, targets
from compress.errors import ConfigError
from compress.stage import Edit


class Colour(Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Toy:
    """A structural stage with a setting of every type."""

    taps: int
    rate: float = 0.5
    name: str = "a"
    learn: bool = False
    mode: Literal["fast", "small"] = "fast"
    colour: Colour = Colour.RED
    limit: int | None = None
    pair: tuple[int, int] = (1, 1)
    bits: dict[str, int] = field(default_factory=dict)
    include: list[str] = field(default_factory=list)
    exclude: list[str] = field(default_factory=list)

    kind: ClassVar[str] = "substitute"
    kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d,)

    def __post_init__(self) -> None:
        if self.taps < 1:
            raise ConfigError(f"`taps` (={self.taps}) must be at least 1.")

    def __call__(self, model: nn.Module, task: Any, work: Any) -> Edit:
        return Edit(model)


@dataclass(frozen=True)
class Polish(Toy):  # a fixture may inherit; the product's stages do not
    """A training stage."""

    taps: int = 1
    kind: ClassVar[str] = "finetune"


@dataclass(frozen=True)
class Round:
    """A quantizing stage."""

    kind: ClassVar[str] = "quantize"

    def __call__(self, model: nn.Module, task: Any, work: Any) -> Edit:
        return Edit(model)


def net(classes: int, channels: int = 3, width: int = 4, *, first: str = "conv1") -> nn.Module:
    model = nn.Sequential()
    model.add_module(first, nn.Conv2d(channels, width, 3))
    model.add_module("flatten", nn.Flatten())
    model.add_module("head", nn.Linear(width * 36, classes))
    return model


def fussy(classes: int) -> nn.Module:
    model = net(classes, 1)
    model.register_buffer("table", torch.tensor([1.0]).cpu())
    assert model.head.weight.abs().sum().item() > 0  # reading a value fails on meta
    return model


def not_a_model(classes: int) -> str:
    return "no"


def broken(classes: int) -> nn.Module:
    raise ZeroDivisionError("the width is 0")


TOY = {"_target_": "test_config.Toy", "taps": 3}
INT8 = {"_target_": "compress.stages.Quantize"}


def settings(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "seed": 0,
        "device": "cpu",
        "precision": "float32",
        "target": "onnxruntime",
        "export": [],
        "measure": "none",
        "forms": "default",
        "floor": 0,
        "cache": "off",
        "out": str(tmp_path / "out"),
        "stages": {"toy": TOY},
        "model": {"_target_": "test_config.net", "train": {"_target_": "test_config.Polish"}},
        "data": {"_target_": "compress.data.digits", "batch_size": 64, "calibration_images": 64},
    }
    for key, value in changes.items():
        given[key] = {**given[key], **value} if key in ("model", "data") and isinstance(value, dict) else value
    return given


def problems(tmp_path: Path, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan.make(settings(tmp_path, **changes))
    assert list(tmp_path.iterdir()) == []
    return str(caught.value).split("\n")


def toy(**node: Any) -> dict[str, Any]:
    return {"toy": {**TOY, **node}}


def test_a_plan_holds_what_was_asked_for(tmp_path: Path) -> None:
    ready = plan.make(settings(tmp_path, export=["onnx"], seed=7, cache=str(tmp_path / "store")))
    assert ready.stages == {"toy": Toy(taps=3)}
    assert ready.train == Polish()
    assert ready.build == ("test_config.net", {"classes": 10, "channels": 1})
    assert (ready.export, ready.cache, ready.task.seed) == (("onnx",), tmp_path / "store", 7)
    assert list(tmp_path.iterdir()) == []


def test_stages_keep_the_order_of_the_file(tmp_path: Path) -> None:
    stages = {"z": TOY, "a": {"_target_": "test_config.Polish"}, "m": {"_target_": "test_config.Round"}}
    assert list(plan.make(settings(tmp_path, stages=stages)).stages) == ["z", "a", "m"]


def test_every_type_of_setting_is_converted(tmp_path: Path) -> None:
    node = {
        **TOY,
        "rate": 1,
        "mode": "small",
        "colour": "BLUE",
        "limit": None,
        "pair": [2, 3],
        "bits": {"conv1": 4},
        "exclude": ["none*"],
    }
    found: list[str] = []
    stage = targets.stage("stages.toy", node, found)
    assert found == []
    assert stage == Toy(3, 1.0, mode="small", colour=Colour.BLUE, pair=(2, 3), bits={"conv1": 4}, exclude=["none*"])
    assert stage == Toy(**asdict(stage))  # type: ignore[call-overload]  # a Toy is a dataclass
    assert isinstance(stage.rate, float) and isinstance(stage.pair, tuple)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"taps": "three"}, "`stages.toy.taps` (=three) must be of type int: Value 'three' of type 'str'"),
        ({"taps": 3.5}, "`stages.toy.taps` (=3.5) must be of type int"),
        ({"taps": True}, "`stages.toy.taps` (=True) must be of type int: true and false are not numbers."),
        ({"taps": None}, "`stages.toy.taps` must be given: int."),
        ({"taps": 0}, "`stages.toy`: `taps` (=0) must be at least 1."),
        ({"rate": "fast"}, "`stages.toy.rate` (=fast) must be of type float"),
        ({"learn": "maybe"}, "`stages.toy.learn` (=maybe) must be of type bool"),
        ({"mode": "big"}, "`stages.toy.mode` (=big) must be of type Literal['fast', 'small']: choose from fast"),
        ({"colour": "GREEN"}, "`stages.toy.colour` (=GREEN) must be of type Colour"),
        ({"exclude": "conv1"}, "`stages.toy.exclude` (=conv1) must be of type list[str]"),
        ({"bits": {"conv1": "x"}}, "`stages.toy.bits` (={'conv1': 'x'}) must be of type dict[str, int]"),
        ({"tabs": 3}, "`stages.toy.tabs` is not a setting of Toy; did you mean `taps`? It has: taps, rate, name"),
        ({"_target_": "test_config.Toi"}, "`stages.toy._target_` (=test_config.Toi) does not exist; test_config has"),
        ({"_target_": "nowhere.Toy"}, "cannot be imported: ModuleNotFoundError: No module named 'nowhere'."),
        ({"_target_": "Toy"}, "`stages.toy._target_` (=Toy) must be a dotted name"),
        ({"_target_": "test_config.net"}, "is not a stage: a dataclass whose `kind` is one of substitute, factorize"),
        ({"_target_": "os.system"}, "`stages.toy._target_` (=os.system) is Python's own"),
        ({"exclude": ["layer9.*"]}, "`stages.toy`: `exclude` has the pattern 'layer9.*', which matches no layer"),
    ],
)
def test_a_stage_that_cannot_be_built_is_named(tmp_path: Path, node: dict[str, Any], message: str) -> None:
    (problem,) = problems(tmp_path, stages=toy(**node))
    assert message in problem


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path, stages={"toy": {"_target_": "test_config.Toy"}}) == ["`stages.toy.taps` must be given."]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": {}}, "`stages` must name at least one stage"),
        ({"stages": {"toy": None}}, "`stages.toy` (=None) is not a stage: it has no `_target_`"),
        ({"stages": {"r": {"_target_": "test_config.Round"}, "toy": TOY}}, "`stages.toy` (Toy) cannot come after"),
        ({"stages": {"q": {**INT8, "bits": 4}}}, "did you mean `weight_bits` or `activation_bits` or"),
        ({"stages": {"q": {**INT8, "layers": {"x*": 4}}}}, "`layers` has the pattern 'x*', which matches no layer"),
        ({"stages": {"p": {"_target_": "compress.stages.PruneShifts"}}}, "put the stage `Shift`"),
        ({"stages": {"r": {"_target_": "compress.stages.AdaRound"}}}, "(AdaRound) needs `Quantize`"),
        ({"sed": 1}, "`sed` is not a setting; see --help."),
        ({"seed": -1}, "`seed` (=-1) must be a whole number, 0 or more."),
        ({"seed": "x"}, "`seed` (=x) must be a whole number, 0 or more."),
        ({"device": "tpu"}, "`device` (=tpu) must be one of auto, cpu, cuda."),
        ({"precision": "float16"}, "`precision` (=float16) must be one of float32, bfloat16."),
        ({"target": "tflite"}, "`target` (=tflite) must be one of onnxruntime, openvino, torch, torch.compile, cuda."),
        ({"measure": "some"}, "`measure` (=some) must be one of ends, all, none."),
        ({"floor": 80}, "`floor` (=80) must be a share of val, between 0 (off) and 1."),
        ({"forms": "best"}, "`forms` (=best) must be one of measured, default."),
        ({"export": ["onnx", "tflite"]}, "`export` (=tflite) must be a list out of onnx, pt2, pt2_x86."),
        ({"data": {"limits": 5}}, "`data.limits` is not a setting of compress.data.digits; did you mean `limit`?"),
        ({"data": {"limit": "few"}}, "`data.limit` (=few) must be of type"),
        ({"data": {"limit": 0}}, "`data.limit` (=0) must be at least 1"),
        (
            {"data": {"limit": 1}},
            "`data.limit` (=1) leaves digits with 1 training image(s), but training takes at least",
        ),
        ({"data": {"batch_size": 0}}, "`data.batch_size` (=0) must be at least 2"),
        ({"data": {"calibration_images": 1}}, "`data.calibration_images` (=1) must be at least 2"),
        ({"data": {"batch_size": "big"}}, "`data.batch_size` (=big) must be a whole number."),
        ({"data": {"_target_": "compress.data.dogs"}}, "(=compress.data.dogs) does not exist; compress.data has"),
        ({"model": {"input": {"scael": 1}}}, "`model.input` has the unknown key 'scael'"),
        ({"model": {"width": "wide"}}, "`model.width` (=wide) must be of type int"),
        ({"model": {"input": {"size": [9, 9]}}}, "`model.input` asks for size=[9, 9]"),
        ({"model": {"input": {"std": [0]}}}, "`model.input.std` (=[0]) must be above 0"),
        ({"model": {"return": 3}}, "not a setting of test_config.net; It has: classes, channels, width, first."),
        ({"model": {"wdith": 8}}, "`model.wdith` is not a setting of test_config.net; did you mean `width`?"),
        ({"model": {"weights": "/nowhere/w.th"}}, "`model.weights` (='/nowhere/w.th') does not exist"),
        ({"model": {"train": None}}, "`model.weights` is not given and `model.train` is null"),
        ({"model": {"train": TOY}}, "`model.train` (Toy) must be a compress.stages.FineTune."),
        ({"model": {"_target_": "test_config.not_a_model"}}, "gave a str, not a torch.nn.Module."),
        ({"model": {"_target_": "test_config.broken"}}, "cannot be built: ZeroDivisionError: the width is 0"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (problem,) = problems(tmp_path, **changes)
    assert message in problem


def test_all_problems_are_told_together(tmp_path: Path) -> None:
    found = problems(tmp_path, device="tpu", stages=toy(taps=0, tabs=1), data={"limit": 0}, export=["x"])
    assert len(found) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, device="cuda")
    assert problem == "`device` (=cuda) is not there: torch finds no CUDA device; use device=cpu."
    assert plan.make(settings(tmp_path, device="auto")).task.device == torch.device("cpu")


def test_the_data_says_how_many_classes_and_channels(tmp_path: Path) -> None:
    model = {"width": 8, "channels": 1, "first": "stem"}
    ready = plan.make(settings(tmp_path, model=model, stages=toy(include=["stem"])))
    assert ready.build == ("test_config.net", {"classes": 10, "channels": 1, "width": 8, "first": "stem"})


def test_the_models_input_lies_over_the_datas(tmp_path: Path) -> None:
    ready = plan.make(settings(tmp_path, model={"input": {"mean": [0.5]}}))
    assert ready.task.input["mean"] == [0.5]
    assert ready.task.input["scale"] == 16.0


def test_a_model_that_cannot_be_built_on_meta_is_built(tmp_path: Path) -> None:
    ready = plan.make(settings(tmp_path, model={"_target_": "test_config.fussy"}))
    assert ready.build == ("test_config.fussy", {"classes": 10})


def test_weights_are_tried_on_the_model(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save(net(10, 1).state_dict(), file)
    ready = plan.make(settings(tmp_path, model={"weights": str(file)}))
    assert (ready.weights, ready.train) == (file, None)
    torch.save(net(10, 1, width=5).state_dict(), file)
    with pytest.raises(ConfigError, match=r"conv1\.weight"):
        plan.make(settings(tmp_path, model={"weights": str(file)}))


def test_checking_draws_no_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    plan.make(settings(tmp_path, model={"_target_": "test_config.fussy"}))
    assert torch.equal(torch.rand(1), expected)


def test_a_plan_is_made_of_plain_values(tmp_path: Path) -> None:
    assert json.loads(json.dumps(plan.make(settings(tmp_path)).build))
