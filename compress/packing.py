"""The state of a model, its parameters and buffers, and how it stands in a file.

Weights (of two or more dimensions, called `weight`) stand under their own names. All smaller tensors of a type stand
one after the other, in the order of the state, in one tensor called "/<type>", and in "/<type>/whole" those floats
that are whole numbers. Weights whose last parametrization has `integers()` and `values()` are stored as these integers.
The packed form has no mask of a first parametrization that has `from_zeros()`: the weight's zeros say it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from compress.codecs import Packed, holds_integers, pack, unpack
from compress.errors import CheckpointError

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    )
}


@dataclass(frozen=True)
class Slot:
    """A tensor of the state, and every (module, store, attribute) that holds it: tied parameters have several."""

    tensor: Tensor
    holders: list[tuple[nn.Module, str, str]] = field(default_factory=list)


def state_of(model: nn.Module) -> dict[str, Slot]:
    """The state by name; a parametrized weight goes by the name it had before."""
    slots: dict[str, Slot] = {}
    names: dict[int, str] = {}
    for path, module in model.named_modules():
        for store in ("_parameters", "_buffers"):
            for key, tensor in getattr(module, store).items():
                if tensor is None or (store == "_buffers" and key in module._non_persistent_buffers_set):
                    continue
                name = f"{path}.{key}" if path else key
                if key == "original" and isinstance(module, ParametrizationList):
                    name = plain_name(path)
                name = names.setdefault(id(tensor), name)
                slots.setdefault(name, Slot(tensor)).holders.append((module, store, key))
    return slots


def plain_name(path: str) -> str:
    """The name that a tensor had before it was parametrized, from the path of its `ParametrizationList`."""
    return ".".join(f".{path}".rsplit(".parametrizations.", 1)).removeprefix(".")


def known_by_zeros(state: Mapping[str, Slot]) -> dict[str, ParametrizationList]:
    """The masks among the slots, by name, each with what it belongs to: zeros of the weight say what they are."""
    chains = {id(holder): holder for slot in state.values() for holder, _, key in slot.holders if key == "original"}
    owners = {id(c[0]): c for c in chains.values() if isinstance(c, ParametrizationList) and _from_zeros(c) is not None}
    return {
        name: owners[id(slot.holders[0][0])]
        for name, slot in state.items()
        if slot.holders[0][2] == "mask" and id(slot.holders[0][0]) in owners
    }


def take_from_zeros(chain: ParametrizationList) -> None:
    """Let the mask in front of a weight, if there is one, become the mask of what is not zero."""
    from_zeros = _from_zeros(chain)
    if from_zeros is not None:
        from_zeros(chain.original)


def _from_zeros(chain: ParametrizationList) -> Any:
    return getattr(chain[0], "from_zeros", None) if chain.is_tensor else None


def decoded_bytes(state: Mapping[str, Slot]) -> int:
    """How much memory the tensors of the state take."""
    return sum(slot.tensor.numel() * slot.tensor.element_size() for slot in state.values())


def pack_state(
    state: Mapping[str, Slot], fresh: Mapping[str, Slot], grid: Mapping[str, Tensor], form: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the file, and the part of the blueprint that says how they stand there.

    `fresh` is the state that the blueprint builds; `grid` has the integers of weights that are integers x scale.

    Raises:
        CheckpointError: a tensor is of a type that no checkpoint holds.
    """
    choose = pack if form == "packed" else lambda tensor: Packed(tensor, {})
    dtypes: dict[str, list[str]] = {}
    whole: list[str] = []
    small: dict[str, list[Tensor]] = {}
    packed: dict[str, Packed] = {}
    for name, slot in state.items():
        tensor, dtype = slot.tensor.detach(), str(slot.tensor.dtype).removeprefix("torch.")
        if dtype not in _DTYPES:
            raise CheckpointError(f"`{name}` is {slot.tensor.dtype}, which a checkpoint cannot hold.")
        if slot.tensor.dtype != fresh[name].tensor.dtype:
            dtypes.setdefault(dtype, []).append(name)
        if name in grid:
            said = choose(grid[name])
            packed[name] = Packed(said.data, said.codec | {"scaled": True})
        elif _has_own_name(name, tensor):
            packed[name] = choose(tensor)
        else:
            group = f"/{dtype}"
            # In a short tensor the name would cost more than the bits that it saves.
            if form == "packed" and tensor.is_floating_point() and tensor.numel() > 32 and holds_integers(tensor):
                group += "/whole"
                whole.append(name)
            small.setdefault(group, []).append(tensor.reshape(-1))
    packed |= {group: choose(torch.cat(tensors)) for group, tensors in small.items()}
    codecs: dict[str, list[str]] = {}
    for name, one in packed.items():
        if one.codec:
            codecs.setdefault(json.dumps(one.codec), []).append(name)
    rows = [[json.loads(codec), names] for codec, names in codecs.items()]
    layout = {"dtypes": dtypes, "whole": whole, "codecs": rows}
    return {name: one.data for name, one in packed.items()}, {key: part for key, part in layout.items() if part}


