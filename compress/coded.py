"""A tensor as bytes that are entropy-coded and say themselves how to read them.

The first byte is the form: 0 for planes (the first byte of every value, then the second ...), 1 for integers, 2 for a
codebook; 4 more if only the values that are not zero are stored. What follows, with numbers in seven bits a byte, the
lowest first, the eighth saying that there are more:

* the number of stored values, the number of gap codes, and a stream of gap codes of 8 bits (only where zeros are left
  out; the largest gap code skips that many zeros and stands for no value);
* integers: the smallest plus 128; a codebook: its entries less one, and the entries;
* a stream of values less the smallest, or of indices, or one for each plane. Each stream (`entropy.py`) has its length
  in bytes before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.bits import (
    Bytes,
    codebook,
    gaps_of,
    little,
    positions_of,
    small_integers,
    words_from,
    words_of,
    words_of_integers,
)
from compress.entropy import decode, encode
from compress.errors import CheckpointError

_PLANES, _INTEGERS, _CODEBOOK, _SPARSE = 0, 1, 2, 4
_GAP_BITS = 8


def coded(tensor: Tensor) -> Iterator[Bytes]:
    """The forms of a tensor whose words have 1, 2, 4 or 8 bytes: dense, and sparse where that may be shorter."""
    words = words_of(tensor)
    yield from _forms(words, tensor.dtype, 0, [])
    (where,) = np.nonzero(words)
    if len(where) <= 0.9 * len(words):
        gaps = gaps_of(np.diff(where, prepend=-1) - 1, _GAP_BITS)
        places = [_number(len(where)), _number(len(gaps)), *_stream(gaps)]
        yield from _forms(words[where], tensor.dtype, _SPARSE, places)


def _forms(words: NDArray[Any], dtype: torch.dtype, sparse: int, places: list[Bytes]) -> Iterator[Bytes]:
    whole = small_integers(words, dtype)
    book = codebook(words, whole)
    if whole is not None:
        low = int(whole.min())
        yield _joined(_INTEGERS | sparse, *places, _number(low + 128), *_stream((whole - low).astype(np.uint8)))
    if book is not None:
        table, indices = book
        yield _joined(_CODEBOOK | sparse, *places, _number(len(table) - 1), little(table), *_stream(indices))
    if whole is None and book is None:
        planes = little(words).reshape(-1, words.itemsize).T
        yield _joined(_PLANES | sparse, *places, *(part for plane in planes for part in _stream(plane.copy())))


def decoded(data: Bytes, count: int, dtype: torch.dtype) -> NDArray[Any]:
    """The words of the tensor of `count` values that these bytes hold.

    Raises:
        CheckpointError: they hold no such tensor.
    """
    reader = _Reader(data)
    form = reader.number(_SPARSE | _CODEBOOK)
    kind, sparse = form & 3, bool(form & _SPARSE)
    if kind > _CODEBOOK:
        raise CheckpointError(f"has the form {form}, which is not known")
    stored = reader.number(count) if sparse else count
    where = None
    if sparse:
        where = positions_of(reader.symbols(reader.number(count)), _GAP_BITS, count)
        if len(where) != stored:
            raise CheckpointError(f"has {len(where)} positions for {stored} values")
    if kind == _INTEGERS:
        low = reader.number(383) - 128
        words = words_of_integers(reader.symbols(stored).astype(np.int16) + np.int16(low), dtype)
    elif kind == _CODEBOOK:
        entries = reader.number(255) + 1
        table = words_from(reader.take(entries * dtype.itemsize), dtype.itemsize)
        indices = reader.symbols(stored)
        if stored and int(indices.max()) >= entries:
            raise CheckpointError("has an index beyond the end of its codebook")
        words = table[indices]
    else:
        planes = [reader.symbols(stored) for _ in range(dtype.itemsize)]
        words = words_from(np.stack(planes, axis=1).reshape(-1), dtype.itemsize)
    reader.end()
    if where is None:
        return words
    full = np.zeros(count, words.dtype)
    full[where] = words
    return full


def _joined(form: int, *parts: Bytes) -> Bytes:
    return np.concatenate([_number(form), *parts])


def _stream(symbols: Bytes) -> tuple[Bytes, Bytes]:
    stream = encode(symbols)
    return _number(len(stream)), stream


def _number(value: int) -> Bytes:
    digits = [value & 127]
    while value := value >> 7:
        digits[-1] |= 128
        digits.append(value & 127)
    return np.array(digits, np.uint8)


class _Reader:
    """Bytes from first to last; whatever is not there, or too large, is a `CheckpointError`."""

    def __init__(self, data: Bytes) -> None:
        self.data, self.position = data, 0

    def take(self, size: int) -> Bytes:
        part = self.data[self.position : self.position + size]
        if len(part) != size:
            raise CheckpointError(f"ends {size - len(part)} bytes before its values do")
        self.position += size
        return part

    def number(self, most: int) -> int:
        value = 0
        for place in range(0, 63, 7):
            digit = int(self.take(1)[0])
            value |= (digit & 127) << place
            if digit < 128:
                break
        if digit >= 128 or value > most:
            raise CheckpointError(f"has the number {value} where at most {most} fits")
        return value

    def symbols(self, count: int) -> Bytes:
        return decode(self.take(self.number(len(self.data))), count)

    def end(self) -> None:
        if self.position != len(self.data):
            raise CheckpointError(f"has {len(self.data) - self.position} bytes more than its values need")
