"""From a source of images to the batches of a `Task`: order, augmentation, normalisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.data.input import complete, normalise
from compress.data.source import Arrays, Augment, Images, Source, fingerprint, permutation
from compress.errors import ConfigError
from compress.task import PRECISIONS, Batch, Task

RESIDENT = 4 << 30  # bytes; training images up to this are kept in a GPU's memory
SMALL = 64  # pixels; up to this side, evaluation uses batches of at least EVALUATION_BATCH
EVALUATION_BATCH = 256


def make_task(
    source: Source,
    *,
    input: Mapping[str, Any] | None = None,
    batch_size: int = 128,
    calibration_images: int = 1024,
    device: str | torch.device = "cpu",
    precision: str = "bfloat16",
    seed: int = 0,
) -> Task:
    """What a model is for, with batches made from `source`.

    `input` lays the network's own description over that of the source, key by key. Training batches drop no image;
    a last batch of one is merged into the one before it, because batch norm cannot train on one image. Calibration
    images are `calibration_images` (or all, where there are fewer) of the training images, chosen by `seed`, without
    augmentation. Batches are on `device`. The task's fingerprint covers the source's, the input description, the
    batch size and the calibration images.

    Raises:
        ConfigError: an argument that makes no sense, or fewer than two training images.
    """
    problems = []
    if batch_size < 2:
        problems.append(f"`batch_size` (={batch_size}) must be at least 2; batch norm cannot train on one image.")
    if calibration_images < 2:
        problems.append(f"`calibration_images` (={calibration_images}) must be at least 2; 1024 is usual.")
    if precision not in PRECISIONS:
        problems.append(f"`precision` (={precision!r}) must be one of {', '.join(PRECISIONS)}.")
    if len(source.train) < 2:
        problems.append(f"{source.name} has {len(source.train)} training image(s); at least 2 are needed to train.")
    if problems:
        raise ConfigError("\n".join(problems))
    described = complete(source.input, input)
    where = torch.device(device)
    train = source.train.fitted(described)
    if where.type == "cuda" and isinstance(train, Arrays) and train.pixels.nbytes <= RESIDENT:
        train = train.on(where)
    large = batch_size if max(described["size"]) > SMALL else max(batch_size, EVALUATION_BATCH)
    chosen = permutation(len(train), seed)[:calibration_images]
    calibration = Prepared(Chosen(train, chosen), batch_size, described, where)
    return Task(
        train=Prepared(train, batch_size, described, where, source.augment),
        calibration=calibration,
        val=Prepared(source.val.fitted(described), large, described, where),
        test=Prepared(source.test.fitted(described), large, described, where),
        example=calibration.first(2),
        classes=source.classes,
        input=described,
        fingerprint=fingerprint(source.fingerprint, sorted(described.items()), batch_size, calibration_images, seed),
        name=source.name,
        device=where,
        precision=precision,
        seed=seed,
    )


@dataclass(frozen=True)
class Chosen:
    """Some of the images of a split, in the given order; nothing is copied."""

    source: Images
    indices: Tensor

    @property
    def labels(self) -> Tensor:
        return self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return self.source.batches(self.indices[part.to(self.indices.device)] for part in order)

    def fitted(self, input: Mapping[str, Any]) -> Chosen:
        return Chosen(self.source.fitted(input), self.indices)


@dataclass(frozen=True)
class Prepared:
    """The `Batches` of a task: normalised as `input` says, and augmented in `epoch` where `augment` is given."""

    source: Images
    batch_size: int
    input: Mapping[str, Any]
    device: torch.device
    augment: Augment | None = None

    @property
    def images(self) -> int:
        return len(self.source)

    def __len__(self) -> int:
        return len(parts(torch.arange(len(self.source)), self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        for pixels, labels in self.source.batches(parts(torch.arange(len(self.source)), self.batch_size)):
            yield normalise(pixels.to(self.device), self.input), labels.to(self.device)

    def epoch(self, seed: int) -> Iterator[Batch]:
        """Every image once, in the order and with the augmentation that belong to `seed`."""
        count = len(self.source)
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=random)
        pad = self.augment.pad if self.augment else 0
        offsets = torch.randint(0, 2 * pad + 1, (count, 2), generator=random)
        flips = torch.rand(count, generator=random) < (0.5 if self.augment and self.augment.flip else 0.0)
        if self.source.labels.device.type == self.device.type:  # then nothing has to wait for the CPU from here on
            order = order.to(self.device)
        offsets, flips = offsets.to(self.device), flips.to(self.device)
        start = 0
        for pixels, labels in self.source.batches(parts(order, self.batch_size)):
            mine = slice(start, start + len(labels))
            start += len(labels)
            x = pixels.to(self.device)
            if self.augment is not None:
                x = vary(x, offsets[mine], flips[mine], pad)
            yield normalise(x, self.input), labels.to(self.device)

    def first(self, count: int) -> Tensor:
        """The first `count` images in plain order, (count, C, H, W)."""
        pixels, _ = next(iter(self.source.batches([torch.arange(count)])))
        return normalise(pixels.to(self.device), self.input)


def parts(order: Tensor, size: int) -> list[Tensor]:
    """`order` cut into pieces of `size`; a last piece of one is merged into the piece before it."""
    pieces = list(torch.split(order, size))
    if len(pieces) > 1 and len(pieces[-1]) == 1:
        pieces[-2:] = [torch.cat(pieces[-2:])]
    return pieces


def vary(pixels: Tensor, offsets: Tensor, flips: Tensor, pad: int) -> Tensor:
    """Cut each image out of its black-padded self at its own offset, and mirror those in `flips`.

    `pixels` (N, C, H, W); `offsets` (N, 2) rows and columns, 0 to 2 * pad, where `pad` leaves the image in place;
    `flips` (N,) bool. One gather for the whole batch.
    """
    images, channels, height, width = pixels.shape
    padded = F.pad(pixels, (pad, pad, pad, pad))
    rows = offsets[:, :1] + torch.arange(height, device=pixels.device)
    columns = offsets[:, 1:] + torch.arange(width, device=pixels.device)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    places = rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]
    places = places.view(images, 1, height * width).expand(images, channels, height * width)
    return padded.view(images, channels, -1).gather(2, places).view(pixels.shape)
