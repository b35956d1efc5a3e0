"""What a model is made of, as JSON: how its base is built, and every module in which it differs from that base.

A blueprint names classes and plain constructor arguments (see `constructors.py`); nothing in it is ever executed.

* `modules`: [class, arguments, names]; arguments left out are those of the module that is replaced where it has the
  same class, else the defaults. The class "same" stands for a module used in several places.
* `parametrizations`: [[[class, arguments], ...], names of tensors].
* `quantizers`: [class, arguments, places]; a list among the places is one module that stands at all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from compress.constructors import arguments, defaults, is_default, known, make, row
from compress.errors import CheckpointError
from compress.surgery import kind

Parts = dict[str, Any]
_NONE = object()


def describe(model: nn.Module, base: nn.Module) -> Parts:
    """The parts of the blueprint that turn `base` into the structure of `model`; empty ones are left out.

    Raises:
        CheckpointError: the model differs in a way that a blueprint cannot say; the module is named.
    """
    modules = _differences(model, base)
    parametrizations = _parametrizations(model, base)
    quantizers = _quantizers(model)
    parts = {"modules": modules, "parametrizations": parametrizations, "quantizers": quantizers}
    return {name: part for name, part in parts.items() if part}


def _differences(model: nn.Module, base: nn.Module) -> list[Any]:
    groups: dict[str, list[str]] = {}
    same: list[Any] = []
    named: dict[int, str] = {}  # a module that the blueprint describes -> its first name
    replaced: dict[int, str] = {}  # the base's module -> the name of what replaced it
    seen: set[tuple[int, int]] = set()

    def visit(name: str, old: nn.Module, new: nn.Module) -> None:
        if id(new) in named:
            same.append(["same", {"as": named[id(new)]}, [name]])
        elif (id(old), id(new)) not in seen:
            seen.add((id(old), id(new)))
            if _alike(old, new):
                children(name, old, new)
            else:
                named[id(new)] = replaced[id(old)] = name
                groups.setdefault(json.dumps(_said(name, new, old)), []).append(name)

    def children(name: str, old: nn.Module, new: nn.Module) -> None:
        extra = [c for c in new._modules if c not in old._modules and c not in ("parametrizations", "quantizers")]
        if extra:
            raise CheckpointError(f"`{_join(name, extra[0])}` is not in the base model; a checkpoint cannot say it.")
        for child, inner in old._modules.items():
            path = _join(name, child)
            other = new._modules.get(child)
            if child == "parametrizations" or (inner is None and other is None):
                continue
            if inner is None or (other is None and not isinstance(model, fx.GraphModule)):
                raise CheckpointError(f"`{path}` is in only one of the model and its base; a checkpoint cannot say it.")
            if other is not None:
                visit(path, inner, other)
            elif id(inner) in replaced:  # a trace keeps one name of a module that has several
                same.append(["same", {"as": replaced[id(inner)]}, [path]])

    visit("", base, model)
    return [[*json.loads(said), names] for said, names in groups.items()] + same


def _alike(old: nn.Module, new: nn.Module) -> bool:
    """Whether `new` is what the base has there, apart from its children and tensors."""
    cls = kind(new)
    if isinstance(new, fx.GraphModule) or (cls is nn.Module and not known(kind(old))):
        return True  # a trace keeps the tree, not always the containers' classes
    if (cls.__module__, cls.__qualname__) != (kind(old).__module__, kind(old).__qualname__):
        return False
    if cls is nn.Sequential:
        return list(old._modules) == list(new._modules)
    return not known(cls) or arguments(old) == arguments(new)


def _said(name: str, new: nn.Module, old: nn.Module | None = None) -> list[Any]:
    cls = kind(new)
    if not known(cls):
        raise CheckpointError(
            f"`{name}` is a {cls.__module__}.{cls.__qualname__}, which the base model does not have there and which is "
            "not in the table of layers that a checkpoint can name (torch.nn's common ones and those of compress.nn)."
        )
    if cls is nn.Sequential:
        inner = [[child, *_said(_join(name, child), m)] for child, m in new._modules.items() if m is not None]
        return [cls.__name__, {"children": inner}]
    given = arguments(new)
    without = arguments(old) if old is not None and kind(old) is cls else defaults(cls)
    return [cls.__name__, {n: v for n, v in given.items() if not is_default(v, without.get(n, _NONE))}]


def _parametrizations(model: nn.Module, base: nn.Module) -> list[Any]:
    groups: dict[str, list[str]] = {}
    bases = dict(base.named_modules())
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for tensor, chain in module.parametrizations.items():
            path = _join(name, tensor)
            old = bases.get(name)
            if old is not None and parametrize.is_parametrized(old, tensor):
                had = old.parametrizations[tensor]
                if [type(p) for p in had] == [type(p) for p in chain]:
                    continue
            if not all(known(type(p)) for p in chain) or not chain.is_tensor:
                kinds = ", ".join(type(p).__name__ for p in chain)
                raise CheckpointError(f"`{path}` is parametrized by {kinds}; a checkpoint can name only compress.nn's.")
            groups.setdefault(json.dumps([_said(path, p) for p in chain]), []).append(path)
    return [[json.loads(chain), names] for chain, names in groups.items()]


def _quantizers(model: nn.Module) -> list[Any]:
    if not isinstance(model, fx.GraphModule):
        return []
    from compress.nn.places import quantizer_places

    together: dict[str, list[str]] = {}
    for place, child in quantizer_places(model).items():
        together.setdefault(child, []).append(place)
    groups: dict[str, list[Any]] = {}
    for child, places in together.items():
        module = model.get_submodule(f"quantizers.{child}")
        said = json.dumps(_said(f"quantizers.{child}", module))
        groups.setdefault(said, []).append(places if len(places) > 1 else places[0])
    return [[*json.loads(said), places] for said, places in groups.items()]


def assemble(parts: Parts, base: nn.Module, device: str, limit: int) -> nn.Module:
    """`base`, edited in place, with the modules, parametrizations and quantizers of the blueprint; on `device`.

    A layer that cannot be made on `meta` is made on the CPU, where its arguments allow no more than `limit` numbers.

    Raises:
        CheckpointError: the blueprint is malformed, names what is not in the table, or does not fit the base.
    """
    model = base
    placed: list[nn.Module] = []
    for cls, given, names in _triples(parts, "modules"):
        for name in names:
            if any(module in placed for module in _ancestors(model, name)):
                raise CheckpointError(f"`modules` names {name!r}, which is inside a module that it describes already.")
            new = _submodule(model, given.get("as")) if cls == "same" else None
            if new is not None and new not in placed:
                raise CheckpointError(f"`modules` has {name!r} the same as a module that it does not describe.")
            if new is None:
                new = make(cls, given, device, limit, _submodule(model, name))
                placed.append(new)
            if name:
                parent, _, child = name.rpartition(".")
                _submodule(model, parent)._modules[child] = new
            else:
                model = new
    for chain, names in _rows(parts, "parametrizations", 2):
        for name in names:
            owner = _submodule(model, name.rpartition(".")[0])
            for said in chain:
                cls, given = row(said, 2, "parametrizations")
                _parametrize(owner, name, make(cls, given, device, limit))
    return _placed(model, parts, device, limit)


def _placed(model: nn.Module, parts: Parts, device: str, limit: int) -> nn.Module:
    modules: dict[str, nn.Module] = {}
    for cls, given, places in _triples(parts, "quantizers", nested=True):
        for place in places:
            quantizer = make(cls, given, device, limit)
            modules |= {p: quantizer for p in (place if isinstance(place, list) else [place])}
    if not modules:
        return model
    from compress.nn.places import place_quantizers

    try:
        return place_quantizers(model, modules)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the activation quantizers cannot be placed: {error}") from error


def _parametrize(owner: nn.Module, name: str, module: nn.Module) -> None:
    tensor = name.rpartition(".")[2]
    try:
        # The check that registering makes would compute with values that are not there yet.
        parametrize.register_parametrization(owner, tensor, module, unsafe=True)
        owner.parametrizations[tensor].unsafe = False  # type: ignore[index, union-attr]  # a ModuleDict
    except Exception as error:  # torch raises many kinds for a tensor that is not there or does not fit
        raise CheckpointError(f"`{name}` cannot be parametrized by {type(module).__name__}: {error}") from error


def _ancestors(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules on the way to `name`, without the one that stands there; `name` must be in the model."""
    _submodule(model, name)
    parts = name.split(".") if name else []
    return [_submodule(model, ".".join(parts[:i])) for i in range(len(parts))]


