"""MNIST and Fashion-MNIST: 60,000 + 10,000 grey images of 28x28 in ten classes, from IDX files, gzipped or not.

LeCun et al., "Gradient-Based Learning Applied to Document Recognition", Proc. IEEE 1998 (also the format);
Xiao et al., "Fashion-MNIST", arXiv 1708.07747.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from compress.data.fetch import fetch
from compress.data.source import Arrays, Augment, Source, arrays_source, fingerprint
from compress.errors import DataError

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_MD5 = dict(
    zip(
        FILES,
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
        strict=True,
    )
)
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MD5 = dict(
    zip(
        FILES,
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        strict=True,
    )
)
CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
LARGEST = 1 << 30  # bytes; the real ones have 47 MB


def mnist(
    root: str | Path, seed: int = 0, val_images: int = 5000, download: bool = True, limit: int | None = None
) -> Source:
    """MNIST from IDX files in `root/mnist`, `root/MNIST/raw`, `root/raw` or `root`, fetched into the first if absent.

    `seed` chooses which `val_images` are held out; `limit` bounds each split. Files that are there are checked by
    their headers and sizes, so any data of ten classes in this format will do.

    Raises:
        DataError: files that are absent and cannot be fetched, truncated, or not IDX.
    """
    folder = _folder(root, ("mnist", "MNIST/raw"), MNIST_URL, MNIST_MD5, download)
    settings = {"order": "gray", "scale": 255.0, "mean": [0.1307], "std": [0.3081]}
    return _source("mnist", folder, seed, val_images, limit, settings, Augment(pad=2, flip=False), tuple("0123456789"))


def fashion_mnist(
    root: str | Path, seed: int = 0, val_images: int = 5000, download: bool = True, limit: int | None = None
) -> Source:
    """Fashion-MNIST from IDX files in `root/fashion_mnist`, `root/FashionMNIST/raw`, `root/raw` or `root`.

    Otherwise as `mnist`.
    """
    folder = _folder(root, ("fashion_mnist", "FashionMNIST/raw"), FASHION_URL, FASHION_MD5, download)
    settings = {"order": "gray", "scale": 255.0, "mean": [0.2860], "std": [0.3530]}
    return _source("fashion_mnist", folder, seed, val_images, limit, settings, Augment(pad=2, flip=True), CLOTHES)


def _folder(root: str | Path | None, own: tuple[str, ...], url: str, md5s: Mapping[str, str], download: bool) -> Path:
    if not root:
        raise DataError("`root` is empty; set `data.root` to the folder that holds (or shall hold) the images.")
    root = Path(root).expanduser()
    candidates = [root / name for name in own] + [root / "raw", root]
    for folder in candidates:
        if all(_file(folder, name) for name in FILES):
            return folder
    for folder in candidates:
        absent = [name for name in FILES if not _file(folder, name)]
        if len(absent) < len(FILES) and not (download and folder == candidates[0]):
            raise DataError(f"{folder} lacks {', '.join(absent)} (each may end in .gz).")
    if not download:
        state = "holds no IDX files" if root.is_dir() else "does not exist"
        raise DataError(
            f"`root` (={str(root)!r}) {state}; it should hold {FILES[0]} and so on (each may end in .gz), in "
            f"{own[0]}/ or directly. Set `data.root`, or `data.download=true`."
        )
    for name in FILES:
        if not _file(candidates[0], name):
            fetch(f"{url}{name}.gz", md5s[name], candidates[0] / f"{name}.gz")
    return candidates[0]


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _source(
    name: str,
    folder: Path,
    seed: int,
    val_images: int,
    limit: int | None,
    settings: Mapping[str, object],
    augment: Augment,
    class_names: tuple[str, ...],
) -> Source:
    train, test = _split(folder, *FILES[:2]), _split(folder, *FILES[2:])
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        raise DataError(
            f"{folder} has training images of {list(train.pixels.shape[2:])} pixels, but test images of "
            f"{list(test.pixels.shape[2:])}; they must be alike."
        )
    contents = fingerprint(*(t.numpy().tobytes() for part in (train, test) for t in (part.pixels, part.labels)))
    return arrays_source(
        name,
        train,
        test,
        val_images=val_images,
        seed=seed,
        limit=limit,
        input=settings,
        augment=augment,
        contents=contents,
        class_names=class_names,
    )


def _split(folder: Path, images_name: str, labels_name: str) -> Arrays:
    images_path, labels_path = _file(folder, images_name), _file(folder, labels_name)
    assert images_path is not None and labels_path is not None, "the folder was chosen because it holds them"
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1).to(torch.int64)
    if len(images) != len(labels):
        raise DataError(
            f"{images_path} holds {len(images)} images, but {labels_path} holds {len(labels)} labels; the two do not "
            f"belong together."
        )
    if len(labels) == 0 or int(labels.max()) > 9:
        raise DataError(f"{labels_path} must hold labels from 0 to 9, and at least one.")
    return Arrays(images.unsqueeze(1), labels)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """The uint8 array of an IDX file (gzipped if its name ends in .gz): magic 0 0 8 dimensions, sizes, bytes.

    Raises:
        DataError: a file that is unreadable, truncated, too long, or of another kind.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes((0, 0, 8, dimensions)):
                raise DataError(
                    f"{path} starts with {header[:4].hex(' ') or 'nothing'}; an IDX file of {dimensions}-dimensional "
                    f"bytes starts with 00 00 08 {dimensions:02x}."
                )
            shape = [int.from_bytes(header[i : i + 4], "big") for i in range(4, len(header), 4)]
            size = math.prod(shape)
            if len(header) < 4 + 4 * dimensions or size > LARGEST:
                raise DataError(f"{path} has a broken header: it declares the sizes {shape}.")
            data = file.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); is it truncated?") from error
    if len(data) != size:
        relation = "truncated" if len(data) < size else "too long"
        raise DataError(f"{path} is {relation}: its header declares {size} bytes ({'x'.join(map(str, shape))}).")
    return (
        torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape)
        if size
        else torch.zeros(shape, dtype=torch.uint8)
    )
