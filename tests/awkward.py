"""The layers that conversions get wrong: every stage has to change them rightly, or keep them with a reason."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compress.task import Task


class Twice(nn.Module):
    """One convolution, used two times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.conv(x).relu())
        return out


def _around(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), layer, nn.ReLU())


AWKWARD: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: _around(nn.Conv2d(8, 12, 3, padding=1)),
    "stride 2": lambda: _around(nn.Conv2d(8, 12, 3, stride=2, padding=1)),
    "stride (2, 1)": lambda: _around(nn.Conv2d(8, 12, 3, stride=(2, 1), padding=1)),
    "padding (1, 0)": lambda: _around(nn.Conv2d(8, 12, 3, padding=(1, 0))),
    "padding same": lambda: _around(nn.Conv2d(8, 12, (3, 5), padding="same")),
    "padding same, even kernel": lambda: _around(nn.Conv2d(8, 12, (4, 2), padding="same")),
    "dilation 2": lambda: _around(nn.Conv2d(8, 12, 3, padding=2, dilation=2)),
    "groups 2": lambda: _around(nn.Conv2d(8, 12, 3, padding=1, groups=2)),
    "depthwise": lambda: _around(nn.Conv2d(8, 8, 3, padding=1, groups=8)),
    "depthwise, multiplier 2": lambda: _around(nn.Conv2d(8, 16, 3, padding=1, groups=8)),
    "1x1": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 12, 1)),
    "1x1, stride 2": lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 12, 1, stride=2)),
    "5x5": lambda: _around(nn.Conv2d(8, 12, 5, padding=2)),
    "1x3": lambda: _around(nn.Conv2d(8, 12, (1, 3), padding=(0, 1))),
    "2x2, stride 2": lambda: _around(nn.Conv2d(8, 12, 2, stride=2)),
    "no bias": lambda: _around(nn.Conv2d(8, 12, 3, padding=1, bias=False)),
    "reflect padding": lambda: _around(nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect")),
    "circular padding (2, 1)": lambda: _around(nn.Conv2d(8, 12, (5, 3), padding=(2, 1), padding_mode="circular")),
    "padding same, reflected": lambda: _around(nn.Conv2d(8, 12, (3, 4), padding="same", padding_mode="reflect")),
    "used twice": Twice,
    "at the root": lambda: nn.Conv2d(8, 12, 3, padding=1),
}
SHAPE = (8, 9, 11)


class Noise:
    """Batches of random images, the same ones in every epoch.

    `apart` brightens a channel of its own for every class but the last: training can tell them apart then.
    """

    def __init__(self, images: int = 32, shape: tuple[int, ...] = SHAPE, classes: int = 3, apart: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(images, *shape, generator=generator)
        self.y = torch.randint(0, classes, (images,), generator=generator)
        self.x += apart * torch.eye(classes, shape[0])[self.y].view(images, shape[0], 1, 1)

    @property
    def images(self) -> int:
        return len(self.x)

    def __len__(self) -> int:
        return -(-len(self.x) // 16)

    def __iter__(self):  # type: ignore[no-untyped-def]  # tests
        return iter(zip(self.x.split(16), self.y.split(16), strict=True))

    def epoch(self, seed: int):  # type: ignore[no-untyped-def]
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
        return iter(zip(self.x[order].split(16), self.y[order].split(16), strict=True))


def noise_task(shape: tuple[int, ...] = SHAPE, classes: int = 3, images: int = 32, apart: float = 0.0) -> Task:
    """A task on random images: enough for what does not depend on their meaning."""
    batches = Noise(images, shape, classes, apart)
    described = {"order": "rgb", "scale": 1.0, "mean": [0.0] * shape[0], "std": [1.0] * shape[0], "size": shape[1:]}
    described |= {"size": list(shape[1:]), "resize": None, "crop": None}
    return Task(
        train=batches,
        calibration=batches,
        val=batches,
        test=batches,
        example=batches.x[:2],
        classes=classes,
        input=described,
        fingerprint=f"noise {apart}",
        precision="float32",
    )
