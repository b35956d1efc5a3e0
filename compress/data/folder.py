"""Image files, one folder for each class, under `train/` and `val/`: decoded in worker processes when they are needed.

The files of `val/` are the test split; our val is held out of `train/`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from compress.data.source import Augment, Source, at_most, check_limit, fingerprint, hold_out, share
from compress.errors import DataError

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")  # others of pillow's start programs
CHECKED = 2000  # files decoded (coarsely) at the start; of more, evenly spread ones


def folder(
    root: str | Path | None,
    seed: int = 0,
    size: int = 224,
    resize: int | None = None,
    val_fraction: float = 0.1,
    flip: bool = True,
    workers: int = 2,
    limit: int | None = None,
    classes: int | None = None,
    class_index: Mapping[str, int] | None = None,
) -> Source:
    """Images in `root/train/CLASS/` and `root/val/CLASS/`, as RGB of `size` x `size`.

    The shorter side becomes `resize` pixels (default: size / 0.875), then the middle is cut out. A class is numbered
    by its folder's place in the alphabet, or by `class_index` (folder -> number below `classes`), so that a few
    classes can be told apart by a network of many. `limit` bounds each split. Up to 2,000 files are decoded at once
    to find broken ones early; a broken one met later is named too.

    Raises:
        DataError: folders without images, fewer than two classes, files that cannot be decoded, or settings that
            make no sense.
    """
    check_limit(limit)
    for name, value, least in (("size", size, 1), ("resize", size if resize is None else resize, size)):
        if value < least:
            raise DataError(f"`{name}` (={value}) must be at least {least} pixels.")
    if workers < 0:
        raise DataError(f"`workers` (={workers}) must be at least 0 (0: decode in the main process).")
    root = _root(root)
    train_files, test_files = _files(root / "train"), _files(root / "val")
    names = sorted(train_files)
    if len(names) < 2:
        raise DataError(f"{root / 'train'} has one class only ({names[0]!r}); at least two are needed.")
    strangers = sorted(set(test_files) - set(names))
    if strangers:
        raise DataError(f"{root / 'val'} has the class {strangers[0]!r}, which train/ does not have.")
    numbers, total = _numbers(names, classes, class_index)
    every = ImageFiles.of(train_files, numbers, size, resize or round(size / 0.875), workers)
    tested = ImageFiles.of(test_files, numbers, size, resize or round(size / 0.875), workers)
    kept, held = hold_out(len(every), share("val_fraction", val_fraction, len(every)), seed)
    train, val = every[at_most(kept, limit, seed)], every[at_most(held, limit, seed)]
    test = tested[at_most(torch.arange(len(tested)), limit, seed=0)]
    _check([*train.paths, *val.paths, *test.paths])
    augment = Augment(pad=size // 8, flip=flip)
    return Source(
        name="folder",
        train=train,
        val=val,
        test=test,
        classes=total,
        input={
            "order": "rgb",
            "scale": 255.0,
            "mean": [0.485, 0.456, 0.406],  # ImageNet's, which most published networks for photographs expect
            "std": [0.229, 0.224, 0.225],
            "size": [size, size],
            "resize": every.resize,
            "crop": "center",
        },
        augment=augment,
        fingerprint=fingerprint(
            "folder", _stamps(root, every), _stamps(root, tested), numbers, total, val_fraction, seed, limit, augment
        ),
        class_names=tuple(names) if class_index is None and total == len(names) else (),
    )


def _root(root: str | Path | None) -> Path:
    path = Path(root).expanduser() if root else None
    if path is None or not path.is_dir():
        given = None if root is None else str(root)
        raise DataError(f"`root` (={given!r}) is not a folder; set `data.root` to the one that holds train/ and val/.")
    for split in ("train", "val"):
        if not (path / split).is_dir():
            raise DataError(f"`root` (={str(root)!r}) has no folder {split}/; it needs train/ and val/.")
    return path


def _files(top: Path) -> dict[str, list[str]]:
    """Image files by class folder, all sorted."""
    found = {}
    for entry in sorted(path for path in top.iterdir() if path.is_dir() and not path.name.startswith(".")):
        found[entry.name] = sorted(
            os.path.join(place, name)
            for place, _, names in os.walk(entry)
            for name in names
            if name.lower().endswith(ENDINGS) and not name.startswith(".")
        )
    if not any(found.values()):
        raise DataError(f"{top} holds no images; one folder for each class is needed, with files such as .jpg or .png.")
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise DataError(f"{top / empty[0]} holds no images; remove the folder or fill it.")
    return found


def _numbers(
    names: list[str], classes: int | None, class_index: Mapping[str, int] | None
) -> tuple[dict[str, int], int]:
    numbers = {name: place for place, name in enumerate(names)}
    if class_index is not None:
        absent = [name for name in names if name not in class_index]
        if absent:
            raise DataError(f"`class_index` has no number for the folder {absent[0]!r}.")
        numbers = {name: int(class_index[name]) for name in names}
        if classes is None:
            raise DataError("`class_index` needs `classes` beside it: how many classes the network tells apart.")
        if len(set(numbers.values())) < len(numbers):
            raise DataError(f"`class_index` gives two folders the same number: {numbers}.")
    total = len(names) if classes is None else classes
    for name, number in numbers.items():
        if not 0 <= number < total:
            raise DataError(f"`classes` (={total}) must be more than the number of every class; {name!r} has {number}.")
    return numbers, total


def _stamps(root: Path, images: ImageFiles) -> list[tuple[str, int, int]]:
    stats = [(path, os.stat(path)) for path in images.paths]
    return [(os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


@dataclass(frozen=True)
class ImageFiles:
    """Files with a class number each; (3, height, width) uint8 when read. `workers` processes decode, 0: none."""

    paths: tuple[str, ...]
    labels: Tensor
    size: tuple[int, int]
    resize: int
    workers: int

    @classmethod
    def of(
        cls, files: Mapping[str, list[str]], numbers: Mapping[str, int], size: int, resize: int, workers: int
    ) -> ImageFiles:
        pairs = [(path, numbers[name]) for name, paths in files.items() for path in paths]
        labels = torch.tensor([number for _, number in pairs], dtype=torch.int64)
        return cls(tuple(path for path, _ in pairs), labels, (size, size), resize, workers)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> ImageFiles:
        return replace(self, paths=tuple(self.paths[i] for i in indices.tolist()), labels=self.labels[indices])

    def batches(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        batches = [indices.tolist() for indices in order]
        loader: DataLoader[Any] = DataLoader(
            _Decoded(self),
            batch_sampler=batches,
            num_workers=min(self.workers, len(batches)),
            collate_fn=_stacked,
            generator=torch.Generator(),  # else the loader draws from, and so changes, the global random numbers
        )
        for indices, (pixels, problem) in zip(batches, loader, strict=True):
            if problem:
                raise DataError(problem)
            yield torch.from_numpy(pixels), self.labels[indices]

    def fitted(self, input: Mapping[str, Any]) -> ImageFiles:
        height, width = input["size"]
        return replace(self, size=(height, width), resize=input["resize"] or max(height, width))


@dataclass(frozen=True)
class _Decoded(Dataset[Any]):
    """The map-style data set that worker processes read. A broken file comes back as text: an exception that crosses
    processes loses its form."""

    files: ImageFiles

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray[Any, Any] | str:
        try:
            return decode(self.files.paths[index], self.files.size, self.files.resize)
        except DataError as error:
            return str(error)


def _stacked(items: list[np.ndarray[Any, Any] | str]) -> tuple[np.ndarray[Any, Any] | None, str]:
    # numpy, not tensors: tensors would travel through /dev/shm, which is 64 MB in many containers.
    broken = [item for item in items if isinstance(item, str)]
    return (None, broken[0]) if broken else (np.stack(items), "")


def decode(path: str, size: tuple[int, int], resize: int) -> np.ndarray[Any, Any]:
    """The file as RGB, its shorter side made `resize` pixels, the middle `size` cut out: (3, height, width) uint8.

    Raises:
        DataError: a file that cannot be decoded; it is named.
    """
    from PIL import Image  # in the process that decodes

    with _opened(path) as image:
        if image.mode.startswith(("I", "F")):
            raise DataError(f"{path} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits.")
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        image = image.convert("RGB")
        factor = resize / min(image.size)
        width, height = (max(round(side * factor), resize) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - size[1]) / 2), round((height - size[0]) / 2)
        image = image.crop((left, top, left + size[1], top + size[0]))
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _opened(path: str, coarse: bool = False) -> Any:
    from PIL import Image

    try:
        image = Image.open(path, formats=FORMATS)
        if coarse:
            image.draft("RGB", (8, 8))  # JPEG alone: decodes at an eighth of the size, reading the file to its end
        image.load()
    except Exception as error:  # pillow raises OSError, SyntaxError, ValueError, struct.error and others on bad files
        raise DataError(f"{path} cannot be decoded ({error}); remove or replace the file.") from error
    return image


def _check(paths: list[str]) -> None:
    step = max(1, -(-len(paths) // CHECKED))

    def problem(path: str) -> str:
        try:
            _opened(path, coarse=True).close()
        except DataError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        problems = [text for text in threads.map(problem, paths[::step]) if text]
    if problems:
        more = f" ({len(problems)} such files in all)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
