from __future__ import annotations

import contextlib
import json
import random
import zlib

import pytest
import torch
from torch import Tensor

from compress.codecs import Packed, pack, unpack
from compress.coded import coded
from compress.errors import CheckpointError


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def in_the_file(packed: Packed) -> int:
    """Bytes of the values and of the words that say how to read them."""
    return packed.bytes + len(json.dumps(packed.codec, separators=(",", ":")))


def sparse(values: Tensor, density: float) -> Tensor:
    keep = torch.rand(values.shape, generator=torch.Generator().manual_seed(1)) < density
    return torch.where(keep, values, torch.zeros_like(values))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


CASES = {
    "floats": normal(16, 16, 3, 3),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "one": torch.tensor([7]),
    "bool": torch.arange(1000) % 3 == 0,
    "bfloat16": normal(300).bfloat16(),
    "float16": normal(300).half(),
    "float64": normal(300).double(),
    "float8": normal(300).to(torch.float8_e4m3fn),
    "complex": torch.complex(normal(40), normal(40)),
    "wide complex": torch.complex(normal(40).double(), normal(40).double()),
    "int64": torch.arange(-100, 100),
    "large int64": torch.tensor([2**62, -(2**62)] * 50),
    "uint16": torch.full((100,), 60000, dtype=torch.uint16),
    "uint64": torch.full((100,), 2**64 - 1, dtype=torch.uint64),
    "displacements": normal(64, 4, 2).round().clamp(-1, 1) + 0.0,
    "minus zeros": torch.tensor([0.0, -0.0, 1.0] * 200),
    "nan and infinity": torch.tensor([float("nan"), float("inf"), -float("inf")] * 50),
    "nan payload": torch.tensor([0x7FC12345] * 90, dtype=torch.int32).view(torch.float32),
    "pruned": sparse(normal(32, 32, 3, 3), 0.1),
    "very sparse": sparse(normal(64, 64, 3, 3), 0.002),
    "pruned integers": sparse((normal(32, 32, 3, 3) * 30).round().clamp(-127, 127), 0.1).to(torch.int8),
    "all zero": torch.zeros(64, 64),
    "clustered": normal(16)[torch.arange(5000) * 7919 % 16],
    "int8": (normal(32, 32, 3, 3) * 25).round().clamp(-127, 127).to(torch.int8),
    "not contiguous": normal(20, 30).t(),
    "longer than a chunk": torch.arange(2**20 + 77) % 5 - 2,
}


@pytest.mark.parametrize("name", CASES)
def test_every_bit_comes_back(name: str) -> None:
    tensor = CASES[name]
    packed = pack(tensor)
    back = unpack(packed.data, packed.codec, tuple(tensor.shape), tensor.dtype)
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert bits(back) == bits(tensor)
    assert packed.bytes <= tensor.numel() * tensor.element_size()
    assert back.data_ptr() % 64 == 0 or back.numel() == 0  # kernels may round differently on other alignments


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_integers_take_their_bits(width: int, signed: bool) -> None:
    low = -(2 ** (width - 1)) if signed else 0
    generator = torch.Generator().manual_seed(width)
    tensor = torch.randint(low, low + 2**width, (4003,), generator=generator).float()
    packed = pack(tensor)
    # at random no code is shorter than this; with its codec's words no other form may take more
    plain = {"values": "integers", "bits": width} | ({"signed": True} if signed else {})
    assert in_the_file(packed) <= (4003 * width + 7) // 8 + len(json.dumps(plain, separators=(",", ":")))
    assert bits(unpack(packed.data, packed.codec, (4003,), torch.float32)) == bits(tensor)


def test_bit_order_by_hand() -> None:
    # 1, 2, 3, 0, then -1, -2 in two bits each, the first value in the lowest bits: 0b00_11_10_01, 0b10_11
    data = torch.tensor([0b00111001], dtype=torch.uint8)
    codec = {"values": "integers", "bits": 2}
    assert unpack(data, codec, (4,), torch.int64).tolist() == [1, 2, 3, 0]
    data = torch.tensor([0b1011], dtype=torch.uint8)
    assert unpack(data, codec | {"signed": True}, (2,), torch.float32).tolist() == [-1.0, -2.0]


def test_sparse_by_hand() -> None:
    values = torch.tensor([5, 6], dtype=torch.uint8)
    bitmap = {"values": "integers", "bits": 8, "positions": "bitmap", "stored": 2}
    mask = torch.tensor([0b00010010], dtype=torch.uint8)
    assert unpack(torch.cat([mask, values]), bitmap, (7,), torch.int32).tolist() == [0, 5, 0, 0, 6, 0, 0]
    # gaps of two bits: one zero, then a value; three zeros (3 = no value), one more, then a value
    relative = {**bitmap, "positions": "relative", "gap_bits": 2, "gaps": 3}
    gaps = torch.tensor([0b011101], dtype=torch.uint8)
    assert unpack(torch.cat([gaps, values]), relative, (8,), torch.int32).tolist() == [0, 5, 0, 0, 0, 0, 6, 0]


