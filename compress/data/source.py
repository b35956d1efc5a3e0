"""A data set as everything else sees it: three splits of unnormalised images, and what a network wants of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.errors import ConfigError, DataError


class Images(Protocol):
    """Images of one split, as uint8 NCHW in RGB (or one grey channel), with int64 class numbers."""

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def batches(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """One batch for every index tensor of `order`, in that order."""
        ...

    def fitted(self, input: Mapping[str, Any]) -> Images:
        """The same images in the `size` (with `resize` and `crop`) of an input description.

        Raises:
            ConfigError: they cannot be had in that size.
        """
        ...


@dataclass(frozen=True)
class Augment:
    """How training images are varied: shifted by up to `pad` pixels (black comes in), mirrored with probability 1/2."""

    pad: int
    flip: bool


@dataclass(frozen=True)
class Source:
    """A data set in three splits; decisions see `val` only, the report shows `test`.

    `input` describes what a network gets unless it says otherwise: {order: rgb | bgr | gray, scale, mean, std,
    size: [H, W], resize, crop}; a pixel becomes (pixel / scale - mean) / std. `fingerprint` stands for the contents,
    the split and the augmentation.
    """

    name: str
    train: Images
    val: Images
    test: Images
    classes: int
    input: Mapping[str, Any]
    augment: Augment
    fingerprint: str
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arrays:
    """Images that fit in memory: `pixels` (N, C, H, W) uint8, `labels` (N,) int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> Arrays:
        return Arrays(self.pixels.index_select(0, indices), self.labels[indices])

    def on(self, device: torch.device) -> Arrays:
        """The same images in the memory of `device`."""
        return Arrays(self.pixels.to(device), self.labels.to(device))

    def batches(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in order:
            indices = indices.to(self.labels.device)
            yield self.pixels.index_select(0, indices), self.labels[indices]

    def fitted(self, input: Mapping[str, Any]) -> Arrays:
        size = list(self.pixels.shape[2:])
        if list(input["size"]) != size or input["resize"] is not None or input["crop"] is not None:
            raise ConfigError(
                f"`input` asks for size={list(input['size'])}, resize={input['resize']}, crop={input['crop']}, but "
                f"these images are {size[0]}x{size[1]} and are used as they are; leave out the "
                f"three keys, or use a data set of image files (`data=folder`)."
            )
        return self


def permutation(count: int, seed: int) -> Tensor:
    """The numbers below `count` in an order that follows from `seed` alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def hold_out(count: int, val_images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the train and the val images, each ascending; which ones are held out follows from `seed`.

    Raises:
        DataError: `val_images` leaves nothing to train on, or is less than 1.
    """
    if not 1 <= val_images < count:
        raise DataError(
            f"`val_images` (={val_images}) must be at least 1 and less than the {count} training images it is taken "
            f"from; make it smaller."
        )
    order = permutation(count, seed)
    return order[val_images:].sort().values, order[:val_images].sort().values


def share(name: str, fraction: float, count: int) -> int:
    """How many of `count` images a fraction is: at least one, never all.

    Raises:
        DataError: `fraction` is not between 0 and 1, both excluded.
    """
    if not 0 < fraction < 1:
        raise DataError(f"`{name}` (={fraction}) must lie between 0 and 1, both excluded; for a tenth, say 0.1.")
    return min(max(round(fraction * count), 1), count - 1)


def at_most(indices: Tensor, limit: int | None, seed: int) -> Tensor:
    """The indices, or `limit` of them chosen by `seed`, ascending."""
    if limit is None or limit >= len(indices):
        return indices
    return indices[permutation(len(indices), seed)[:limit].sort().values]


def check_limit(limit: int | None) -> None:
    """Raise `DataError` for a `limit` that leaves nothing."""
    if limit is not None and limit < 1:
        raise DataError(f"`limit` (={limit}) must be at least 1; leave it out (null) to use all images.")


def fingerprint(*parts: object) -> str:
    """A short text that stands for all parts: the same parts give the same text, other parts another."""
    digest = hashlib.sha256()
    for part in parts:
        data = bytes(part) if isinstance(part, bytes | memoryview) else repr(part).encode()
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()[:32]


def arrays_source(
    name: str,
    train: Arrays,
    test: Arrays,
    *,
    val_images: int,
    seed: int,
    limit: int | None,
    input: Mapping[str, Any],
    augment: Augment,
    contents: str,
    class_names: tuple[str, ...],
) -> Source:
    """A source of arrays: val is held out of `train` by `seed`; `limit` bounds each of the three splits.

    The limited test images are the same for every seed, so that runs can be compared.
    """
    check_limit(limit)
    kept, held = hold_out(len(train), val_images, seed)
    kept, held = at_most(kept, limit, seed), at_most(held, limit, seed)
    tested = at_most(torch.arange(len(test)), limit, seed=0)
    size = list(train.pixels.shape[2:])
    return Source(
        name=name,
        train=train[kept],
        val=train[held],
        test=test[tested] if len(tested) < len(test) else test,
        classes=len(class_names),
        input={**input, "size": size, "resize": None, "crop": None},
        augment=augment,
        fingerprint=fingerprint(name, contents, val_images, seed, limit, augment),
        class_names=class_names,
    )
