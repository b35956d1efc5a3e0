"""Which factories and layers a checkpoint can name, and the arguments that make them.

Only what stands in a fixed table is ever built from a file: the factories of `compress.models`, the layers of
`torch.nn` listed here, the classes of `compress.nn` that have a `config()`, and factories of modules that the caller
allows. Arguments are plain, small values.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import compress.models
import compress.nn
from compress.errors import CheckpointError, UserError
from compress.surgery import kind

Build = tuple[str, dict[str, Any]]

TORCH: dict[str, type[nn.Module]] = {
    c.__name__: c
    for c in (
        *(nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Identity, nn.Flatten, nn.Sequential),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm, nn.Dropout, nn.Dropout2d),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softmax),
        *(nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh),
        *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
        *(nn.ZeroPad2d, nn.ReflectionPad2d, nn.Upsample, nn.PixelShuffle, nn.ChannelShuffle),
    )
}
# Arguments in which (3, 3) and 3 mean the same.
_PAIRS = {"kernel_size", "stride", "padding", "dilation", "output_padding", "output_size"}
_LARGEST = 2**24


def foreign(build: Build) -> str | None:
    """What a user has to know to load a model with this base: None, or that `allow` is needed, as a sentence."""
    path = canonical_build(build)[0]
    if _known_factory(path) is not None:
        return None
    module = path.rpartition(".")[0]
    return (
        f"The base model is built by {path!r}, which is not part of compress: "
        f"load the checkpoint with `allow=[{module!r}]` where you trust that code."
    )


def canonical_build(build: Any) -> Build:
    """`build` with a factory of `compress.models` under its public name, and its arguments as JSON gives them back.

    Raises:
        UserError: it is not a dotted name and a mapping of JSON-able arguments.
    """
    remedy = 'it must be a pair like ("compress.models.resnet20", {"classes": 10}), so that loading can build the base.'
    if not isinstance(build, tuple | list) or len(build) != 2:
        raise UserError(f"`build` (={build!r}) says nothing about how the base model is made; {remedy}")
    path, arguments = build
    names = path.split(".") if isinstance(path, str) else []
    if len(names) < 2 or not all(name.isidentifier() for name in names) or not isinstance(arguments, Mapping):
        raise UserError(f"`build` (={build!r}) is not understood; {remedy}")
    try:
        plain = json.loads(json.dumps(dict(arguments), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"`build` has arguments that JSON cannot hold ({error}); {remedy}") from error
    if path.startswith("compress.models.") and names[-1] in compress.models.__all__:
        path = f"compress.models.{names[-1]}"
    return path, plain


def named(path: str) -> Any:
    """What a dotted name stands for. Raises ImportError or AttributeError where it stands for nothing."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def build_base(build: Build, allow: Sequence[str], device: str) -> nn.Module:
    """The base model, fresh, on `device`. Does not touch the caller's random numbers or default type.

    Raises:
        CheckpointError: the factory is not allowed, not there, or fails.
    """
    path, arguments = build
    factory = _known_factory(path)
    if factory is None:
        if isinstance(allow, str):
            raise UserError(f"`allow` (={allow!r}) must be a list of module paths, such as [{allow!r}].")
        module = path.rpartition(".")[0]
        if not any(module == prefix or module.startswith(f"{prefix}.") for prefix in allow):
            raise CheckpointError(
                f"the base model is built by {path!r}, which is neither in `compress.models` nor in the table of "
                f"`torch.nn` layers; if you trust that code, load with `allow=[{module!r}]`."
            )
        try:
            factory = named(path)
        except (ImportError, AttributeError) as error:
            raise CheckpointError(f"the base model's factory {path!r} cannot be imported: {error}.") from error
    else:
        arguments = {name: _plain(name, value) for name, value in arguments.items()}
    with _fresh(device):
        try:
            base = factory(**arguments)
        except Exception as error:  # a factory is foreign code: whatever it raises, the file cannot be loaded
            raise CheckpointError(f"the base model cannot be built by {path}(**{arguments}): {error}") from error
    if not isinstance(base, nn.Module):
        raise CheckpointError(f"the factory {path!r} made a {type(base).__name__}, not an `nn.Module`.")
    return base


def _known_factory(path: str) -> Callable[..., Any] | None:
    module, _, name = path.rpartition(".")
    if module == "compress.models" and name in compress.models.__all__:
        return getattr(compress.models, name)  # type: ignore[no-any-return]  # a name of that module's own list
    return TORCH.get(name) if module == "torch.nn" else None