def test_the_choice_follows_the_content() -> None:
    assert pack(CASES["displacements"]).bytes <= 64 * 4 * 2 * 2 // 8
    assert pack(CASES["pruned"]).bytes < 1.1 * (0.1 * 9216 * 4 + 9216 / 8)
    assert pack(CASES["clustered"]).bytes <= 5000 // 2 + 64
    assert pack(CASES["bool"]).bytes <= 125
    nothing = {"values": "dense", "positions": "bitmap", "stored": 0}
    assert in_the_file(pack(CASES["all zero"])) <= len(json.dumps(nothing, separators=(",", ":")))
    assert pack(CASES["scalar"]).codec == {}
    assert pack(CASES["int8"]).codec == {"coded": True}
    assert pack(torch.arange(10000) * 7919 % 256 % 7 - torch.arange(10000) // 2500).codec["zlib"]  # a pattern repeats


@pytest.mark.parametrize("name", ["displacements", "pruned integers", "int8", "clustered"])
def test_values_take_about_their_entropy(name: str) -> None:
    counts = torch.unique(CASES[name], return_counts=True)[1].double()
    entropy = float(-(counts * (counts / counts.sum()).log2()).sum()) / 8
    table = 4 * len(counts) if name == "clustered" else 0
    assert pack(CASES[name]).bytes <= 1.02 * entropy + table + 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_exponents_of_floats_are_coded(dtype: torch.dtype) -> None:
    tensor = normal(20000).to(dtype)
    packed = pack(tensor)
    assert packed.codec == {"coded": True} and packed.bytes < 0.95 * tensor.numel() * tensor.element_size()


def test_coded_by_hand() -> None:
    # integers (1) from -1 (127): a stream of 2 bytes, one level (0) in groups of 1, for a thousand values
    data = torch.tensor([1, 127, 2, 0, 1], dtype=torch.uint8)
    assert unpack(data, {"coded": True}, (1000,), torch.int8).tolist() == [-1] * 1000
    # a sparse codebook (2 + 4): 2 stored, 2 gaps raw in 4 bytes (1, 2), 1 entry, 0x3F800000, one level
    data = torch.tensor([6, 2, 2, 4, 255, 0, 1, 2, 0, 0, 0, 128, 63, 2, 0, 1], dtype=torch.uint8)
    assert unpack(data, {"coded": True}, (6,), torch.float32).tolist() == [0, 1, 0, 0, 1, 0]


def test_the_same_tensor_gives_the_same_bytes() -> None:
    for name in CASES.keys() - {"longer than a chunk"}:
        tensor = CASES[name]
        first, second = pack(tensor), pack(tensor.clone())
        assert first.codec == second.codec and bits(first.data) == bits(second.data)


FLAT = torch.zeros(10, dtype=torch.uint8)
BAD = {
    "a type that is not expected": (torch.zeros(4), {}, (4,), torch.int8, "holds float32"),
    "a shape that is not expected": (torch.zeros(4), {}, (2, 2), torch.float32, "is expected"),
    "unknown fields": (FLAT, {"values": "dense", "path": "x"}, (10,), torch.uint8, "unknown fields: \\['path'\\]"),
    "no values": (FLAT, {"zlib": True}, (10,), torch.uint8, "'values' = None"),
    "an unknown kind": (FLAT, {"values": "pickle"}, (10,), torch.uint8, "'values' = 'pickle'"),
    "a kind that is a list": (FLAT, {"values": ["dense"]}, (10,), torch.uint8, "'values'"),
    "bits of 0": (FLAT, {"values": "integers", "bits": 0}, (10,), torch.uint8, "'bits' = 0, not in 1..8"),
    "bits of 99": (FLAT, {"values": "integers", "bits": 99}, (10,), torch.uint8, "'bits' = 99"),
    "bits that are true": (FLAT, {"values": "integers", "bits": True}, (10,), torch.uint8, "'bits' = True"),
    "bits that are text": (FLAT, {"values": "integers", "bits": "8"}, (10,), torch.uint8, "'bits' = '8'"),
    "a flag that is a number": (FLAT, {"values": "dense", "zlib": 1}, (10,), torch.uint8, "'zlib' = 1"),
    "too few bytes": (FLAT, {"values": "dense"}, (11,), torch.uint8, "has 10 bytes where its codec needs 11"),
    "too many bytes": (FLAT, {"values": "dense"}, (2,), torch.float32, "has 10 bytes where its codec needs 8"),
    "more stored than there is": (
        *(FLAT, {"values": "dense", "positions": "bitmap", "stored": 11}, (10,), torch.uint8),
        "'stored' = 11, not in 0..10",
    ),
    "a negative count": (
        *(FLAT, {"values": "dense", "positions": "bitmap", "stored": -1}, (10,), torch.uint8),
        "'stored' = -1",
    ),
    "positions that do not add up": (
        *(FLAT, {"values": "dense", "positions": "bitmap", "stored": 8}, (16,), torch.uint8),
        "has 0 positions for 8 values",
    ),
    "a position beyond the end": (
        torch.tensor([0b10101010, 1], dtype=torch.uint8),
        *({"values": "dense", "positions": "relative", "stored": 1, "gap_bits": 8, "gaps": 1}, (9,), torch.uint8),
        "has a position beyond its end",
    ),
    "an index beyond the codebook": (
        torch.tensor([7, 0b111], dtype=torch.uint8),
        *({"values": "codebook", "bits": 3, "entries": 1}, (1,), torch.uint8),
        "index beyond the end of its codebook",
    ),
    "integers that do not fit": (FLAT + 200, {"values": "integers", "bits": 8}, (10,), torch.int8, "int8 cannot hold"),
    "no zlib stream": (FLAT, {"values": "dense", "zlib": True}, (10,), torch.uint8, "damaged zlib stream"),
    "coded and more": (FLAT, {"coded": True, "zlib": True}, (10,), torch.uint8, "unknown fields: \\['zlib'\\]"),
    "coded that is no flag": (FLAT, {"coded": 1}, (10,), torch.uint8, "'coded' = 1"),
    "not coded": (FLAT, {"coded": False}, (10,), torch.uint8, "'coded' = False"),
    **{
        f"coded: {message}": (torch.tensor(data, dtype=torch.uint8), {"coded": True}, (10,), dtype, message)
        for data, dtype, message in (
            ([], torch.int8, "ends 1 bytes before its values do"),
            ([3], torch.int8, "form 3"),
            ([7], torch.int8, "the number 7 where at most 6 fits"),
            ([255] * 20, torch.int8, "where at most 6 fits"),
            ([5, 11], torch.int8, "the number 11 where at most 10 fits"),
            ([5, 2, 1, 2, 0, 1], torch.int8, "has 1 positions for 2 values"),
            ([5, 1, 1, 3, 255, 0, 10], torch.int8, "has a position beyond its end"),
            ([1, 0, 2, 0, 1], torch.uint8, "has integers that torch.uint8 cannot hold"),
            ([2, 0, 7, 12, 255, 0, *range(10)], torch.int8, "index beyond the end of its codebook"),
            ([1, 0, 9, 0, 1], torch.int8, "ends 7 bytes|where at most"),
            ([1, 0, 2, 0, 1, 0], torch.int8, "has 1 bytes more than its values need"),
            ([1, 0, 2, 0, 2], torch.int8, "damaged stream"),
        )
    },
    "packed in a matrix": (FLAT.view(2, 5), {"values": "dense"}, (10,), torch.uint8, "not as a flat array"),
    "a type too wide": (FLAT, {"values": "dense"}, (10,), torch.complex128, "cannot be packed"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name: str) -> None:
    data, codec, shape, dtype, message = BAD[name]
    with pytest.raises(CheckpointError, match=message):
        unpack(data, codec, shape, dtype)


@pytest.mark.parametrize("content", [b"\0" * 10**8, b"\0" * 9, b""])
def test_a_stream_is_inflated_no_further_than_declared(content: bytes) -> None:
    data = torch.frombuffer(bytearray(zlib.compress(content)), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="does not inflate to the 10 bytes"):
        unpack(data, {"values": "dense", "zlib": True}, (10,), torch.uint8)


def test_random_codecs_never_fail_otherwise() -> None:
    generator = torch.Generator().manual_seed(0)

    def pick(*options: object) -> object:
        return options[int(torch.randint(len(options), (), generator=generator))]

    for _ in range(1500):
        fields = {
            "values": pick("dense", "integers", "codebook"),
            "bits": pick(1, 3, 8, 9),
            "entries": pick(1, 4, 256),
            "positions": pick("all", "bitmap", "relative"),
            "stored": pick(0, 3, 20),
            "gap_bits": pick(2, 5),
            "gaps": pick(0, 4, 20),
            "signed": pick(True, False),
        }
        length = int(torch.randint(80, (), generator=generator))
        data = torch.randint(256, (length,), generator=generator).to(torch.uint8)
        dtype = pick(torch.float32, torch.int8, torch.bool, torch.bfloat16)
        with contextlib.suppress(CheckpointError):
            assert unpack(data, fields, (4, 5), dtype).shape == (4, 5)


@pytest.mark.parametrize("name", ["pruned", "pruned integers", "clustered", "bool", "bfloat16"])
def test_damaged_bytes_never_fail_otherwise(name: str) -> None:
    tensor, dice = CASES[name], random.Random(name)
    for blob in coded(tensor):
        for _ in range(15):
            data = torch.from_numpy(blob.copy())
            for _ in range(dice.randrange(1, 4)):
                data[dice.randrange(min(len(data), dice.choice([8, 40, 10**6])))] = dice.randrange(256)
            data = data[: dice.choice([len(data), len(data), dice.randrange(len(data))])]
            with contextlib.suppress(CheckpointError):
                assert unpack(data, {"coded": True}, tensor.shape, tensor.dtype).shape == tensor.shape
