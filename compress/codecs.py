"""How a tensor becomes bytes in a checkpoint, without losing a bit of it.

A tensor is written as it is (the codec is `{}`), or as a flat array of bytes with a codec that says how to read it.
With the codec `{"coded": true}` the bytes are entropy-coded and say all themselves (`coded.py`). Else they are plain:

* values: `dense` (raw), `integers` (two's complement, `bits` each, least significant first) or `codebook` (a table of
  `entries` values, then indices of `bits` each);
* positions: all, or only those of the `stored` values that are not zero: as a `bitmap`, or as gaps of `gap_bits`
  between them (`relative`; the largest gap code skips that many zeros and stands for no value);
* `zlib`: the whole array (table, positions, values, in this order) is deflated.

Every size that a codec declares is checked against the tensor that is expected before anything is allocated.

Han et al., "Deep Compression", ICLR 2016, for the codebook and the relative positions.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress import bits as bit
from compress.bits import Bytes
from compress.coded import coded, decoded
from compress.errors import CheckpointError

Codec = dict[str, Any]

# What the file spends on the name of a tensor beside its codec: saving less is not worth it.
NAME = 32
_FIELDS = {"values", "bits", "signed", "entries", "positions", "stored", "gap_bits", "gaps", "zlib"}
_SAMPLE = 1 << 14


@dataclass(frozen=True)
class Packed:
    """A tensor as it stands in the file, and its codec; with the codec `{}` it is the tensor itself."""

    data: Tensor
    codec: Codec

    @property
    def bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def pack(tensor: Tensor) -> Packed:
    """The smallest lossless form of `tensor`, chosen by trying, its codec included; of equal sizes the simplest."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.numel() == 0 or tensor.element_size() not in bit.WORDS:
        return Packed(tensor, {})
    plain = sorted(_plain_forms(tensor), key=lambda form: len(form[0]))
    forms = [*plain, *((blob, {"coded": True}) for blob in coded(tensor))]
    forms += _deflated(plain, min(len(data) for data, _ in forms))
    data, codec = min(forms, key=lambda form: _price(*form))  # the first of equals
    if _price(data, codec) >= tensor.numel() * tensor.element_size():
        return Packed(tensor, {})
    return Packed(torch.from_numpy(data.copy()), codec)


def _price(data: Bytes, codec: Codec) -> int:
    return len(data) + NAME + len(json.dumps(codec, separators=(",", ":")))


