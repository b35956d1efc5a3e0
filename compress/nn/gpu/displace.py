"""Displacing channels on a GPU: each number is read where it lies, whatever the largest displacement.

Wu et al., "Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions", CVPR 2018, whose operator is this
one for whole pixels. Jeon & Kim, NeurIPS 2018, section 3.2, for the bilinear one and its derivatives.

Needs Triton, which comes with torch's builds for GPUs; see `available`. Tensors may lie in any memory order; channels
last is the fastest, by kernels that are compiled once for each size of map.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

POSITIONS = 64  # of the map, handled by one program
ROUNDS = 4  # blocks of positions that one program of the derivative's sum handles
TURNED_POSITIONS, TURNED_CHANNELS = 64, 16  # that a program which turns maps round handles at a time
TURNED_PROGRAMS = 256  # fewer of them leave a GPU idle: then each number is read where it lies


@cache
def available() -> bool:
    """Whether Triton is there."""
    return find_spec("triton") is not None


def move(x: Tensor, displacement: Tensor, stride: int, whole: bool) -> Tensor:
    """y[n, c, h, w] = x[n, c, stride * h + dy[c], stride * w + dx[c]], bilinear unless `whole`, zero outside.

    `x` (N, C, H, W) of any floating type, `displacement` (C, 2) float32 as (dy, dx), whole numbers with `whole`.
    """
    n, c, h, w = x.shape
    return _made("move", x, displacement, (n, c, -(-h // stride), -(-w // stride)), stride, whole)


def move_back(grad: Tensor, displacement: Tensor, shape: torch.Size, stride: int, whole: bool) -> Tensor:
    """The derivative of `move` after `x`, whose `shape` is given: its adjoint, applied to `grad`."""
    if stride == 1:
        return _made("move", grad, -displacement, tuple(shape), stride, whole)
    return _made("move_back", grad, displacement, tuple(shape), stride, whole)


def slopes(x: Tensor, displacement: Tensor, grad: Tensor, stride: int) -> Tensor:
    """The derivative of the bilinear `move` after the displacements, (C, 2): that of the cell to the right of a lattice
    point. Sums run in float32 and in one order, so that the same numbers come out each time."""
    n, c, h, w = grad.shape
    if _turns(x, grad):
        parts = torch.empty(n, c, 2, dtype=torch.float32, device=x.device)
        _turned("slopes", x, displacement, (grad, parts), stride, grad.shape)
        return parts.sum(0)
    positions = n * h * w
    programs = -(-positions // (POSITIONS * ROUNDS))
    parts = torch.empty(programs, c, 2, dtype=torch.float32, device=x.device)
    sizes = positions, c, h, w, x.shape[2], x.shape[3]
    block = _block(c)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # untyped in torch
        _kernels().slopes[programs, -(-c // block)](
            x, displacement, grad, parts, *sizes, *x.stride(), *grad.stride(), S=stride, P=POSITIONS, K=block, R=ROUNDS
        )
    return parts.sum(0)


def _made(kernel: str, x: Tensor, displacement: Tensor, shape: tuple[int, ...], stride: int, whole: bool) -> Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    if _turns(x, y):
        _turned("move", x, displacement, (y,), stride, y.shape, WHOLE=whole, BACK=kernel == "move_back")
        return y
    n, c, h, w = shape
    positions, block = n * h * w, _block(c)
    sizes = positions, c, h, w, x.shape[2], x.shape[3]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # untyped in torch
        getattr(_kernels(), kernel)[-(-positions // POSITIONS), -(-c // block)](
            x, displacement, y, *sizes, *x.stride(), *y.stride(), S=stride, P=POSITIONS, K=block, WHOLE=whole
        )
    return y


def _turns(*maps: Tensor) -> bool:
    """Whether maps are turned round first: where channels lie side by side, and there is enough to do."""
    last = all(x.is_contiguous(memory_format=torch.channels_last) for x in maps)
    return last and len(maps[0]) * -(-maps[0].shape[1] // TURNED_CHANNELS) >= TURNED_PROGRAMS


def _turned(
    name: str, x: Tensor, displacement: Tensor, others: tuple[Tensor, ...], stride: int, shape: torch.Size, **more: bool
) -> None:
    """Run the kernel that turns `x` round first; `others` are what it reads or writes besides, of a map's `shape`."""
    n, c, h, w = shape
    blocks = {"P": TURNED_POSITIONS, "K": TURNED_CHANNELS}
    sizes = c, h, w, x.shape[2], x.shape[3]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # untyped in torch
        getattr(_kernels(), f"{name}_turned")[n, -(-c // TURNED_CHANNELS)](
            x, torch.empty_like(x), displacement, *others, *sizes, S=stride, **blocks, **more
        )


def _block(channels: int) -> int:
    """How many channels one program handles: a power of two, as Triton wants it, that leaves few over."""
    return 64 if channels % 64 == 0 else min(32, 1 << (channels - 1).bit_length())


def _kernels() -> Any:
    from compress.nn.gpu import kernels  # imports Triton, which is not everywhere

    return kernels
