from __future__ import annotations

import contextlib
import math
import random
import time
import tracemalloc

import numpy as np
import pytest

from compress.entropy import Bytes, decode, encode
from compress.errors import CheckpointError

DICE = np.random.default_rng(0)


def drawn(levels: int, count: int, skew: float = 1.0) -> Bytes:
    weights = np.exp(-skew * np.arange(levels))
    return DICE.choice(levels, count, p=weights / weights.sum()).astype(np.uint8)


def bell(count: int, deviation: float) -> Bytes:
    return (np.rint(DICE.normal(0, deviation, count)).clip(-127, 127) + 127).astype(np.uint8)


def entropy_in_bytes(symbols: Bytes) -> float:
    shares = np.bincount(symbols)[np.bincount(symbols) > 0] / len(symbols)
    return float(-(shares * np.log2(shares)).sum()) * len(symbols) / 8


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 6, 7, 15, 16, 17, 40, 255, 256])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 17, 1023, 1024, 1025, 5000])
def test_every_symbol_comes_back(levels: int, count: int) -> None:
    for skew in (0.0, 0.1, 3.0):
        symbols = drawn(levels, count, skew)
        assert np.array_equal(decode(encode(symbols), count), symbols)


def test_more_symbols_than_lanes_take_at_once() -> None:
    symbols = bell(4096 * 1024 + 5, 3.0)
    assert np.array_equal(decode(encode(symbols), len(symbols)), symbols)


@pytest.mark.parametrize(
    "symbols",
    [bell(40_000, 30.0), bell(40_000, 2.0), drawn(2, 40_000, 3.0), drawn(3, 40_000, 1.0), drawn(200, 40_000, 0.05)],
)
def test_a_stream_is_about_as_long_as_the_entropy(symbols: Bytes) -> None:
    entropy = entropy_in_bytes(symbols)
    assert entropy < len(encode(symbols)) + 10
    assert len(encode(symbols)) <= 1.015 * entropy + 24


def test_neighbours_that_belong_together_are_coded_together() -> None:
    pairs = np.repeat(drawn(3, 20_000, 0.5), 2)
    assert len(encode(pairs)) < 0.65 * entropy_in_bytes(pairs)


def test_what_has_no_pattern_costs_two_bytes_more() -> None:
    symbols = DICE.integers(0, 256, 3000).astype(np.uint8)
    assert encode(symbols).tobytes() == bytes([255, 0]) + symbols.tobytes()
    assert encode(np.full(1000, 9, np.uint8)).size < 32
    assert encode(np.zeros(10**6, np.uint8)).tobytes() == bytes([0, 1])


def test_a_stream_by_hand() -> None:
    # 2 levels in groups of 1, bins of 1 symbol, weights 3 and 1; one lane, whose state holds 16 digits of base 2
    state = 2**16 + 0b0000000000000101
    data = np.array([1, 1, 3, 1, *state.to_bytes(4, "little")], np.uint8)
    assert decode(data, 3).tolist() == [1, 0, 1]
    assert decode(data, 16).tolist() == [1, 0, 1] + [0] * 13
    # One symbol more is coded, before the digits. The weights share 2^14 - 2 slots, 1 more each: 12287 and 4097 by
    # rounding down. A 1 in front of the state x above: x' = (x // 4097) * 2^14 + 12287 + x % 4097.
    low = (state // 4097) * 2**14 + 12287 + state % 4097
    data[4:] = list(low.to_bytes(4, "little"))
    assert decode(data, 17).tolist() == [1, 1, 0, 1] + [0] * 13


def test_one_lane_step_by_step() -> None:
    """A stream made with Python's own integers, one symbol at a time, from the description of the format."""
    symbols = [0, 1, 2, 1, 1, 0, 1, 1] * 4
    upto = [0, 8, 8 + 16, 8 + 16 + 4]  # byte 16 is the first that is a float: 8 << 1
    edges = [upto[i] * (2**14 - 3) // 28 + i for i in range(4)]
    frequencies, before = [edges[i + 1] - edges[i] for i in range(3)], edges[:3]
    digits = int(math.log(2**16, 3))
    state = 2**16 + sum(symbol * 3**place for place, symbol in enumerate(symbols[-digits:]))
    words = b""
    for symbol in reversed(symbols[:-digits]):
        if state >= frequencies[symbol] << 18:
            words = (state & 0xFFFF).to_bytes(2, "little") + words
            state >>= 16
        state = (state // frequencies[symbol] << 14) + before[symbol] + state % frequencies[symbol]
    data = bytes([2, 1, 8, 16, 4]) + state.to_bytes(4, "little") + words
    assert decode(np.frombuffer(data, np.uint8), len(symbols)).tolist() == symbols


@pytest.mark.parametrize(
    ("data", "count"),
    [
        ([], 1),
        ([0], 1),
        ([0, 1], 0),
        ([0, 1, 0], 5),
        ([0, 2], 5),
        ([0, 17], 5),
        ([255, 0, 1], 2),
        ([255, 16, 1], 1),
        ([254, 0, 1], 1),
        ([255, 2, 1, 1], 5),
        ([1, 9, 1, 1], 5),
        ([1, 0x81, 1, 0, 0, 1, 0], 5),
        ([1, 1, 1], 5),
        ([1, 1, 1, 1], 5),
        ([1, 1, 0, 0, 0, 0, 1, 0], 5),
        ([1, 1, 1, 1, 255, 255, 0, 0], 5),
        ([1, 1, 1, 1, 0, 0, 1, 0, 7], 5),
        ([1, 1, 1, 1, 0, 0, 1, 0, 7, 7], 5),
        ([2, 1, 1, 1, 1, 255, 255, 255, 255], 5),
        ([1, 1, 1, 1, 0, 0, 1, 0], 50),
    ],
)
def test_what_is_no_stream_is_refused(data: list[int], count: int) -> None:
    with pytest.raises(CheckpointError, match="holds a damaged stream of symbols"):
        decode(np.array(data, np.uint8), count)


def test_damaged_streams_never_fail_otherwise() -> None:
    dice = random.Random(0)
    for symbols in (bell(3000, 20.0), drawn(3, 3000), drawn(2, 5000, 4.0), drawn(16, 100, 0.2)):
        good = encode(symbols)
        for _ in range(60):
            data = good.copy()
            for _ in range(dice.randrange(1, 4)):
                data[dice.randrange(min(len(data), dice.choice([2, 40, 10**6])))] = dice.randrange(256)
            data = data[: dice.choice([len(data), len(data), dice.randrange(len(data) + 1)])]
            count = dice.choice([len(symbols), len(symbols), 1, dice.randrange(6000)])
            with contextlib.suppress(CheckpointError):
                assert len(decode(data, count)) == count
    for _ in range(300):
        data = np.frombuffer(dice.randbytes(dice.randrange(60)), np.uint8)
        with contextlib.suppress(CheckpointError):
            decode(data, dice.randrange(2000))


def test_a_short_stream_of_many_symbols_is_refused_at_once() -> None:
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        decode(np.array([1, 1, 1, 1, *[0, 0, 1, 0] * 50], np.uint8), 10**9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


def test_a_stream_whose_symbols_cost_nothing_takes_few_steps() -> None:
    count = 8 << 20
    start = time.process_time()
    with contextlib.suppress(CheckpointError):
        decode(np.array([1, 1, 255, 1, *[0, 0, 1, 0] * 4096], np.uint8), count)
    assert time.process_time() - start < 10
