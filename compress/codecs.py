"""How a tensor becomes bytes in a checkpoint, without losing a bit of it.

A tensor is written as it is (the codec is `{}`), or as a flat array of bytes with a codec that says how to read it:

* values: `dense` (raw), `integers` (two's complement, `bits` each, least significant first) or `codebook` (a table of
  `entries` values, then indices of `bits` each);
* positions: all, or only those of the `stored` values that are not zero: as a `bitmap`, or as gaps of `gap_bits`
  between them (`relative`; the largest gap code skips that many zeros and stands for no value);
* `zlib`: the whole array (table, positions, values, in this order) is deflated.

Every size that a codec declares is checked against the tensor that is expected before anything is allocated.

Han et al., "Deep Compression", ICLR 2016, for the codebook and the relative positions.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import CheckpointError

Codec = dict[str, Any]
Bytes = NDArray[np.uint8]

# Saving fewer bytes than this is not worth the words in the blueprint that say so.
WORTH = 48
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_CHUNK = 1 << 20
_FIELDS = {"values", "bits", "signed", "entries", "positions", "stored", "gap_bits", "gaps", "zlib"}


@dataclass(frozen=True)
class Packed:
    """A tensor as it stands in the file, and its codec; with the codec `{}` it is the tensor itself."""

    data: Tensor
    codec: Codec

    @property
    def bytes(self) -> int:
        return self.data.numel() * self.data.element_size()


def pack(tensor: Tensor) -> Packed:
    """The smallest lossless form of `tensor`, chosen by trying; of equal sizes the simplest."""
    tensor = tensor.detach().cpu().contiguous()
    best = Packed(tensor, {})
    if tensor.numel() == 0 or tensor.element_size() not in _WORDS:
        return best
    cheapest = best.bytes
    candidates = sorted(_candidates(tensor), key=lambda pair: len(pair[0]))
    for blob, codec in candidates:
        if len(blob) > 2 * len(candidates[0][0]):
            break  # deflating does not win back that much
        deflated = _deflate(blob)
        for data, extra in ((blob, {}), (deflated, {"zlib": True})):
            if len(data) + WORTH < cheapest:
                best, cheapest = Packed(torch.from_numpy(data.copy()), codec | extra), len(data) + WORTH
    return best


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
    _require(set(codec) <= _FIELDS, f"has a codec with unknown fields: {sorted(set(codec) - _FIELDS)}")
    _require(data.dtype == torch.uint8 and data.dim() == 1, "is packed, but not as a flat array of bytes")
    _require(dtype.itemsize in _WORDS, f"cannot be packed: it is {dtype}")
    count = math.prod(shape)
    positions = _choice(codec, "positions", ("all", "bitmap", "relative"), "all")
    values = _choice(codec, "values", ("dense", "integers", "codebook"), None)
    stored = count if positions == "all" else _whole(codec, "stored", 0, count)
    bits = 8 * dtype.itemsize if values == "dense" else _whole(codec, "bits", 1, 8)
    entries = _whole(codec, "entries", 1, 256) if values == "codebook" else 0
    gaps = _whole(codec, "gaps", 0, count) if positions == "relative" else 0
    gap_bits = _whole(codec, "gap_bits", 2, 8) if positions == "relative" else 1
    sizes = (
        entries * dtype.itemsize,
        _bytes_for(count if positions == "bitmap" else gaps, gap_bits) if positions != "all" else 0,
        _bytes_for(stored, bits),
    )
    blob = _inflate(data.numpy(), sum(sizes)) if _flag(codec, "zlib") else data.numpy()
    _require(len(blob) == sum(sizes), f"has {len(blob)} bytes where its codec needs {sum(sizes)}")
    table, places, body = np.split(blob, [sizes[0], sizes[0] + sizes[1]])

    if values == "dense":
        words: NDArray[Any] = body.copy().view(_WORDS[dtype.itemsize])
    elif values == "codebook":
        indices = _unpack_bits(body, bits, stored)
        _require(stored == 0 or int(indices.max()) < entries, "has an index beyond the end of its codebook")
        words = table.copy().view(_WORDS[dtype.itemsize])[indices]
    else:
        words = _words(_to_integers(_unpack_bits(body, bits, stored), bits, _flag(codec, "signed"), dtype))
    if positions != "all":
        where = _bitmap(places, count) if positions == "bitmap" else _relative(places, gap_bits, gaps, count)
        _require(len(where) == stored, f"has {len(where)} positions for {stored} values")
        full = np.zeros(count, words.dtype)
        full[where] = words
        words = full
    flat = torch.from_numpy(words.view(np.uint8).copy())
    return _own((flat.ne(0) if dtype == torch.bool else flat.view(dtype)).reshape(tuple(shape)))


def holds_integers(tensor: Tensor) -> bool:
    """Whether every value is a whole number of at most 8 bits."""
    return tensor.element_size() in _WORDS and _small_integers(_words(tensor.contiguous()), tensor.dtype) is not None


def _candidates(tensor: Tensor) -> Iterator[tuple[Bytes, Codec]]:
    words = _words(tensor)
    (where,) = np.nonzero(words)
    yield from _value_forms(words, tensor.dtype)
    if len(where) <= 0.9 * len(words):
        for places, said in _position_forms(where, len(words)):
            for blob, codec in _value_forms(words[where], tensor.dtype):
                table = codec.get("entries", 0) * tensor.element_size()
                joined = np.concatenate([blob[:table], places, blob[table:]])
                yield joined, codec | said | {"stored": len(where)}


def _value_forms(words: NDArray[Any], dtype: torch.dtype) -> Iterator[tuple[Bytes, Codec]]:
    yield words.view(np.uint8), {"values": "dense"}
    whole = _small_integers(words, dtype)
    if whole is not None:
        tight, signed = _width(whole)
        for bits in sorted({tight, 8}):
            codes = (whole & ((1 << bits) - 1)).astype(np.uint8)
            codec = {"values": "integers", "bits": bits}
            yield _pack_bits(codes, bits), codec | ({"signed": True} if signed else {})
    if len(np.unique(words[:4096])) <= 256:
        table, indices = np.unique(words, return_inverse=True)
        if 0 < len(table) <= 256:
            bits = max(1, (len(table) - 1).bit_length())
            packed = _pack_bits(indices.astype(np.uint8), bits)
            codec = {"values": "codebook", "bits": bits, "entries": len(table)}
            yield np.concatenate([table.view(np.uint8), packed]), codec


def _position_forms(where: NDArray[np.int64], count: int) -> Iterator[tuple[Bytes, Codec]]:
    mask = np.zeros(count, np.uint8)
    mask[where] = 1
    yield _pack_bits(mask, 1), {"positions": "bitmap"}
    between = np.diff(where, prepend=-1) - 1
    widths = {bits: _bytes_for(int((between // ((1 << bits) - 1) + 1).sum()), bits) for bits in range(2, 9)}
    bits = min(widths, key=lambda b: widths[b])
    most = (1 << bits) - 1
    skips = between // most
    ends = np.cumsum(skips + 1)
    codes = np.full(int(ends[-1]) if len(ends) else 0, most, np.uint8)
    codes[ends - 1] = between % most
    yield _pack_bits(codes, bits), {"positions": "relative", "gap_bits": bits, "gaps": len(codes)}


def _bitmap(places: Bytes, count: int) -> NDArray[np.int64]:
    return np.nonzero(_unpack_bits(places, 1, count))[0]


def _relative(places: Bytes, bits: int, gaps: int, count: int) -> NDArray[np.int64]:
    codes = _unpack_bits(places, bits, gaps).astype(np.int64)
    holds = codes < (1 << bits) - 1
    where = (np.cumsum(codes + holds) - 1)[holds]
    _require(len(where) == 0 or int(where[-1]) < count, "has a position beyond its end")
    return where


def _words(tensor: Tensor) -> NDArray[Any]:
    """The bit patterns of a tensor, flat, as unsigned integers of its element's size."""
    flat: NDArray[Any] = tensor.reshape(-1).view(torch.uint8).numpy().view(_WORDS[tensor.element_size()])
    return flat