def unpack(data: Tensor, codec: Codec, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor of this shape and type, in memory of its own.

    Raises:
        CheckpointError: the bytes or the codec do not fit the expected tensor.
    """
    if not codec:
        _require(
            data.dtype == dtype and tuple(data.shape) == tuple(shape),
            f"holds {_text(data.dtype, data.shape)} where {_text(dtype, shape)} is expected",
        )
        return _own(data)
    unknown = set(codec) - (_FIELDS if "coded" not in codec else {"coded"})
    _require(not unknown, f"has a codec with unknown fields: {sorted(unknown)}")
    _require(data.dtype == torch.uint8 and data.dim() == 1, "is packed, but not as a flat array of bytes")
    _require(dtype.itemsize in bit.WORDS, f"cannot be packed: it is {dtype}")
    count = math.prod(shape)
    if "coded" in codec:
        _require(_flag(codec, "coded"), "has the codec field 'coded' = False, which says nothing")
        words = decoded(data.numpy(), count, dtype)
    else:
        words = _read_plain(data.numpy(), codec, count, dtype)
    return _own(bit.tensor_of(words, shape, dtype))


def _read_plain(data: Bytes, codec: Codec, count: int, dtype: torch.dtype) -> NDArray[Any]:
    positions = _choice(codec, "positions", ("all", "bitmap", "relative"), "all")
    values = _choice(codec, "values", ("dense", "integers", "codebook"), None)
    stored = count if positions == "all" else _whole(codec, "stored", 0, count)
    bits = 8 * dtype.itemsize if values == "dense" else _whole(codec, "bits", 1, 8)
    entries = _whole(codec, "entries", 1, 256) if values == "codebook" else 0
    gaps = _whole(codec, "gaps", 0, count) if positions == "relative" else 0
    gap_bits = _whole(codec, "gap_bits", 2, 8) if positions == "relative" else 1
    sizes = (
        entries * dtype.itemsize,
        bit.bytes_for(count if positions == "bitmap" else gaps, gap_bits) if positions != "all" else 0,
        bit.bytes_for(stored, bits),
    )
    blob = _inflate(data, sum(sizes)) if _flag(codec, "zlib") else data
    _require(len(blob) == sum(sizes), f"has {len(blob)} bytes where its codec needs {sum(sizes)}")
    table, places, body = np.split(blob, [sizes[0], sizes[0] + sizes[1]])

    if values == "dense":
        words: NDArray[Any] = bit.words_from(body, dtype.itemsize)
    elif values == "codebook":
        indices = bit.unpack_bits(body, bits, stored)
        _require(stored == 0 or int(indices.max()) < entries, "has an index beyond the end of its codebook")
        words = bit.words_from(table, dtype.itemsize)[indices]
    else:
        codes = bit.unpack_bits(body, bits, stored).astype(np.int16)
        if _flag(codec, "signed"):
            codes -= (codes >= 1 << (bits - 1)) * np.int16(1 << bits)
        words = bit.words_of_integers(codes, dtype)
    if positions == "all":
        return words
    if positions == "bitmap":
        (where,) = np.nonzero(bit.unpack_bits(places, 1, count))
    else:
        where = bit.positions_of(bit.unpack_bits(places, gap_bits, gaps), gap_bits, count)
    _require(len(where) == stored, f"has {len(where)} positions for {stored} values")
    full = np.zeros(count, words.dtype)
    full[where] = words
    return full


def holds_integers(tensor: Tensor) -> bool:
    """Whether every value is a whole number of at most 8 bits."""
    if tensor.element_size() not in bit.WORDS:
        return False
    return bit.small_integers(bit.words_of(tensor.contiguous()), tensor.dtype) is not None


def _plain_forms(tensor: Tensor) -> Iterator[tuple[Bytes, Codec]]:
    words = bit.words_of(tensor)
    (where,) = np.nonzero(words)
    yield from _value_forms(words, tensor.dtype)
    if len(where) <= 0.9 * len(words):
        for places, said in _position_forms(where, len(words)):
            for blob, codec in _value_forms(words[where], tensor.dtype):
                table = codec.get("entries", 0) * tensor.element_size()
                joined = np.concatenate([blob[:table], places, blob[table:]])
                yield joined, codec | said | {"stored": len(where)}


def _value_forms(words: NDArray[Any], dtype: torch.dtype) -> Iterator[tuple[Bytes, Codec]]:
    yield bit.little(words), {"values": "dense"}
    whole = bit.small_integers(words, dtype)
    if whole is not None:
        tight, signed = bit.width(whole)
        for bits in sorted({tight, 8}):
            codes = (whole & ((1 << bits) - 1)).astype(np.uint8)
            codec = {"values": "integers", "bits": bits}
            yield bit.pack_bits(codes, bits), codec | ({"signed": True} if signed else {})
    book = bit.codebook(words, whole)
    if book is not None:
        table, indices = book
        bits = max(1, (len(table) - 1).bit_length())
        codec = {"values": "codebook", "bits": bits, "entries": len(table)}
        yield np.concatenate([bit.little(table), bit.pack_bits(indices, bits)]), codec


def _position_forms(where: NDArray[np.int64], count: int) -> Iterator[tuple[Bytes, Codec]]:
    mask = np.zeros(count, np.uint8)
    mask[where] = 1
    yield bit.pack_bits(mask, 1), {"positions": "bitmap"}
    between = np.diff(where, prepend=-1) - 1
    widths = {bits: bit.bytes_for(int((between // ((1 << bits) - 1) + 1).sum()), bits) for bits in range(2, 9)}
    bits = min(widths, key=lambda b: widths[b])
    codes = bit.gaps_of(between, bits)
    yield bit.pack_bits(codes, bits), {"positions": "relative", "gap_bits": bits, "gaps": len(codes)}


def _deflated(plain: Sequence[tuple[Bytes, Codec]], below: int) -> Iterator[tuple[Bytes, Codec]]:
    """The plain form that deflates best, judged by samples, if it may take fewer bytes than `below`."""
    promises = []
    for blob, _ in plain:
        starts = range(0, len(blob), max(_SAMPLE, len(blob) // 8))
        sample = b"".join(bytes(blob[start : start + _SAMPLE]) for start in starts)
        promises.append(len(zlib.compress(sample, 6)) * len(blob) / max(1, len(sample)))
    best = min(range(len(plain)), key=lambda i: promises[i])
    if promises[best] > 1.02 * below:
        return
    blob, codec = plain[best]
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_FILTERED, zlib.Z_DEFAULT_STRATEGY):
        machine = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, strategy)
        deflated = machine.compress(bytes(blob)) + machine.flush()
        yield np.frombuffer(deflated, np.uint8), codec | {"zlib": True}


def _inflate(data: Bytes, size: int) -> Bytes:
    machine = zlib.decompressobj()
    try:
        # A limit of 0 would mean no limit; one byte more than declared shows a stream that is too long.
        blob = machine.decompress(data.tobytes(), size + 1)
    except zlib.error as error:
        raise CheckpointError(f"holds a damaged zlib stream ({error})") from error
    _require(
        len(blob) == size and machine.eof and not machine.unused_data,
        f"does not inflate to the {size} bytes that its codec needs",
    )
    return np.frombuffer(blob, np.uint8)


def _own(tensor: Tensor) -> Tensor:
    # Memory that torch has aligned itself: kernels may round differently on other alignments.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor)


def _whole(codec: Codec, field: str, low: int, high: int) -> int:
    value = codec.get(field)
    _require(
        type(value) is int and low <= value <= high, f"has the codec field {field!r} = {value!r}, not in {low}..{high}"
    )
    return int(value)  # type: ignore[arg-type]  # narrowed by the check above, which mypy does not see


def _choice(codec: Codec, field: str, known: Sequence[str], default: str | None) -> str:
    value = codec.get(field, default)
    _require(isinstance(value, str) and value in known, f"has the codec field {field!r} = {value!r}, not in {known}")
    return str(value)


def _flag(codec: Codec, field: str) -> bool:
    value = codec.get(field, False)
    _require(isinstance(value, bool), f"has the codec field {field!r} = {value!r}, not true or false")
    return bool(value)


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise CheckpointError(problem)


def _text(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