@contextmanager
def _fresh(device: str) -> Iterator[None]:
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def arguments(module: nn.Module) -> dict[str, Any]:
    """The constructor arguments of a layer in the table, as plain JSON values."""
    cls = kind(module)
    if cls not in TORCH.values():
        config: dict[str, Any] = json.loads(json.dumps(module.config(), allow_nan=False))  # type: ignore[operator]
        return {name: _short(name, value) for name, value in config.items()}
    said = {}
    for name in defaults(cls):
        if name == "bias":
            # Where a norm has no affine part at all, `bias` says nothing (and torch before 2.13 does not know it).
            affine = getattr(module, "affine", getattr(module, "elementwise_affine", True))
            said[name] = getattr(module, "bias", None) is not None or not affine
        elif hasattr(module, name):
            said[name] = _short(name, json.loads(json.dumps(getattr(module, name))))
    return said


def _short(name: str, value: Any) -> Any:
    pair = name in _PAIRS and isinstance(value, list) and len(value) > 1
    return value[0] if pair and len(set(value)) == 1 and isinstance(value[0], int) else value


def defaults(cls: Callable[..., nn.Module]) -> dict[str, Any]:
    """Argument -> default (`inspect.Parameter.empty` where there is none), without where and how tensors are made."""
    parameters = inspect.signature(cls).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p.default for p in parameters if p.kind not in kinds and p.name not in ("device", "dtype")}


@functools.cache
def _ours() -> dict[str, type[nn.Module]]:
    """The classes of `compress.nn` that say their constructor arguments, by name."""
    found: dict[str, type[nn.Module]] = {}
    for info in pkgutil.iter_modules(compress.nn.__path__):
        module = importlib.import_module(f"compress.nn.{info.name}")
        for name, cls in vars(module).items():
            if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__:
                if name.startswith("_") or not hasattr(cls, "config"):
                    continue
                assert name not in found and name not in TORCH and name != "same", name
                found[name] = cls
    return found


def known(cls: type[nn.Module]) -> bool:
    return TORCH.get(cls.__name__) is cls or _ours().get(cls.__name__) is cls


def is_default(value: Any, default: Any) -> bool:
    return value == default and type(value) is type(default)


def make(
    name: str, given: Mapping[str, Any], device: str, limit: int, old: nn.Module | None = None, depth: int = 0
) -> nn.Module:
    cls = TORCH.get(name) or _ours().get(name)
    if cls is None:
        raise CheckpointError(f"the class {name!r} is not in the table of layers that a checkpoint can name.")
    if cls is nn.Sequential:
        if set(given) != {"children"} or not isinstance(given["children"], list) or depth > 16:
            raise CheckpointError("a Sequential in the blueprint must have `children` and nothing else.")
        children = [row(child, 3, "children") for child in given["children"]]
        made = {str(n): make(c, a, device, limit, depth=depth + 1) for n, c, a in children}
        sequence = nn.Sequential()
        for child, module in made.items():
            try:
                sequence.add_module(child, module)
            except KeyError as error:
                raise CheckpointError(f"a Sequential in the blueprint has a child called {child!r}.") from error
        return sequence
    if old is not None and kind(old) is cls:
        given = arguments(old) | dict(given)
    values = {n: _plain(n, v) for n, v in given.items()}
    try:
        with _fresh(device):
            return cls(**values)
    except NotImplementedError:
        # The constructor computes with real numbers.
        if device != "meta" or _at_most(values) > limit:
            raise CheckpointError(f"{name}(**{values}) is larger than this file can fill.") from None
        return make(name, given, "cpu", limit)
    except Exception as error:  # constructors raise whatever they like for arguments that make no sense
        raise CheckpointError(f"{name}(**{values}) cannot be made: {error}") from error


def _at_most(values: Mapping[str, Any]) -> int:
    """At least as many numbers as a layer with these arguments can hold."""
    product = 1
    for value in values.values():
        for number in value if isinstance(value, tuple) else (value,):
            product *= max(1, abs(number)) if type(number) is int else 1
    return product


def _plain(name: str, value: Any, nested: bool = False) -> Any:
    if isinstance(value, list) and len(value) <= 16 and not nested:
        return tuple(_plain(name, v, nested=True) for v in value)
    fine = value is None or isinstance(value, bool | float) or (isinstance(value, str) and len(value) <= 64)
    if not (fine or (type(value) is int and abs(value) <= _LARGEST)):
        raise CheckpointError(f"the argument `{name}` (={str(value)[:80]}) in the blueprint is no plain, small value.")
    return value


def row(value: Any, length: int, field: str) -> list[Any]:
    """`value`, checked to be a list of `length` with texts and then, last, a mapping of arguments."""
    whole = isinstance(value, list) and len(value) == length and isinstance(value[-1], dict)
    if not whole or not all(isinstance(text, str) for text in value[:-1]):
        raise CheckpointError(f"`{field}` of the blueprint has a malformed row: {str(value)[:80]}.")
    return list(value)
