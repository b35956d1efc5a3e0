"""Weights from a file into a base model: everything fits, or nothing is changed and the message says what does not."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from compress import checkpoint
from compress.data.input import NORMALIZATION
from compress.errors import CheckpointError, DataError
from compress.sealed import KEY
from compress.surgery import kind

ENDINGS = (".th", ".pt", ".pth", ".safetensors")
WRAPPERS = ("state_dict", "model")
MOST = 10  # names shown of each kind
COMPACT = (",", ":")  # in JSON, so that a setting is one word of a command line


def load_weights(
    model: nn.Module, path: str | Path, *, allow: Sequence[str] = (), input: Mapping[str, Any] | None = None
) -> None:
    """Put the tensors of a `.th`, `.pt`, `.pth` or `.safetensors` file into `model`.

    `{"state_dict": ...}` and `{"model": ...}` are opened, a `module.` before every name is stripped. Numbers are cast
    to the model's own types. Batch norm's `num_batches_tracked` may be missing, as in old files. A model with a method
    `translate(tensors)` is asked for the names of its published files. A checkpoint of ours has to hold the same
    network; `allow` is as in `compress.load`, and `input` what the network is going to get.

    Raises:
        DataError: a file that is absent, truncated, or holds code; names or shapes that differ from the model's;
            values that are not finite; a checkpoint of another network, or of one that wants another input.
    """
    source = _checkpoint(Path(path), allow)
    if source is not None:
        _require_same(model, source, path)
        _require_input(source.input, input or {}, path)  # type: ignore[arg-type]  # a dict
    given, own = read_weights(path) if source is None else source.state_dict(), model.state_dict()
    if given and all(name.startswith("module.") for name in given) and not all(n.startswith("module.") for n in own):
        given = {name.removeprefix("module."): tensor for name, tensor in given.items()}
    if hasattr(model, "translate"):
        given = model.translate(given)  # type: ignore[operator]  # nn.Module attributes are untyped
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in given and name not in counters]
    unexpected = [name for name in given if name not in own]
    shapes = [
        f"{name} is {_shape(tensor)} in the file, {_shape(own[name])} in the model"
        for name, tensor in given.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        parts = (("missing", missing), ("unexpected", unexpected), ("other shapes", shapes))
        listed = "; ".join(f"{title}: {_some(names)}" for title, names in parts if names)
        raise DataError(f"`weights` (={str(path)!r}) do not fit {type(model).__name__}: {listed}.")
    broken = [name for name, t in given.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if broken:
        raise DataError(f"`weights` (={str(path)!r}) hold NaN or infinity in {_some(broken)}.")
    model.load_state_dict({**{name: own[name] for name in counters}, **given})


def _checkpoint(path: Path, allow: Sequence[str]) -> nn.Module | None:
    """The network of a checkpoint of ours; None where the file is none, or no file that can be read."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            ours = KEY in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):  # `read_weights` says what is wrong with it
        return None
    try:
        return checkpoint.load(path, allow=allow) if ours else None
    except CheckpointError as error:
        raise DataError(f"`weights` cannot be taken from {error}") from error


def _require_same(model: nn.Module, source: nn.Module, path: str | Path) -> None:
    mine, theirs = ({name: kind(module).__name__ for name, module in each.named_modules()} for each in (model, source))
    other = next((name for name in (*mine, *theirs) if mine.get(name) != theirs.get(name)), None)
    if other is not None:
        there, here = (found.get(other, "absent") for found in (theirs, mine))
        raise DataError(
            f"`weights` (={str(path)!r}) are those of another network, or of a compressed one: "
            f"{other or 'the whole'} is {there} there and {here} here. Of a run give `base.safetensors`."
        )


def _require_input(wanted: Mapping[str, Any], given: Mapping[str, Any], path: str | Path) -> None:
    other = [key for key in NORMALIZATION if key in given and wanted.get(key, given[key]) != given[key]]
    if other:
        change = " ".join(f"model.input.{key}={json.dumps(wanted[key], separators=COMPACT)}" for key in other)
        raise DataError(f"`weights` (={str(path)!r}) want another input than they get here; set {change}.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a file, on the CPU, names as they are in it. No code of the file is run.

    Raises:
        DataError: a file that is absent, of another kind, truncated, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"`weights` (={str(path)!r}) {state}; give a file ending in {', '.join(ENDINGS)}.")
    if path.suffix not in ENDINGS:
        raise DataError(f"`weights` (={str(path)!r}) must end in one of {', '.join(ENDINGS)}.")
    content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise DataError(f"`weights` (={str(path)!r}) hold a {type(content).__name__}, not a dict of named tensors.")
    others = [str(name) for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others or not content:
        found = f"other things than tensors: {_some(others)}" if others else "nothing"
        raise DataError(f"`weights` (={str(path)!r}) must hold a dict of named tensors, but hold {found}.")
    return dict(content)


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(2)
    if start and start != b"PK" and start[:1] != b"\x80":  # a zip archive, or the pickle of old files
        raise DataError(f"`weights` (={str(path)!r}) cannot be read: it is no file that `torch.save` wrote.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files come with warnings about how they were written
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "Unsupported" in str(error):
            raise DataError(
                f"`weights` (={str(path)!r}) hold code or objects beside tensors, which is not loaded because it could "
                f"do anything; save `model.state_dict()` alone, or use .safetensors."
            ) from error
        raise _unreadable(path, error) from error
    except Exception as error:  # whatever bytes can make of torch.load: it raises a dozen different kinds
        raise _unreadable(path, error) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    text = (str(error).splitlines() or [""])[0]
    return DataError(
        f"`weights` (={str(path)!r}) cannot be read; truncated or not weights? ({text or type(error).__name__})"
    )


def _shape(tensor: Tensor) -> str:
    return "x".join(str(side) for side in tensor.shape) or "a single number"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:MOST]) + (f", ... ({len(names)} in all)" if len(names) > MOST else "")
