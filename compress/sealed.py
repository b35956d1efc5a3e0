"""The file of a checkpoint: a safetensors file with JSON in its metadata, a SHA-256 over both, written whole or not.

Reading never raises anything but `CheckpointError`, whatever the bytes are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from compress.errors import CheckpointError, UserError

FORMAT = 1
FORMS = ("packed", "training")
KEY = "compress"  # of the JSON in the file's metadata
_FIELDS: dict[str, type] = {
    **{"format": int, "form": str, "build": list, "modules": list, "parametrizations": list, "quantizers": list},
    **{"dtypes": dict, "whole": list, "codecs": list, "input": dict, "provenance": dict, "results": dict},
}
_NEEDED = ("format", "form", "build", "input", "provenance", "results")


def seal(content: dict[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of the file; the same content gives the same bytes.

    Raises:
        UserError: the content is not plain JSON.
    """
    try:
        sealed = _json({**content, "sha256": _digest(_json(content), tensors)})
        same = json.loads(sealed) == {**content, "sha256": json.loads(sealed)["sha256"]}
    except (TypeError, ValueError) as error:
        raise UserError(f"`input`, `provenance` and `results` must be plain JSON: {error}.") from error
    if not same:
        raise UserError("`input`, `provenance` and `results` must be plain JSON: text keys, lists instead of tuples.")
    return tensor_bytes(dict(tensors), metadata={KEY: sealed})


def _json(content: Any) -> str:
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_folder(path: Path) -> None:
    """Raise `UserError` where no file of this name can be made."""
    if path.is_dir():
        raise UserError(f"`path` (={path}) is a folder; it must be the name of a file.")
    if not path.parent.is_dir():
        raise UserError(f"`path` (={path}) is in a folder that does not exist; make it first.")


def read_bytes(path: str | Path) -> bytes:
    """The file's content; only of a regular file, for reading a pipe or a device may never end."""
    try:
        data = Path(path).read_bytes() if Path(path).is_file() else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the file cannot be read: {error}.") from error
    if data is None:
        raise CheckpointError("there is no such file.")
    return data


def unseal(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checked blueprint and the stored tensors.

    Raises:
        CheckpointError: the bytes are not a whole, unaltered checkpoint of a format that is known.
    """
    try:
        tensors = read_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text = (header.get("__metadata__") or {}).get(KEY)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"not a safetensors file, or a truncated one ({error}).") from error
    if text is None:
        raise CheckpointError("a safetensors file, but not a checkpoint of compress: it has no blueprint.")
    try:
        content = json.loads(text)
        digest = content.pop("sha256")
        plain = _json({**content, "sha256": digest})
        holds = plain == text and digest == _digest(_json(content), tensors)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the blueprint is damaged ({type(error).__name__}: {error}).") from error
    version = content.get("format")
    if type(version) is int and version > FORMAT:
        raise CheckpointError(f"written in format {version}; this version of compress reads up to {FORMAT}: update it.")
    if not holds:
        raise CheckpointError("altered or damaged: its SHA-256 is not that of its content.")
    for name, value in content.items():
        if name not in _FIELDS or type(value) is not _FIELDS[name]:
            raise CheckpointError(f"the blueprint has an unknown or malformed field {name!r}.")
    missing = [name for name in _NEEDED if name not in content]
    if missing or version != FORMAT or content["form"] not in FORMS:
        raise CheckpointError(f"the blueprint lacks {missing}, or has an unknown format or form.")
    return content, tensors
