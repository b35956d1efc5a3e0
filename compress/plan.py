"""From plain settings to everything a run needs, checked; or every problem at once.

Nothing here trains, and nothing is written before `fresh` makes a run's folder.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from compress import store, surgery
from compress.constructors import Build, named
from compress.data import Source, make_task
from compress.errors import ConfigError
from compress.folders import named_folder, stores
from compress.lower import EXPORTS
from compress.lower.forms import FORMS
from compress.lower.pt2_x86 import pt2_x86_problems
from compress.measure import RUNTIMES, require_runtime
from compress.models.weights import load_weights
from compress.quantization import is_quantized
from compress.stage import Stage, missing_problems, order_problems
from compress.targets import collecting, factory, stage
from compress.task import PRECISIONS, Task
from compress.unfit import require_fit

CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "precision": PRECISIONS,
    "target": tuple(RUNTIMES),
    "measure": ("ends", "all", "none"),
    "forms": FORMS,
}
SETTINGS = {*CHOICES, "model", "data", "stages", "seed", "export", "floor", "cache", "out"}


@dataclass(frozen=True)
class Plan:
    """A run whose settings have been checked. `out` is the folder asked for; see `folders.fresh`."""

    stages: dict[str, Stage]
    task: Task
    build: Build
    weights: Path | None
    train: Stage | None
    out: Path
    export: tuple[str, ...]
    target: str
    measure: str
    forms: str
    floor: float
    cache: Path | None


def make(settings: Mapping[str, Any]) -> Plan:
    """The plan for a run: stages built, data opened, the base model built once and its weights tried.

    Raises:
        ConfigError: every problem that was found, one a line.
    """
    if absent := [key for key in SETTINGS if key not in settings]:
        raise ConfigError(f"`{min(absent)}` must be given; leave out ~{min(absent)}.")
    problems = [f"`{key}` is not a setting; see --help." for key in settings if key not in SETTINGS]
    device = _choices(settings, problems)
    seed = settings["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        problems.append(f"`seed` (={seed}) must be a whole number, 0 or more.")
        seed = 0
    out = named_folder("out", settings["out"], "outputs/runs/mine", problems)
    kept = named_folder("cache", settings["cache"], "outputs/cache, or `off`", problems) if stores(settings) else None
    floor = settings["floor"]
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor <= 1:
        problems.append(f"`floor` (={floor}) must be a share of val, between 0 (off) and 1.")
    stages = _stages(settings["stages"], problems)
    if stages and "pt2_x86" in _listed(settings["export"]):
        problems += pt2_x86_problems(stages)
    task = _task(settings["data"], settings["model"], device, str(settings["precision"]), seed, problems)
    build, weights, train = _model(settings["model"], task, stages, problems)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    assert task is not None and build is not None
    return Plan(
        stages=stages,
        task=task,
        build=build,
        weights=weights,
        train=train,
        out=out,
        export=tuple(_listed(settings["export"])),
        target=settings["target"],
        measure=settings["measure"],
        forms=settings["forms"],
        floor=floor,
        cache=kept,
    )


def _choices(settings: Mapping[str, Any], problems: list[str]) -> torch.device:
    for key, known in CHOICES.items():
        if settings[key] not in known:
            problems.append(f"`{key}` (={settings[key]}) must be one of {', '.join(known)}.")
    unknown = [name for name in _listed(settings["export"]) if name not in EXPORTS]
    if unknown:
        problems.append(f"`export` (={unknown[0]}) must be a list out of {', '.join(EXPORTS)}.")
    if settings["target"] in RUNTIMES:
        with collecting(problems):
            require_runtime(settings["target"])
    if settings["target"] == "cuda" and settings["measure"] != "none" and not torch.cuda.is_available():
        problems.append(
            "`target` (=cuda) cannot be measured: torch finds no GPU here; take another target, or `measure=none`."
        )
    device = settings["device"]
    if device == "cuda" and not torch.cuda.is_available():
        problems.append("`device` (=cuda) is not there: torch finds no CUDA device; use device=cpu.")
        device = "cpu"
    return torch.device("cuda" if device in ("auto", "cuda") and torch.cuda.is_available() else "cpu")


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _stages(nodes: Any, problems: list[str]) -> dict[str, Stage]:
    if not isinstance(nodes, Mapping) or not nodes:
        problems.append("`stages` must name at least one stage, such as `int8: {_target_: compress.stages.Quantize}`.")
        return {}
    known = [name for name, node in nodes.items() if isinstance(node, Mapping) and "_target_" in node]
    built: dict[str, Stage | None] = {}
    for name, node in nodes.items():
        if name in known:
            built[str(name)] = stage(f"stages.{name}", node, problems)
        else:
            problems.append(
                f"`stages.{name}` (={node}) is not a stage: it has no `_target_`, such as compress.stages.Quantize"
                + (f"; the stages here are {', '.join(known)}." if known else ".")
            )
    stages = {name: built_stage for name, built_stage in built.items() if built_stage is not None}
    problems += order_problems(stages)
    return stages


def _task(node: Any, model: Any, device: torch.device, precision: str, seed: int, problems: list[str]) -> Task | None:
    call = factory("data", node, ("batch_size", "calibration_images"), problems)
    if call is None:
        return None
    function, target, arguments = call
    if "seed" in inspect.signature(function).parameters:
        arguments.setdefault("seed", seed)
    sizes = {key: node[key] for key in ("batch_size", "calibration_images") if key in node}
    for key, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            problems.append(f"`data.{key}` (={value}) must be a whole number.")
            return None
    with collecting(problems, typed={name: f"data.{name}" for name in node} | {"input": "model.input"}):
        source = _opened(target, json.dumps(arguments))
        if len(source.train) < 2:
            raise ConfigError(
                f"`limit` (={node.get('limit')}) leaves {source.name} with {len(source.train)} training image(s), but "
                "training takes at least 2; raise it, or add images."
            )
        return make_task(
            source,
            input=model.get("input") if isinstance(model, Mapping) else None,
            device=device,
            precision=precision if precision in PRECISIONS else PRECISIONS[0],
            seed=seed,
            **sizes,
        )
    return None


@lru_cache(maxsize=1)
def _opened(target: str, arguments: str) -> Source:
    # The runs of a sweep mostly share their images, and each plan is made twice: once to check, once to run.
    return cast(Source, named(target)(**json.loads(arguments)))


def _model(
    node: Any, task: Task | None, stages: Mapping[str, Stage], problems: list[str]
) -> tuple[Build | None, Path | None, Stage | None]:
    call = factory("model", node, ("weights", "input", "train"), problems)
    if call is None:
        return None, None, None
    weights = Path(str(node["weights"])).expanduser() if node.get("weights") else None
    train = stage("model.train", node["train"], problems) if node.get("train") else None
    if train is not None and train.kind != "finetune":
        problems.append(f"`model.train` ({type(train).__name__}) must be a compress.stages.FineTune.")
    if weights is None and not node.get("train"):
        problems.append(
            "`model.weights` is not given and `model.train` is null, so the base would know nothing; set one."
        )
    function, target, arguments = call
    if task is not None:
        for names, value in (
            (("classes", "num_classes"), task.classes),
            (("channels", "in_channels"), task.example.shape[1]),
        ):
            name = next((name for name in names if name in inspect.signature(function).parameters), None)
            if name is not None:
                arguments.setdefault(name, int(value))
        with collecting(problems, typed={"weights": "model.weights"}):
            base = _base((target, arguments), function, weights, task.input)
            problems += _misfits(base, stages)
    return (target, arguments), weights, None if weights else train


def _base(build: Build, function: Callable[..., Any], weights: Path | None, input: Mapping[str, Any]) -> nn.Module:
    """The base model for its structure's sake: without storage, unless there are weights to try on it."""
    target, arguments = build
    errors = []
    for device in ("meta", "cpu") if weights is None else ("cpu",):
        try:
            with torch.random.fork_rng(devices=[]), torch.device(device):
                model = function(**arguments)
            break
        except Exception as error:  # a factory may raise anything; some cannot be built on `meta`
            errors.append(error)
    else:
        raise ConfigError(f"`model` ({target}) cannot be built: {type(errors[-1]).__name__}: {errors[-1]}")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model._target_` (={target}) gave a {type(model).__name__}, not a torch.nn.Module.")
    require_fit(model)
    if weights is not None:
        load_weights(model, weights, allow=store.home(build), input=input)
    return model


def _misfits(base: nn.Module, stages: Mapping[str, Stage]) -> list[str]:
    """What stages find wrong in the base before anything runs.

    Patterns are held against the base where it has layers of the stage's kind. A stage that comes after one that makes
    new layers may be about those, so only the first has its `check` called and must find layers.
    """
    problems: list[str] = []
    first = True
    if not is_quantized(base):
        problems += missing_problems(stages)
    for name, each in stages.items():
        if not hasattr(each, "kinds"):
            continue
        with collecting(problems, f"`stages.{name}`: "):
            find = surgery.layers_and_ours if getattr(each, "ours", False) else surgery.layers
            names = list(find(base, each.kinds))
            if names:
                reasons = surgery.matching(names, getattr(each, "include", ()), getattr(each, "exclude", ()))
                if all(reasons.values()):
                    raise ConfigError("`include` and `exclude` leave no layer to change.")
            if first and hasattr(each, "check"):
                each.check(base)
            if first and not names:
                kinds = ", ".join(kind.__name__ for kind in each.kinds)
                raise ConfigError(f"the model has no {kinds}, so there is nothing to change; choose another `model`.")
        first = False
    return problems
