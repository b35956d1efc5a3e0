"""Walking a model, naming its layers, and swapping them: the only place where modules are replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from compress.errors import ConfigError
from compress.stage import Keep, Site

Rule = Callable[[str, nn.Module], nn.Module]


def kind(module: nn.Module) -> type[nn.Module]:
    """The class of a module beneath its parametrizations: a masked `Conv2d` is a `Conv2d`, a subclass is not."""
    return parametrize.type_before_parametrizations(module)


def describe(module: nn.Module) -> str:
    """A layer in one line: "Conv2d(16, 32, 3x3, stride=2)"."""
    name = kind(module).__name__
    if isinstance(module, nn.Conv2d):
        return f"{name}({module.in_channels}, {module.out_channels}, {convolution_text(module)})"
    if isinstance(module, nn.Linear):
        return f"{name}({module.in_features}, {module.out_features})"
    return f"{name}({module.extra_repr()})"


def convolution_text(module: nn.Module) -> str:
    """Kernel and what differs from the default: "3x3, stride=2, groups=4"; for anything with a convolution's fields."""
    text = "x".join(str(k) for k in module.kernel_size)  # type: ignore[union-attr]
    for field, default in (("stride", (1, 1)), ("dilation", (1, 1)), ("groups", 1), ("padding_mode", "zeros")):
        value = getattr(module, field)
        if value != default:
            shown = value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value
            text += f", {field}={shown}"
    return text


def matching(names: Sequence[str], include: Iterable[str], exclude: Iterable[str]) -> dict[str, str]:
    """Why each name is left out ("" for those taken), by shell wildcards on module names.

    Raises:
        ConfigError: a pattern that matches none of the names.
    """
    include, exclude = list(include), list(exclude)
    for field, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"`{field}` has the pattern {pattern!r}, which matches no layer; the layers are: {_some(names)}."
                )
    reasons = {}
    for name in names:
        hit = next((p for p in exclude if fnmatchcase(name, p)), None)
        if hit is not None:
            reasons[name] = f"excluded by {hit!r}"
        elif include and not any(fnmatchcase(name, p) for p in include):
            reasons[name] = "not in `include`"
        else:
            reasons[name] = ""
    return reasons


def by_pattern(setting: str, patterns: Iterable[str], names: Sequence[str]) -> dict[str, str]:
    """Name -> the first of the shell wildcards `patterns` that matches it; names that none matches are left out.

    Raises:
        ConfigError: a pattern that matches none of the names; `setting` is what the patterns were given as.
    """
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"`{setting}` has the pattern {pattern!r}, which matches no layer; the layers are: {_some(names)}."
            )
    first = {name: next((p for p in patterns if fnmatchcase(name, p)), None) for name in names}
    return {name: pattern for name, pattern in first.items() if pattern is not None}


