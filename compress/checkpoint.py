"""The checkpoint: one safetensors file that holds a compressed model and says how to build it again.

Its metadata is a JSON blueprint (`blueprint.py`), its tensors are packed without loss (`packing.py`, `codecs.py`), and
a SHA-256 covers both (`sealed.py`). Loading executes nothing from the file, allocates nothing that the file does not
fill, never runs an algorithm again, and needs torch alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from compress.blueprint import Parts, assemble, describe
from compress.constructors import Build, build_base, canonical_build, foreign
from compress.errors import CheckpointError, UserError
from compress.files import write
from compress.packing import (
    Slot,
    decoded_bytes,
    fill_state,
    known_by_zeros,
    pack_state,
    plain_name,
    state_of,
    take_from_zeros,
)
from compress.sealed import FORMAT, FORMS, read_bytes, require_folder, seal, unseal
from compress.surgery import is_ours

__all__ = ["foreign", "load", "read", "save"]


def save(
    model: nn.Module,
    path: str | Path,
    *,
    build: Build | None,
    input: Mapping[str, Any],
    provenance: Mapping[str, Any],
    results: Mapping[str, Any],
    form: str = "packed",
) -> int:
    """Write `model` to `path` and return the size of the file in bytes; the model itself is not touched.

    `build` is the dotted name of the factory that makes the base model, and its arguments; `input` describes what the
    model wants, `provenance` and `results` must be the same whenever the model is. `form="packed"` keeps only what
    the forward pass uses; `form="training"` keeps every latent number, so that training goes on exactly.

    What was written is read back and compared before it takes its place: every tensor, and, where `input` has `size`
    and a list `mean`, the logits of a batch of two, bit by bit. An older file survives any failure.

    Raises:
        CheckpointError: the model holds something that a checkpoint cannot say (the module is named).
        UserError: an argument is no plain JSON, or the file cannot be written.
    """
    path = Path(path)
    if form not in FORMS:
        raise UserError(f"`form` (={form!r}) must be one of {', '.join(FORMS)}.")
    require_folder(path)
    build = canonical_build(build)
    allow = [build[0].rpartition(".")[0]]
    model = _portable(model)
    grid = _drop_latent(model) if form == "packed" else {}
    parts = describe(model, _base(build, allow))
    skeleton = _skeleton(parts, build, allow, limit=2**62)
    state = state_of(model)
    _require_same_structure(model, skeleton, state)
    masks = known_by_zeros(state) if form == "packed" else {}
    stored = {name: slot for name, slot in state.items() if name not in masks}
    tensors, layout = pack_state(stored, state_of(skeleton), grid, form)
    content = {
        **{"format": FORMAT, "form": form, "build": list(build), **parts, **layout},
        **{"input": dict(input), "provenance": dict(provenance), "results": dict(results)},
    }
    data = seal(content, tensors)
    if decoded_bytes(state) > _limit(len(data)):
        tensors, layout = pack_state(stored, state_of(skeleton), {}, "training")
        data = seal({name: content[name] for name in content if name not in ("whole", "codecs")} | layout, tensors)
    _require_equal(model, _restore(*unseal(data), len(data), allow), input)
    write(path, data)
    return len(data)


def load(path: str | Path, *, allow: Sequence[str] = ()) -> nn.Module:
    """The model of a checkpoint, on the CPU and in evaluation mode, with the attribute `input` (a dict).

    A base model that compress does not provide is built by code from elsewhere; it is imported only where `allow`
    lists its module or a parent package, such as `allow=["torchvision.models"]`.

    Raises:
        CheckpointError: the file is not a checkpoint, truncated, altered, from a newer format, or needs `allow`.
    """
    if isinstance(allow, str):
        raise UserError(f"`allow` (={allow!r}) must be a list of module paths, such as [{allow!r}].")
    try:
        data = read_bytes(path)
        return _restore(*unseal(data), len(data), allow)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def read(path: str | Path) -> dict[str, Any]:
    """The blueprint of a checkpoint as plain JSON, after its digest was checked; nothing is built.

    Raises:
        CheckpointError: as `load` does.
    """
    try:
        return unseal(read_bytes(path))[0]
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _portable(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).cpu().eval()
    for module in model.modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"{type(module).__name__} has extra state that is no tensor; a checkpoint cannot say it."
            )
    for tensor in (*model.parameters(), *model.buffers()):
        if nn.parameter.is_lazy(tensor):
            raise CheckpointError("the model has a lazy parameter; run it once before it is saved.")
        tensor.requires_grad_(False)
        tensor.data = tensor.data.contiguous()
    return model


@torch.no_grad()
def _drop_latent(model: nn.Module) -> dict[str, Tensor]:
    """Put what forward uses in place of what it is computed from; weights on a grid by name, as their integers.

    Minus zeros become zeros. Masks become what the zeros say; a schedule of pruning ends where it has come to.
    """
    for module in model.modules():
        if is_ours(module) and hasattr(module, "settle"):
            module.settle()  # type: ignore[operator]  # a method, by the contract of our layers
    for parameter in model.parameters():
        if parameter.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            parameter.add_(0.0)
    grid = {}
    for path, chain in model.named_modules():
        if not isinstance(chain, ParametrizationList) or not chain.is_tensor:
            continue
        if hasattr(chain[0], "from_zeros"):
            chain.original.copy_(chain[0](chain.original))
        latent = chain.original.detach().clone()
        used = chain().detach() + 0.0
        last: Any = chain[-1]
        if hasattr(last, "integer_dtype"):
            integers = last.integers(used)
            if _settles(chain, last.values(integers, used.dtype), used):
                grid[plain_name(path)] = integers
                continue
        if not _settles(chain, used, used):
            chain.original.copy_(latent)
    for chain in model.modules():
        if isinstance(chain, ParametrizationList):
            take_from_zeros(chain)
    return grid


def _settles(chain: ParametrizationList, value: Tensor, used: Tensor) -> bool:
    if value.shape != chain.original.shape or value.dtype != chain.original.dtype:
        return False
    chain.original.copy_(value)
    return _same_bits(chain() + 0.0, used)


def _require_same_structure(model: nn.Module, skeleton: nn.Module, state: Mapping[str, Slot]) -> None:
    places = [
        {path: id(m) for path, m in net.named_modules(remove_duplicate=False) if m._parameters or m._buffers}
        for net in (model, skeleton)
    ]
    mine, theirs = _first_names(places[0]), _first_names(places[1])
    for path in mine:
        if path in theirs and mine[path] != theirs[path]:
            raise CheckpointError(f"`{path}` is shared between places in another way than in the base model.")
    fresh = state_of(skeleton)
    for name in [*state, *fresh]:
        if (name in state) != (name in fresh):
            has, lacks = ("the model", "its base") if name in state else ("its base", "the model")
            raise CheckpointError(f"`{name}` is a tensor of {has} but not of {lacks}; a checkpoint cannot say it.")
        shape, built = list(state[name].tensor.shape), list(fresh[name].tensor.shape)
        if shape != built:
            raise CheckpointError(f"`{name}` is {shape}, but the base and the layers' arguments give {built}.")
        if len(state[name].holders) != len(fresh[name].holders):
            raise CheckpointError(f"`{name}` is shared between modules in another way than in the base model.")


def _first_names(modules: Mapping[str, int]) -> dict[str, str]:
    first: dict[int, str] = {}
    return {path: first.setdefault(module, path) for path, module in modules.items()}


@torch.no_grad()
def _require_equal(model: nn.Module, reloaded: nn.Module, input: Mapping[str, Any]) -> None:
    again = state_of(reloaded)
    for name, slot in state_of(model).items():
        if not _same_bits(slot.tensor, again[name].tensor):
            raise CheckpointError(f"`{name}` does not come back as it was; please report this.")
    size, mean = input.get("size"), input.get("mean")
    if not isinstance(size, Sequence) or not isinstance(mean, Sequence):
        return
    shape = (2, len(mean), *size)
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    batch = batch.to(next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32))
    try:
        before = model(batch)
    except Exception as error:  # the user's network: it may raise anything
        raise UserError(f"the model cannot run on what `input` says, a batch of shape {shape}: {error}") from error
    if isinstance(before, Tensor) and not _same_bits(before, reloaded(batch)):
        raise CheckpointError(
            "the reloaded model computes other logits: the model has a setting that is neither a constructor argument "
            "nor a tensor of its state, so a checkpoint cannot say it."
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [t.detach().contiguous().reshape(-1) for t in (a, b)]
    return a.numel() == 0 or torch.equal(flat[0].view(torch.uint8), flat[1].view(torch.uint8))


def _restore(content: dict[str, Any], tensors: dict[str, Tensor], size: int, allow: Sequence[str]) -> nn.Module:
    try:
        build = canonical_build(content["build"])
    except UserError as error:
        raise CheckpointError(str(error)) from error
    model = _skeleton(content, build, allow, _limit(size))
    fill_state(state_of(model), content, tensors)
    model.eval()
    model.input = content["input"]
    return model


def _limit(file_bytes: int) -> int:
    """How many bytes of tensors a file of this size may declare: no codec wins more on a model worth keeping."""
    return 256 * file_bytes + 2**26


def _base(build: Build, allow: Sequence[str]) -> nn.Module:
    try:
        return build_base(build, allow, "meta")
    except CheckpointError:
        if foreign(build) is None:
            raise
        return build_base(build, allow, "cpu")


def _skeleton(parts: Parts, build: Build, allow: Sequence[str], limit: int) -> nn.Module:
    """The model without its tensors' values: on `meta`, or on the CPU where a tensor outside the state has values."""
    model = assemble(parts, _base(build, allow), "meta", limit)
    declared = decoded_bytes(state_of(model))
    if declared > limit:
        raise CheckpointError(f"the blueprint declares {declared:,} bytes of tensors, more than this file can fill.")
    if any(_values_outside_state(module) for module in model.modules()):
        base = build_base(build, allow, "cpu")
        model = assemble(parts, base, "cpu", limit)
    return model


def _values_outside_state(module: nn.Module) -> bool:
    buffers = any(module._buffers.get(name) is not None for name in module._non_persistent_buffers_set)
    return buffers or any(_has_tensor(v) for k, v in vars(module).items() if k not in ("_parameters", "_buffers"))


def _has_tensor(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Tensor):
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple | set) else ()
    return depth < 3 and any(_has_tensor(v, depth + 1) for v in inner)