def _submodule(model: nn.Module, name: Any) -> nn.Module:
    module: nn.Module | None = model
    for part in name.split(".") if isinstance(name, str) and name else []:
        module = module._modules.get(part) if module is not None else None
    if module is None or not isinstance(name, str):
        raise CheckpointError(f"the blueprint names the module {str(name)[:80]!r}, which the base model does not have.")
    return module


def _triples(parts: Parts, field: str, nested: bool = False) -> Iterator[tuple[str, dict[str, Any], list[Any]]]:
    for cls, given, names in _rows(parts, field, 3, nested):
        if not isinstance(cls, str) or not isinstance(given, dict):
            raise CheckpointError(f"`{field}` of the blueprint has a malformed row: {str([cls, given])[:80]}.")
        yield cls, given, names


def _rows(parts: Parts, field: str, length: int, nested: bool = False) -> Iterator[list[Any]]:
    """The rows of a part, whose last item is a list of names (where `nested`, of lists of names too)."""
    rows: Any = parts.get(field, [])
    one: Any
    for one in rows if isinstance(rows, list) else [None]:
        whole = isinstance(one, list) and len(one) == length and isinstance(one[-1], list)
        flat = [n for v in one[-1] for n in (v if nested and isinstance(v, list) else [v])] if whole else [None]
        if not all(isinstance(n, str) for n in flat) or (length == 2 and not isinstance(one[0], list)):
            raise CheckpointError(f"`{field}` of the blueprint has a malformed row: {str(one)[:80]}.")
        yield one


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
