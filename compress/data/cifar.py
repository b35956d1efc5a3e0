"""CIFAR-10: 50,000 + 10,000 images of 3x32x32 in ten classes, from the standard python pickles.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import pickle
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.data.fetch import CHUNK, fetch, md5_of
from compress.data.source import Arrays, Augment, Source, arrays_source, fingerprint
from compress.errors import DataError

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
TRAIN_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
TEST_MD5 = {"test_batch": "40351d587109b95175f43aff81a1287e"}
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LARGEST_FILE = 64 << 20  # bytes; the real ones have 31 MB


def cifar10(
    root: str | Path, seed: int = 0, val_images: int = 5000, download: bool = True, limit: int | None = None
) -> Source:
    """CIFAR-10 from `root/cifar-10-batches-py` (or `root` itself, being that folder).

    Where it is absent, `root/cifar-10-python.tar.gz` is unpacked, after fetching it if `download`. `seed` chooses
    which `val_images` of the 50,000 are held out; `limit` bounds each split.

    Raises:
        DataError: files that are absent and cannot be fetched, truncated or altered.
    """
    folder = _folder(root, download)
    train, test = _read(folder, TRAIN_MD5), _read(folder, TEST_MD5)
    return arrays_source(
        "cifar10",
        train,
        test,
        val_images=val_images,
        seed=seed,
        limit=limit,
        # Not the data's own statistics: the widely used pretrained CIFAR ResNets were trained with ImageNet's.
        input={"order": "rgb", "scale": 255.0, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        augment=Augment(pad=4, flip=True),
        contents=fingerprint(TRAIN_MD5, TEST_MD5),  # the files have just been checked against these
        class_names=CLASSES,
    )


def _folder(root: str | Path | None, download: bool) -> Path:
    if not root:
        raise DataError("`root` is empty; set `data.root` to the folder that holds (or shall hold) the images.")
    root = Path(root).expanduser()
    for folder in (root / FOLDER, root):
        if all((folder / name).is_file() for name in (*TRAIN_MD5, *TEST_MD5)):
            return folder
    if (root / FOLDER).is_dir():
        absent = [name for name in (*TRAIN_MD5, *TEST_MD5) if not (root / FOLDER / name).is_file()]
        raise DataError(f"{root / FOLDER} lacks {', '.join(absent)}; delete the folder to have it fetched again.")
    archive = root / ARCHIVE
    if not archive.is_file():
        if not download:
            state = "holds neither" if root.is_dir() else "does not exist; it should hold"
            raise DataError(
                f"`root` (={str(root)!r}) {state} {FOLDER}/ {'nor' if root.is_dir() else 'or'} {ARCHIVE}; set "
                f"`data.root` to the folder above {FOLDER}, or `data.download=true`."
            )
        fetch(URL, ARCHIVE_MD5, archive)
    unpack(archive, root / FOLDER)
    return root / FOLDER


def unpack(archive: Path, folder: Path) -> None:
    """Take the known files out of the checked archive; `folder` appears when it is complete.

    Raises:
        DataError: a wrong checksum, a broken archive, or one that lacks a file.
    """
    digest = hashlib.md5(usedforsecurity=False)
    with archive.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != ARCHIVE_MD5:
        raise DataError(
            f"{archive} has MD5 {digest.hexdigest()}, not {ARCHIVE_MD5}: it is truncated or altered; delete it to "
            f"have it fetched again."
        )
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name in (*TRAIN_MD5, *TEST_MD5):
                member = tar.getmember(f"{FOLDER}/{name}")  # by name, so no path from the archive is ever used
                content = tar.extractfile(member) if member.isreg() and member.size <= LARGEST_FILE else None
                if content is None:
                    raise DataError(f"{archive} holds something other than a plain file as {FOLDER}/{name}.")
                (partial / name).write_bytes(content.read())
        partial.chmod(0o755)  # a temporary folder is private
        partial.rename(folder)
    except (KeyError, EOFError, tarfile.TarError, OSError) as error:
        raise DataError(f"{archive} could not be unpacked into {folder} ({error}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(folder: Path, files: dict[str, str]) -> Arrays:
    pixels, labels = [], []
    for name, md5 in files.items():
        data = (folder / name).read_bytes() if (folder / name).stat().st_size <= LARGEST_FILE else b""
        if md5_of(data) != md5:
            raise DataError(
                f"{folder / name} has MD5 {md5_of(data)}, not {md5}: it is truncated or altered; delete {folder} to "
                f"have it fetched again."
            )
        images, numbers = batch(data, str(folder / name))
        pixels.append(torch.from_numpy(images))
        labels.append(torch.tensor(numbers, dtype=torch.int64))
    return Arrays(torch.cat(pixels).view(-1, 3, 32, 32), torch.cat(labels))


def batch(data: bytes, name: str) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Pixels (N, 3072) uint8 and labels of one pickled batch.

    Raises:
        DataError: a truncated pickle, one that holds anything but arrays and plain values, or another content.
    """
    content = unpickle(data, name)
    pixels = content.get(b"data") if isinstance(content, dict) else None
    labels = content.get(b"labels") if isinstance(content, dict) else None
    if not (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and pixels.ndim == 2
        and pixels.shape[1] == 3072
        and isinstance(labels, list)
        and len(labels) == len(pixels)
        and all(isinstance(label, int) and 0 <= label < len(CLASSES) for label in labels)
    ):
        raise DataError(
            f"{name} is not a CIFAR-10 batch: it must hold `data` (N x 3072 bytes) and N `labels` (0 to 9)."
        )
    return pixels, labels


def unpickle(data: bytes, name: str) -> Any:
    """What a pickle holds, if that is numpy arrays, lists, dicts, bytes, text and numbers; nothing in it can run.

    Raises:
        DataError: a truncated pickle, or one that asks for anything else.
    """
    try:
        return _ArraysOnly(io.BytesIO(data), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{name} {error}") from None
    except Exception as error:  # whatever bytes can make of an unpickler: it raises a dozen different kinds
        raise DataError(f"{name} is a truncated or broken pickle ({type(error).__name__}: {error}).") from error


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise DataError(
                f"is a pickle that asks for {module}.{name}; only arrays, lists, dicts, bytes, text and numbers are "
                f"read. It is not a CIFAR-10 file, and may be hostile."
            ) from None


def _dtype(kind: Any, align: Any = False, copy: Any = False) -> np.dtype[Any]:
    # Old pickles give 0 and 1 for the two flags, about which numpy >= 2.4 warns.
    plain: np.dtype[Any] = np.dtype(kind, align=bool(align), copy=bool(copy))
    return plain


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # wherever this numpy keeps it
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): codecs.encode,
}