def _has_own_name(name: str, tensor: Tensor) -> bool:
    return tensor.dim() >= 2 and name.rpartition(".")[2] == "weight"


def fill_state(state: Mapping[str, Slot], content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put the file's tensors into the state, in memory of their own; strict in both directions.

    Raises:
        CheckpointError: a tensor is missing, left over, or not what the state expects (it is named).
    """
    codecs = _by_name(content.get("codecs", []), "codecs", dict)
    dtypes = _by_name([[d, n] for d, n in content.get("dtypes", {}).items()], "dtypes", str)
    whole = _by_name([["", content.get("whole", [])]], "whole", str)
    unknown = [n for n in (*dtypes, *whole) if n not in state] + [n for n in codecs if n not in tensors]
    if unknown or any(d not in _DTYPES for d in dtypes.values()):
        raise CheckpointError(f"the blueprint names tensors or types that are not there: {unknown[:4] or dtypes}.")
    tensors = dict(tensors)
    scaled: dict[str, Tensor] = {}
    small: dict[tuple[str, torch.dtype], list[Slot]] = {}
    masks = known_by_zeros(state) if content.get("form") == "packed" else {}
    for name, slot in state.items():
        if name in masks:
            continue
        dtype = _DTYPES[dtypes[name]] if name in dtypes else slot.tensor.dtype
        if _has_own_name(name, slot.tensor):
            codec = dict(codecs.get(name, {}))
            shape = tuple(slot.tensor.shape)
            if codec.pop("scaled", False) is True:
                scaled[name] = _unpacked(tensors, name, codec, shape, _grid(name, slot).integer_dtype)
            else:
                _put(slot, _unpacked(tensors, name, codec, shape, dtype))
        else:
            group = f"/{str(dtype).removeprefix('torch.')}" + ("/whole" if name in whole else "")
            small.setdefault((group, dtype), []).append(slot)
    for (group, dtype), slots in small.items():
        sizes = [slot.tensor.numel() for slot in slots]
        together = _unpacked(tensors, group, codecs.get(group, {}), (sum(sizes),), dtype)
        for slot, value in zip(slots, torch.split(together, sizes), strict=True):
            _put(slot, torch.empty(slot.tensor.shape, dtype=dtype, device="cpu").copy_(value.view(slot.tensor.shape)))
    if tensors:
        raise CheckpointError(f"holds tensors that the model has no place for: {', '.join(sorted(tensors)[:4])}.")
    for name, integers in scaled.items():
        # Only now: the scales are filled too.
        _put(state[name], _grid(name, state[name]).values(integers, state[name].tensor.dtype))
    for chain in masks.values():
        take_from_zeros(chain)


def _grid(name: str, slot: Slot) -> Any:
    """The parametrization that says what the integers of a weight stand for."""
    chain = slot.holders[0][0]
    grid: Any = chain[-1] if isinstance(chain, ParametrizationList) else None
    if not hasattr(grid, "integer_dtype") or slot.tensor.numel() % grid.channels:
        raise CheckpointError(f"the tensor `{name}` is stored as integers, but has no scales that fit.")
    return grid


def _unpacked(
    tensors: dict[str, Tensor], name: str, codec: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"the tensor `{name}` is not in the file.")
    try:
        return unpack(tensors.pop(name), codec, shape, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"the tensor `{name}` {error}.") from error


def _by_name(rows: list[Any], field: str, kind: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        good = isinstance(row, list) and len(row) == 2 and type(row[0]) is kind and isinstance(row[1], list)
        if not good or not all(isinstance(name, str) for name in row[1]):
            raise CheckpointError(f"`{field}` of the blueprint has a malformed row: {str(row)[:80]}.")
        found |= {name: row[0] for name in row[1]}
    return found


def _put(slot: Slot, value: Tensor) -> None:
    """Replace the tensor wherever it is held; what is shared stays shared."""
    new: Tensor = value
    if isinstance(slot.tensor, nn.Parameter):
        new = nn.Parameter(value, requires_grad=slot.tensor.requires_grad)
    for module, store, key in slot.holders:
        getattr(module, store)[key] = new
