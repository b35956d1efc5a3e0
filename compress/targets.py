"""What a `_target_` names, and its settings held against the types of its fields or arguments.

The functions here do not raise for what a user wrote: they add to `problems`, so that all of them are told at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import PurePath
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from compress.errors import UserError
from compress.stage import ORDER, Stage

Call = tuple[Callable[..., Any], str, dict[str, Any]]  # a factory, its dotted name, its arguments


@contextmanager
def collecting(problems: list[str], before: str = "", typed: Mapping[str, str] | None = None) -> Iterator[None]:
    """Add what is raised to `problems`, with the arguments of a function as their settings, by `typed`, are called."""
    try:
        yield
    except UserError as error:
        names = typed or {}
        problems.append(before + re.sub(r"(?<=`)\w+(?=[.`])", lambda name: names.get(name[0], name[0]), str(error)))


def stage(where: str, node: Any, problems: list[str]) -> Stage | None:
    """The stage that a recipe's node describes, or None and what is wrong with it in `problems`."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        problems.append(f"`{where}` (={node}) must be a mapping with `_target_`, such as compress.stages.Quantize.")
        return None
    found = locate(where, node["_target_"], problems)
    if found is None:
        return None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found) and getattr(found, "kind", None) in ORDER):
        problems.append(f"`{where}._target_` (={node['_target_']}) is not a stage: a dataclass whose `kind` is one of "
                        f"{', '.join(ORDER)}.")  # fmt: skip
        return None
    # what a stage has in common with others comes last
    fields = sorted((field for field in dataclasses.fields(found) if field.init), key=lambda field: bool(field.kw_only))
    hints = get_type_hints(found)
    before = len(problems)
    given = _converted(where, found.__name__, {f.name: hints[f.name] for f in fields}, node, problems)
    for field in fields:
        missing = dataclasses.MISSING
        if field.default is missing and field.default_factory is missing and field.name not in node:
            problems.append(f"`{where}.{field.name}` must be given.")
    if len(problems) > before:
        return None
    with collecting(problems, f"`{where}`: "):
        return cast(Stage, found(**given))
    return None


def factory(where: str, node: Any, own: Iterable[str], problems: list[str]) -> Call | None:
    """What a node's `_target_` names and its checked arguments, without the keys in `own`, which are ours."""
    if not isinstance(node, Mapping) or "_target_" not in node:
        problems.append(f"`{where}` (={node}) must be a mapping with `_target_`, the dotted name of a factory.")
        return None
    target = node["_target_"]
    found = locate(where, target, problems)
    if found is None:
        return None
    if not callable(found):
        problems.append(f"`{where}._target_` (={target}) is not a function or class.")
        return None
    arguments = {key: value for key, value in node.items() if key not in own}
    try:
        parameters = inspect.signature(found).parameters
        hints = get_type_hints(inspect.getattr_static(found, "__init__") if isinstance(found, type) else found)
    except (NameError, TypeError, ValueError):  # annotations that exist for type checkers only, or a built-in
        return found, str(target), {str(key): value for key, value in arguments.items() if key != "_target_"}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    types = {name: hints.get(name, Any) for name in (*parameters, *(arguments if open_ended else ()))}
    before = len(problems)
    given = _converted(where, str(target), types, arguments, problems)
    # A factory's arguments are written into files, so they stay plain: a path is a string there.
    given = {key: str(value) if isinstance(value, PurePath) else value for key, value in given.items()}
    return (found, str(target), given) if len(problems) == before else None


def locate(where: str, target: Any, problems: list[str]) -> Any:
    home, _, name = str(target).rpartition(".")
    shown = f"`{where}._target_` (={target})"
    if not home:
        problems.append(f"{shown} must be a dotted name, such as mypackage.module.name.")
    elif home.partition(".")[0] in sys.stdlib_module_names:
        problems.append(f"{shown} is Python's own; a factory of yours, of a library or of compress is wanted.")
    else:
        try:
            module = import_module(home)
        except Exception as error:  # whatever a user's module raises while it is imported is the user's to see
            problems.append(f"{shown} cannot be imported: {type(error).__name__}: {error}.")
            return None
        if hasattr(module, name):
            return getattr(module, name)
        own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == home and n[0] != "_"]
        names = sorted(getattr(module, "__all__", own))
        known = difflib.get_close_matches(name, names, n=5) if len(names) > 12 else names
        problems.append(f"{shown} does not exist" + (f"; {home} has {', '.join(known)}." if known else "."))
    return None


def _converted(
    where: str, owner: str, types: Mapping[str, Any], node: Mapping[Any, Any], problems: list[str]
) -> dict[str, Any]:
    """The settings of `node` as values of the wanted types; what does not fit goes to `problems`."""
    given = {}
    for key, value in node.items():
        if key == "_target_":
            continue
        if key not in types:
            meant = [name for name in types if str(key) in name.split("_")]
            meant = meant or difflib.get_close_matches(str(key), types, n=1)
            guess = f"did you mean {' or '.join(f'`{name}`' for name in meant)}? " if meant else ""
            problems.append(
                f"`{where}.{key}` is not a setting of {owner}; {guess}It has: {', '.join(types) or 'none'}."
            )
            continue
        if value is None and not _allows_none(types[key]):
            problems.append(f"`{where}.{key}` must be given: {_shown(types[key])}.")
            continue
        try:
            given[str(key)] = convert(value, types[key])
        except (OmegaConfBaseException, TypeError) as error:
            why = str(error).splitlines()[0]
            problems.append(f"`{where}.{key}` (={value}) must be of type {_shown(types[key])}: {why}")
    return given


def _allows_none(hint: Any) -> bool:
    return hint is Any or hint is type(None) or type(None) in get_args(hint)


def _shown(hint: Any) -> str:
    return str(hint).replace("typing.", "") if get_args(hint) or not isinstance(hint, type) else hint.__name__


def convert(value: Any, hint: Any) -> Any:
    """A plain value as one of type `hint`: OmegaConf's rules, and `Literal`, which it does not know.

    Raises:
        TypeError, OmegaConfBaseException: it is not of that type.
    """
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise TypeError(f"choose from {', '.join(map(str, get_args(hint)))}.")
        return value
    if isinstance(value, bool) and hint in (int, float):
        raise TypeError("true and false are not numbers.")
    try:
        schema = OmegaConf.structured(dataclasses.make_dataclass("Setting", [("value", hint)]))
    except OmegaConfBaseException:
        return value  # a type that OmegaConf cannot express; its owner has to check it
    merged = OmegaConf.to_container(OmegaConf.merge(schema, {"value": value}))
    assert isinstance(merged, dict)
    return tuple(merged["value"]) if get_origin(hint) is tuple else merged["value"]