def _small_integers(words: NDArray[Any], dtype: torch.dtype) -> NDArray[np.int16] | None:
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


def _width(whole: NDArray[np.int16]) -> tuple[int, bool]:
    low, high = int(whole.min()), int(whole.max())
    if low >= 0:
        return max(1, high.bit_length()), False
    return max(high.bit_length(), (-low - 1).bit_length()) + 1, True


def _to_integers(codes: Bytes, bits: int, signed: bool, dtype: torch.dtype) -> Tensor:
    values = torch.from_numpy(codes.astype(np.int16))
    if signed:
        values = torch.where(values >= 1 << (bits - 1), values - (1 << bits), values)
    if not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool and values.numel():
        limits = torch.iinfo(dtype)
        fits = limits.min <= int(values.min()) and int(values.max()) <= limits.max
        _require(fits, f"has integers that {dtype} cannot hold")
    return values.to(dtype)


def _pack_bits(codes: Bytes, bits: int) -> Bytes:
    if bits == 8:
        return codes
    parts = []
    for start in range(0, len(codes), _CHUNK):
        rows = np.unpackbits(codes[start : start + _CHUNK, None], axis=1, bitorder="little")[:, :bits]
        parts.append(np.packbits(rows.reshape(-1), bitorder="little"))
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def _unpack_bits(packed: Bytes, bits: int, count: int) -> Bytes:
    if bits == 8:
        return packed
    parts = []
    step = _CHUNK * bits // 8
    for start in range(0, len(packed), step):
        inside = min(_CHUNK, count - start * 8 // bits)
        rows = np.unpackbits(packed[start : start + step], count=inside * bits, bitorder="little").reshape(-1, bits)
        parts.append(np.packbits(rows, axis=1, bitorder="little")[:, 0])
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def _bytes_for(count: int, bits: int) -> int:
    return (count * bits + 7) // 8


def _deflate(blob: Bytes) -> Bytes:
    """The shortest of zlib's strategies; a sample is tried first, for most float data does not deflate at all."""
    sample = bytes(blob[: 1 << 16])
    if len(blob) > len(sample) and len(zlib.compress(sample, 1)) > 0.98 * len(sample):
        strategies = [zlib.Z_HUFFMAN_ONLY]
    else:
        strategies = [zlib.Z_HUFFMAN_ONLY, zlib.Z_FILTERED, zlib.Z_DEFAULT_STRATEGY]
    shortest = None
    for strategy in strategies:
        machine = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, strategy)
        deflated = machine.compress(bytes(blob)) + machine.flush()
        if shortest is None or len(deflated) < len(shortest):
            shortest = deflated
    return np.frombuffer(shortest or b"", np.uint8)


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
