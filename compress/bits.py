"""Tensors as patterns of bits: their words, the whole numbers among them, and codes of few bits side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import CheckpointError

Bytes = NDArray[np.uint8]

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_CHUNK = 1 << 20


def words_of(tensor: Tensor) -> NDArray[Any]:
    """The bit patterns of a tensor, flat, as unsigned integers of its element's size."""
    flat: NDArray[Any] = tensor.reshape(-1).view(torch.uint8).numpy().view(WORDS[tensor.element_size()])
    return flat


def little(words: NDArray[Any]) -> Bytes:
    """The bytes of words, the least significant first whatever the machine."""
    return words.astype(words.dtype.newbyteorder("<"), copy=False).view(np.uint8)


def words_from(little: Bytes, itemsize: int) -> NDArray[Any]:
    """What `little` gives the bytes of, in memory of its own."""
    return little.copy().view(np.dtype(WORDS[itemsize]).newbyteorder("<")).astype(WORDS[itemsize], copy=False)


def tensor_of(words: NDArray[Any], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor that has these bit patterns; any bit but those of 0 is a true one."""
    flat = torch.from_numpy(words.view(np.uint8).copy())
    return (flat.ne(0) if dtype == torch.bool else flat.view(dtype)).reshape(tuple(shape))


def small_integers(words: NDArray[Any], dtype: torch.dtype) -> NDArray[np.int16] | None:
    """The values where all of them are whole and fit 8 bits; None otherwise (minus zero has a sign to keep)."""
    if dtype.is_complex or len(words) == 0:
        return None
    if dtype in (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64):
        return words.astype(np.int16) if int(words.max()) <= 255 else None
    typed = torch.from_numpy(words.view(np.uint8)).view(dtype)
    if dtype.is_floating_point:
        values = typed.double()
        if not bool((values.isfinite() & (values.trunc() == values) & ~((values == 0) & values.signbit())).all()):
            return None
    else:
        values = typed
    low, high = values.min().item(), values.max().item()
    if low < -128 or high > (127 if low < 0 else 255):
        return None
    whole: NDArray[np.int16] = values.to(torch.int16).numpy()
    return whole


def words_of_integers(values: NDArray[np.int16], dtype: torch.dtype) -> NDArray[Any]:
    """The bit patterns that whole numbers have in this type.

    Raises:
        CheckpointError: the type cannot hold one of them.
    """
    if not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool and len(values):
        limits = torch.iinfo(dtype)
        if not limits.min <= int(values.min()) <= int(values.max()) <= limits.max:
            raise CheckpointError(f"has integers that {dtype} cannot hold")
    return words_of(torch.from_numpy(values).to(dtype))


def codebook(words: NDArray[Any], whole: NDArray[np.int16] | None) -> tuple[NDArray[Any], Bytes] | None:
    """The values in use and the index of each word; None where they are many, or whole numbers that lie close."""
    if len(words) == 0 or len(np.unique(words[:4096])) > 256:
        return None
    if whole is not None and 2 * np.count_nonzero(np.bincount(whole - whole.min())) > int(whole.max() - whole.min()):
        return None
    table, indices = np.unique(words, return_inverse=True)
    return (table, indices.astype(np.uint8)) if len(table) <= 256 else None


def width(whole: NDArray[np.int16]) -> tuple[int, bool]:
    """How many bits the numbers need, and whether one of them is a sign."""
    low, high = int(whole.min()), int(whole.max())
    if low >= 0:
        return max(1, high.bit_length()), False
    return max(high.bit_length(), (-low - 1).bit_length()) + 1, True


def gaps_of(between: NDArray[np.int64], bits: int) -> Bytes:
    """Numbers of zeros between positions as codes of `bits`; the largest code skips that many and is no position."""
    most = (1 << bits) - 1
    ends = np.cumsum(between // most + 1)
    codes = np.full(int(ends[-1]) if len(ends) else 0, most, np.uint8)
    codes[ends - 1] = between % most
    return codes


def positions_of(gaps: Bytes, bits: int, count: int) -> NDArray[np.int64]:
    """The positions, out of `count`, that gap codes of `bits` stand for.

    Raises:
        CheckpointError: one of them is beyond the end.
    """
    codes = gaps.astype(np.int64)
    holds = codes < (1 << bits) - 1
    where = (np.cumsum(codes + holds) - 1)[holds]
    if len(where) and int(where[-1]) >= count:
        raise CheckpointError("has a position beyond its end")
    return where


def pack_bits(codes: Bytes, bits: int) -> Bytes:
    """Codes of `bits` each, one after the other, the least significant bit first."""
    if bits == 8:
        return codes
    parts = []
    for start in range(0, len(codes), _CHUNK):
        rows = np.unpackbits(codes[start : start + _CHUNK, None], axis=1, bitorder="little")[:, :bits]
        parts.append(np.packbits(rows.reshape(-1), bitorder="little"))
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def unpack_bits(packed: Bytes, bits: int, count: int) -> Bytes:
    if bits == 8:
        return packed
    parts = []
    step = _CHUNK * bits // 8
    for start in range(0, len(packed), step):
        inside = min(_CHUNK, count - start * 8 // bits)
        rows = np.unpackbits(packed[start : start + step], count=inside * bits, bitorder="little").reshape(-1, bits)
        parts.append(np.packbits(rows, axis=1, bitorder="little")[:, 0])
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def bytes_for(count: int, bits: int) -> int:
    return (count * bits + 7) // 8
