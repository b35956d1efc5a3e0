"""Symbols of at most 8 bits as bytes, about as many as their entropy says.

A stream is: the number of levels less one; the number of symbols that are coded as one, plus 16 x the width of a bin;
the table; the states of the lanes (uint32); words (uint16). All numbers are little-endian, all arithmetic is in whole
numbers. Neighbours are joined to one symbol where that is shorter, the first in the lowest place. The table has a
weight, a small float, for each bin of 2^width joined symbols. Lanes take turns: symbol i belongs to lane i mod lanes,
and the last few symbols of each lane stand in what its state has left over, as digits.

The coder is our own, not a library's: files must be readable for as long as their format is, so the stream is defined
by this page and needs numpy alone, where the lanes decode in lock-step at tens of millions of symbols a second.

Duda, "Asymmetric numeral systems", arXiv:1311.2540; Giesen, "Interleaved entropy coders", arXiv:1402.3392.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import CheckpointError

Bytes = NDArray[np.uint8]
Whole = NDArray[np.int64]

_PRECISION = 14
_LOW = 1 << 16
_LANES, _PER_LANE = 4096, 1024
_CHUNK = 1 << 20
_RAW = np.array([255, 0], np.uint8)
# Weights 0..15 are themselves; from there on there are eight for each doubling.
_WEIGHTS = np.array([b if b < 16 else (8 + b % 8) << (b // 8 - 1) for b in range(256)], np.int64)


def encode(symbols: Bytes) -> Bytes:
    """The shortest stream found for these symbols; the same symbols give the same bytes on every machine."""
    if not len(symbols):
        return np.zeros(0, np.uint8)
    levels = int(symbols.max()) + 1
    if levels == 1:
        return np.array([0, 1], np.uint8)
    cheapest, plan = 8.0 * len(symbols), None
    for group in range(1, _most_digits(levels, 256) + 1):
        counts = _histogram(_join(symbols, levels, group), levels**group)
        for width in range(8):
            table = _table(counts, width)
            frequencies = _frequencies(table, len(counts), width)
            coded = float(counts @ (_PRECISION - np.log2(np.maximum(frequencies, 1))))
            price = 8 * len(table) + 16 * _lanes(int(counts.sum())) + coded
            if price < cheapest:
                cheapest, plan = price, (group, width, table, frequencies)
    if plan is None:
        return np.concatenate([_RAW, symbols])
    group, width, table, frequencies = plan
    header = np.array([levels - 1, group | width << 4], np.uint8)
    return np.concatenate([header, table, _encode_lanes(_join(symbols, levels, group), frequencies)])


def decode(data: Bytes, count: int) -> Bytes:
    """The `count` symbols of a stream; at most that many bytes, and few more, are allocated.

    Raises:
        CheckpointError: the stream is damaged, or is not one of `count` symbols.
    """
    if count == 0:
        _require(len(data) == 0)
        return np.zeros(0, np.uint8)
    _require(len(data) >= 2)
    levels, group, width = int(data[0]) + 1, int(data[1]) & 15, int(data[1]) >> 4
    if group == 0:
        _require(levels == 256 and width == 0 and len(data) == 2 + count)
        return data[2:]
    if levels == 1:
        _require(group == 1 and width == 0 and len(data) == 2)
        return np.zeros(count, np.uint8)
    _require(group <= _most_digits(levels, 256) and width < 8)
    size = levels**group
    bins = -(-size >> width)
    _require(len(data) >= 2 + bins)
    frequencies = _frequencies(data[2 : 2 + bins], size, width)
    _require(bool(frequencies.any()))
    joined = _decode_lanes(data[2 + bins :], -(-count // group), frequencies)
    return _split(joined, levels, group)[:count]


def _join(symbols: Bytes, levels: int, group: int) -> Bytes:
    if group == 1:
        return symbols
    digits = np.zeros(-(-len(symbols) // group) * group, np.uint8)
    digits[: len(symbols)] = symbols
    rows = digits.reshape(-1, group)
    joined = rows[:, -1].copy()
    for place in range(group - 2, -1, -1):
        joined = joined * np.uint8(levels) + rows[:, place]
    return joined


def _split(joined: Bytes, levels: int, group: int) -> Bytes:
    if group == 1:
        return joined
    rows = np.empty((len(joined), group), np.uint8)
    for place in range(group):
        joined, rows[:, place] = np.divmod(joined, np.uint8(levels))
    return rows.reshape(-1)


def _histogram(symbols: Bytes, size: int) -> Whole:
    counts = np.zeros(size, np.int64)
    for start in range(0, len(symbols), _CHUNK):
        counts += np.bincount(symbols[start : start + _CHUNK], minlength=size)
    return counts


def _table(counts: Whole, width: int) -> Bytes:
    """The weight of each bin: what its symbols have on average, in millionths or so of all; never 0 if there is one."""
    starts = np.arange(0, len(counts), 1 << width)
    inside = np.add.reduceat(counts, starts)
    shared = np.diff(np.append(starts, len(counts)))
    weights = np.maximum((inside << 20) // (shared * counts.sum()), inside > 0)
    table: Bytes = np.searchsorted((_WEIGHTS[1:] + _WEIGHTS[:-1] + 1) // 2, weights, side="right").astype(np.uint8)
    return table


def _frequencies(table: Bytes, size: int, width: int) -> Whole:
    """Whole numbers that add up to 2^precision, none of them 0 where the weight is not; all 0 if all weights are."""
    weights = np.repeat(_WEIGHTS[table], 1 << width)[:size]
    present = np.concatenate([[0], np.cumsum(weights > 0)])
    if not present[-1]:
        return np.zeros(size, np.int64)
    upto = np.concatenate([[0], np.cumsum(weights)])
    edges: Whole = upto * ((1 << _PRECISION) - present[-1]) // upto[-1] + present
    frequencies: Whole = np.diff(edges)
    return frequencies


def _lanes(count: int) -> int:
    """Enough that decoding takes few steps, and few enough that their states are a small part of the stream."""
    return min(_LANES, 1 + count // _PER_LANE)


def _most_digits(levels: int, limit: int) -> int:
    digits = 1
    while levels ** (digits + 1) <= limit:
        digits += 1
    return digits


def _encode_lanes(symbols: Bytes, frequencies: Whole) -> Bytes:
    lanes, digits, size = _lanes(len(symbols)), _most_digits(len(frequencies), _LOW), len(frequencies)
    coded = max(0, len(symbols) - digits * lanes)
    rest = np.zeros(digits * lanes, np.uint64)
    rest[: len(symbols) - coded] = symbols[coded:]
    states = _LOW + size ** np.arange(digits, dtype=np.uint64) @ rest.reshape(digits, lanes)
    frequency = frequencies.astype(np.uint64)
    before = np.cumsum(frequency) - frequency
    words: list[NDArray[Any]] = []
    for start in range((coded - 1) // lanes * lanes, -1, -lanes):
        row = symbols[start : min(start + lanes, coded)]
        state, share = states[: len(row)], frequency[row]
        full = state >= share << np.uint64(32 - _PRECISION)
        words.append(state[full].astype("<u2"))
        whole, part = np.divmod(np.where(full, state >> np.uint64(16), state), share)
        states[: len(row)] = (whole << np.uint64(_PRECISION)) + before[row] + part
    return np.concatenate([states.astype("<u4").view(np.uint8), *(word.view(np.uint8) for word in reversed(words))])


def _decode_lanes(data: Bytes, count: int, frequencies: Whole) -> Bytes:
    lanes, digits, size = _lanes(count), _most_digits(len(frequencies), _LOW), len(frequencies)
    _require(len(data) >= 4 * lanes and len(data) % 2 == 0)
    states = np.frombuffer(data[: 4 * lanes].tobytes(), "<u4").astype(np.uint32)
    words = np.frombuffer(data[4 * lanes :].tobytes(), "<u2").astype(np.uint32)
    _require(bool((states >= _LOW).all()))
    symbol = np.repeat(np.arange(size, dtype=np.uint8), frequencies)
    share = frequencies.astype(np.uint32)[symbol]
    inside = (np.arange(1 << _PRECISION) - (np.cumsum(frequencies) - frequencies)[symbol]).astype(np.uint32)
    coded = max(0, count - digits * lanes)
    symbols = np.empty(count, np.uint8)
    position = 0
    for start in range(0, coded, lanes):
        state = states[: min(lanes, coded - start)]
        slot = state & np.uint32((1 << _PRECISION) - 1)
        symbols[start : start + len(state)] = symbol[slot]
        state >>= np.uint32(_PRECISION)
        state *= share[slot]
        state += inside[slot]
        (empty,) = np.nonzero(state < _LOW)
        more = words[position : position + len(empty)]
        _require(len(more) == len(empty))
        state[empty] = state[empty] << np.uint32(16) | more
        position += len(empty)
    rest = states - np.uint32(_LOW)
    _require(position == len(words) and int(rest.max()) < size**digits)
    places = rest // (size ** np.arange(digits))[:, None] % size
    symbols[coded:] = places.reshape(-1)[: count - coded]
    return symbols


def _require(holds: bool) -> None:
    if not holds:
        raise CheckpointError("holds a damaged stream of symbols")