def _some(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(name or "(the model itself)" for name in names[:most])
    return shown + (f", ... ({len(names)} in all)" if len(names) > most else "") if names else "none of this kind"


def leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules, each module object once, layers of ours taken whole (nothing inside them is shown)."""
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        if is_ours(module):
            return
        for child_name, child in module.named_children():
            if child_name != "parametrizations":
                yield from walk(child, f"{name}.{child_name}" if name else child_name)

    return walk(model, "")


def is_ours(module: nn.Module) -> bool:
    """Whether this is a layer of `compress.nn`: structure stages treat it as one piece."""
    return hasattr(kind(module), "lower") and hasattr(kind(module), "config")


def left_out(
    model: nn.Module, found: Mapping[str, nn.Module], include: Iterable[str], exclude: Iterable[str]
) -> dict[str, str]:
    """Why a stage that changes the structure leaves each of the `found` layers alone ("" for those it takes).

    By patterns, see `matching`; a parameter that is another layer's too would be so no longer; and what an operator of
    `compress.nn` is made of belongs to that operator.
    """
    reasons, parts, shared = matching(list(found), include, exclude), inside_ours(model, found), tied(model)
    for name, layer in found.items():
        reasons[name] = reasons[name] or why_shared(layer, shared) or parts[name]
    return reasons


def inside_ours(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """For each layer of these names the operator of `compress.nn` that it is a part of, as a reason; "" for none."""
    reasons = dict.fromkeys(names, "")
    for name in reasons:
        steps = name.split(".")
        above = [model.get_submodule(".".join(steps[:depth])) for depth in range(1, len(steps))]
        operator = next((module for module in above if kind(module).__module__.startswith("compress.nn.")), None)
        if operator is not None:
            reasons[name] = f"it is a part of {describe(operator)}"
    return reasons


def weighted(layer: nn.Module) -> list[nn.Module]:
    """The convolutions and linear layers that a layer is made of; a plain one is itself."""
    return [module for module in layer.modules() if kind(module) in (nn.Conv2d, nn.Linear)]


def tied(model: nn.Module) -> set[int]:
    """The parameters that stand in several modules, by `id`."""
    held = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {parameter for parameter, holders in held.items() if holders > 1}


def why_shared(layer: nn.Module, shared: Collection[int]) -> str:
    """That one of a layer's parameters is among these, which `tied` gave; "" where none is."""
    held = any(id(parameter) in shared for parameter in layer.parameters())
    return "it has a parameter that is another layer's too" if held else ""


def output_layers(layer: nn.Module) -> tuple[nn.Module, ...]:
    """The `Conv2d` or `Linear` modules whose outputs, side by side, are this layer's output; () for any other layer."""
    if kind(layer) in (nn.Conv2d, nn.Linear):
        return (layer,)
    if is_ours(layer) and hasattr(layer, "output_convolutions"):
        return tuple(layer.output_convolutions())  # type: ignore[operator]  # a method, by the layers' contract
    return ()


def layers(model: nn.Module, kinds: Sequence[type[nn.Module]]) -> dict[str, nn.Module]:
    """The layers of exactly these kinds by name, each module object once."""
    return {name: module for name, module in leaves(model) if kind(module) in kinds}


def layers_and_ours(model: nn.Module, kinds: Sequence[type[nn.Module]]) -> dict[str, nn.Module]:
    """The layers of exactly these kinds, and all layers of ours, by name, each module object once."""
    return {name: module for name, module in leaves(model) if kind(module) in kinds or is_ours(module)}


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `old` stands (a module used twice is replaced in both places); gives back the model."""
    if model is old:
        return new
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
    return model


def swap(
    model: nn.Module,
    rule: Rule,
    kinds: Sequence[type[nn.Module]],
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    order: Sequence[str] | None = None,
) -> tuple[nn.Module, tuple[Site, ...]]:
    """Replace every layer of the given kinds by what `rule(name, layer)` returns, or keep it when it raises `Keep`.

    Layers are visited in `order` (names; default: as they are registered), and the model is edited as it goes, so a
    rule sees the network as changed so far. Replacements take over the training mode of what they replace.

    Returns:
        the model, and one `Site` for every layer of these kinds.

    Raises:
        ConfigError: a pattern that matches nothing, or no layer was changed at all.
    """
    found = layers(model, kinds)
    reasons = left_out(model, found, include, exclude)
    sites: dict[str, Site] = {}
    for name in found if order is None else order:
        module, why, after = found[name], reasons[name], None
        before = describe(module)
        if not why:
            try:
                new = rule(name, module)
            except Keep as reason:
                why = str(reason)
            else:
                new.train(module.training)
                model = replace(model, module, new)
                after = describe(new)
        sites[name] = Site(name, before, after, why)
    for name, module in found.items():
        if name not in sites:
            sites[name] = Site(name, describe(module), None, "never reached by the forward pass")
    ordered = tuple(sites[name] for name in found)
    require_change(ordered)
    return model, ordered


def require_change(sites: Sequence[Site]) -> None:
    """Raise `ConfigError`, with the reasons, where a stage changed nothing."""
    if any(site.after is not None for site in sites):
        return
    if not sites:
        raise ConfigError("the stage found no layer of a kind it handles, so it would change nothing.")
    first: dict[str, str] = {}
    for site in sites:
        first.setdefault(site.why, site.name or "the model itself")
    reasons = sorted(f"{why} (e.g. {name})" for why, name in first.items())
    raise ConfigError("the stage would change nothing; every layer was kept: " + "; ".join(reasons) + ".")
