"""Weights from a file into a base model: everything fits, or nothing is changed and the message says what does not."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.data.input import NORMALIZATION
from compress.errors import CheckpointError, DataError
from compress.sealed import KEY

ENDINGS = (".th", ".pt", ".pth", ".safetensors")
WRAPPERS = ("state_dict", "model")
MOST = 10  # names shown of each kind
COMPACT = (",", ":")  # in JSON, so that a setting is one word of a command line


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put the tensors of a `.th`, `.pt`, `.pth` or `.safetensors` file, or of a checkpoint of ours, into `model`.

    `{"state_dict": ...}` and `{"model": ...}` are opened, a `module.` before every name is stripped. Numbers are cast
    to the model's own types. Batch norm's `num_batches_tracked` may be missing, as in old files. A model with a method
    `translate(tensors)` is asked for the names of its published files.

    Raises:
        DataError: a file that is absent, truncated, or holds code; names or shapes that differ from the model's;
            values that are not finite.
    """
    given, own = read_weights(path), model.state_dict()
    if given and all(name.startswith("module.") for name in given) and not all(n.startswith("module.") for n in own):
        given = {name.removeprefix("module."): tensor for name, tensor in given.items()}
    if hasattr(model, "translate") and not given.keys() <= own.keys():
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


def other_input(path: str | Path, given: Mapping[str, Any]) -> list[str]:
    """What is wrong with giving the input `given` to weights of this file, which may say what they want; as sentences.

    Only a checkpoint of ours says it.
    """
    from compress import checkpoint

    path = Path(path)
    wanted = checkpoint.read(path)["input"] if path.suffix == ".safetensors" and _is_checkpoint(path) else {}
    other = [key for key in NORMALIZATION if key in wanted and wanted[key] != given.get(key)]
    if not other:
        return []
    change = " ".join(f"model.input.{key}={json.dumps(wanted[key], separators=COMPACT)}" for key in other)
    return [f"`model.weights` (={str(path)!r}) want another input than they get here; set {change}."]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The named tensors of a file, on the CPU, names as they are in it. No code of the file is run.

    Of a checkpoint of ours they are what `load(path).state_dict()` has.

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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from compress import checkpoint  # which imports the models

    try:
        return checkpoint.load(path).state_dict() if _is_checkpoint(path) else load_file(path)
    except CheckpointError as error:
        raise DataError(
            f"`weights` cannot be taken from a checkpoint: {error} A file with its `state_dict()` alone will do."
        ) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _is_checkpoint(path: Path) -> bool:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return KEY in (file.metadata() or {})


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
