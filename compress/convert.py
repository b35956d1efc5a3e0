"""`python -m compress.convert CHECKPOINT --to onnx pt2`: write a checkpoint's model in other formats, at any time.

Needs neither the recipe nor the data that made the checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import checkpoint
from compress.errors import UserError
from compress.lower import EXPORTS, SUFFIXES, write_file
from compress.lower.forms import FORMS
from compress.measure import RUNTIMES, require_runtime

BAD_INPUT = 2
IMAGES = 7  # of noise, that files are compared on


def convert(
    path: str | Path,
    formats: Sequence[str],
    out: str | Path | None = None,
    *,
    allow: Sequence[str] = (),
    target: str = "onnxruntime",
    forms: str = "default",
    normalize: bool = False,
) -> list[dict[str, Any]]:
    """Write the model of the checkpoint `path` as each of `formats` ("onnx", "pt2", "pt2_x86") into the folder `out`.

    Files are named after the checkpoint, in its folder unless `out` is given; files of these names are replaced.
    `allow` is as in `compress.load`. `target` is the runtime that the files are for; with `forms="measured"` layers
    that have several equal forms take the one that is fastest there, on this machine, and so does the network where
    channels can be filled up with zeros. With `normalize` the ONNX file takes raw numbers and normalises them itself.

    Returns:
        for each format what its exporter says: {"file", "bytes", "parity", ...}, the parity on noise.

    Raises:
        UserError: an argument that makes no sense, or a model that the format does not hold.
        CheckpointError: the file is no checkpoint that can be loaded.
    """
    path = Path(path)
    for name, value, known in (("target", target, RUNTIMES), ("forms", forms, FORMS)):
        if value not in known:
            raise UserError(f"`{name}` (={value!r}) must be one of {', '.join(known)}.")
    unknown = [kind for kind in formats if kind not in EXPORTS]
    if unknown or not formats:
        raise UserError(f"`formats` (={list(formats)}) must be some of {', '.join(EXPORTS)}.")
    if normalize and "onnx" not in formats:
        raise UserError("`normalize` is for onnx, which is not among the formats; add it, or leave `normalize` out.")
    if forms == "measured":
        _require_measurable(formats, target)
    model = checkpoint.load(path, allow=allow)
    described: Any = model.input
    folder = path.parent if out is None else Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"`out` (={folder}) cannot be made: {error.strerror}; choose another folder.") from error
    example = _noise(described, path)
    return [
        write_file(
            model,
            example,
            folder / (path.stem + EXPORTS[kind]),
            input=described,
            target=target,
            forms=forms,
            normalize=normalize and kind == "onnx",
        )
        for kind in formats
    ]


def _require_measurable(formats: Sequence[str], target: str) -> None:
    require_runtime(target)
    ending = SUFFIXES.get(target, ".pt2")
    those = [kind for kind, suffix in EXPORTS.items() if suffix.endswith(ending)]
    if not set(those) & set(formats):
        raise UserError(
            f"`forms` (='measured') is measured in `target` (={target!r}) on its own files, {' or '.join(those)}, but "
            f"the formats are {', '.join(formats)}; take another `target`, add one of its formats, or forms='default'."
        )


def _noise(described: Mapping[str, Any], path: Path) -> Tensor:
    """Images such as the model takes, normalised."""
    size, mean = described.get("size"), described.get("mean")
    if not isinstance(size, Sequence) or not isinstance(mean, Sequence):
        raise UserError(f"{path} does not say how large its model's input is, so it cannot be exported from there.")
    return torch.randn((IMAGES, len(mean), *size), generator=torch.Generator().manual_seed(0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; gives back the exit code."""
    parser = argparse.ArgumentParser("python -m compress.convert", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="a model.safetensors that compress wrote")
    parser.add_argument(
        "--to", nargs="+", required=True, choices=list(EXPORTS), metavar="FORMAT", help=", ".join(EXPORTS)
    )
    parser.add_argument("--out", help="the folder to write into; default: that of the checkpoint")
    parser.add_argument("--allow", nargs="*", default=[], help="modules that may build a base which is not compress's")
    parser.add_argument("--target", default="onnxruntime", help=", ".join(RUNTIMES))
    parser.add_argument("--forms", default="default", help="; ".join(FORMS))
    parser.add_argument("--normalize", action="store_true", help="the ONNX file normalises raw numbers itself")
    given = parser.parse_args(arguments)
    try:
        written = convert(
            given.checkpoint,
            given.to,
            given.out,
            allow=given.allow,
            target=given.target,
            forms=given.forms,
            normalize=given.normalize,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    for file in written:
        worst = min(row["top1_agreement"] for row in file["parity"])
        print(f"{file['file']}: {file['bytes']:,} bytes; on noise the same answers as in torch: {100 * worst:.4g} %")
        for layer, why in file.get("float_layers", {}).items():
            print(f"  {layer} computes in float: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
