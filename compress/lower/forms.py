"""Which of its equal plain forms a layer of ours takes in a file: the one that runs fastest where the file will run.

A layer with a choice has `forms(target)` beside `lower(target)`: plain modules by name that compute the same, its
default first. What is measured here can be stored, so that a later run takes the same forms and writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compress import gate
from compress.files import write
from compress.lower.plain import has_grid
from compress.nn.places import quantizer_places
from compress.surgery import kind, leaves

if TYPE_CHECKING:
    from compress.measure import Latency

FORMS = ("measured", "default")
# Not tried until a stored result of benchmarks/shift_latency.py, which measures every form, shows that they win.
LOSING = ("slices", "moving")
# Calls cost as much as the work in a layer of fewer multiply-adds, and no form wins much.
LEAST_MACS = 1_000_000
# Of the default's multiply-adds: a form made of several layers wins back what it spends on moving numbers with these.
MOST_MACS = 0.5
SECONDS = 0.05  # a form's turn in each round: some hundred calls


@dataclass(frozen=True)
class Choice:
    """The form that a layer takes, and the median milliseconds of every form that was measured, for one image."""

    form: str
    ms: dict[str, float] = field(default_factory=dict)


def choose(
    model: nn.Module, example: Tensor, target: str, store: Path | None = None, least_macs: int = LEAST_MACS
) -> dict[str, Choice]:
    """For every layer of ours with several forms the one to take: layer name -> choice.

    Forms are measured in the runtime `target` for one image of the shape that the layer sees when `model` gets
    `example` (N, C, H, W). One that is not the default is taken where it is at least 10 % faster in each round, as the
    gate asks too. Measured is only what can win: no form in `LOSING`, none that does more than half of the default's
    multiply-adds, no layer that does fewer than `least_macs`. Layers that are alike are measured once. A quantized
    model takes the defaults: the float layer's times say nothing about integers, where one-hot copies of several taps
    lose by far.

    `store` is a folder for what was measured; a question that was asked before is answered from there.
    """
    known = {name: layer for name, layer in leaves(model) if hasattr(kind(layer), "forms")}
    shapes = _shapes(model, known, example) if known and in_float(model) else {}
    choices, answers = {}, dict[str, Choice]()
    for name, layer in known.items():
        forms: dict[str, nn.Module] = layer.forms(target)  # type: ignore[operator]  # by its contract
        tried = worth_trying(forms, shapes[name], least_macs) if name in shapes else {}
        choice = Choice(next(iter(forms)))
        if len(tried) > 1:
            asked = question(tried, shapes[name], target)
            if asked not in answers:
                answers[asked] = answer(asked, tried, shapes[name], target, store)
            choice = answers[asked]
        if len(forms) > 1:
            choices[name] = choice
    return choices


def in_float(model: nn.Module) -> bool:
    """Whether nothing in the model is quantized."""
    return not quantizer_places(model) and not any(has_grid(module) for module in model.modules())


def _shapes(model: nn.Module, known: Mapping[str, nn.Module], example: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of one image as each layer sees it, where the forward pass comes by."""
    shapes: dict[str, tuple[int, ...]] = {}

    def see(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            shapes.setdefault(name, tuple(inputs[0].shape[1:]))

        return hook

    hooks = [layer.register_forward_pre_hook(see(name)) for name, layer in known.items()]
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example[:1])
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    return shapes


def worth_trying(
    forms: Mapping[str, nn.Module], shape: tuple[int, ...], least_macs: int = LEAST_MACS
) -> dict[str, nn.Module]:
    """The default and the forms that can win against it, for one image of `shape` (C, H, W); {} where none can."""
    from compress.measure import profile

    default, *others = [name for name in forms if name not in LOSING]
    if not others:
        return {}
    work = {name: profile(forms[name], torch.zeros(1, *shape)).macs for name in (default, *others)}
    if work[default] < least_macs:
        return {}
    return {name: forms[name] for name in work if name == default or work[name] <= MOST_MACS * work[default]}


def question(forms: Mapping[str, nn.Module], shape: tuple[int, ...], target: str, about: str = "") -> str:
    """Everything that decides which form is faster, as text; weights do not. `about`: what the layers do not show."""
    from compress import machine
    from compress.measure import RUNTIMES, require_runtime

    require_runtime(target)
    hardware = machine.hardware()
    asked: dict[str, Any] = {"target": target, "version": version(RUNTIMES[target][0]), "shape": shape}
    asked["hardware"] = {name: hardware[name] for name in ("processor", "features", "cores", "gpu", "system")}
    asked["forms"] = {name: " ".join(repr(form).split()) for name, form in forms.items()}
    return json.dumps(asked | ({"about": about} if about else {}))


def fastest(forms: Mapping[str, nn.Module], shape: tuple[int, ...], target: str) -> nn.Module:
    """The form that a file for `target` takes for images of `shape` (C, H, W), measured now."""
    tried = worth_trying(forms, shape)
    form = answer("", tried, shape, target).form if len(tried) > 1 else next(iter(forms))
    return forms[form]


def answer(
    question: str,
    forms: Mapping[str, nn.Module],
    shape: tuple[int, ...],
    target: str,
    store: Path | None = None,
    *,
    seconds: float = SECONDS,
    wins: Callable[[Latency], bool] = lambda time: time.ratio_high <= gate.FASTER,
) -> Choice:
    """The fastest of equal forms for one image of `shape` (C, H, W), as measured, or as stored in the folder `store`.

    Another than the first is taken where its measurement, with the ratios to the first one's time, `wins`. Each form
    works for `seconds` a round. What is stored is found by the `question`.
    """
    file = None if store is None else store / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.json"
    if file is not None and (stored := _read(file, forms)):
        return stored
    default = next(iter(forms))
    times = gate.timed(forms, shape, target, seconds)
    faster = [name for name, time in times.items() if name != default and wins(time)]
    best = min(faster, key=lambda name: times[name].ratio, default=default)
    choice = Choice(best, {name: round(time.p50_ms, 4) for name, time in times.items()})
    if file is None:
        return choice
    if stored := _read(file, forms):  # another process was quicker, and may have written a file by it
        return stored
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, json.dumps({"question": json.loads(question), **asdict(choice)}, indent=1))
    return choice


def _read(file: Path, forms: Mapping[str, nn.Module]) -> Choice | None:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        choice = Choice(str(stored["form"]), {str(name): float(ms) for name, ms in stored["ms"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return choice if choice.form in forms else None
