"""The two kinds of Zarr v3 array that a part is made of, to the byte: metadata, chunks, shards.

Both are written and read here directly, which is several times as quick as any Zarr library; that these can open them too is
what the format promises and the tests show. An array of another layout is read through zarr-python.
"""

import json
import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c
from numcodecs.zstd import Zstd

from fastcache.cache_format.schema import UNIT_ROWS, shard_rows
from fastcache.errors import FormatError, IntegrityError

Array = npt.NDArray[Any]
Index = npt.NDArray[np.uint64]

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_ZSTD = {"name": "zstd", "configuration": {"level": 3, "checksum": True}}
ABSENT = np.uint64(2**64 - 1)
"""Offset and length, in a shard's index, of an inner chunk that isn't there."""


def to_bytes(metadata: dict[str, Any]) -> bytes:
    """A `zarr.json`, as zarr-python writes it."""
    return json.dumps(metadata, indent=2).encode()


def group_metadata(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """The `zarr.json` of a group."""
    return {"attributes": attributes or {}, "zarr_format": 3, "node_type": "group"}


def _metadata(
    shape: tuple[int, ...], dtype: str, chunk: tuple[int, ...], codecs: list[Any], attributes: dict[str, Any]
) -> dict[str, Any]:
    return {
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if dtype.startswith("float") else 0,
        "codecs": codecs,
        "attributes": attributes,
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def small_metadata(shape: tuple[int, ...], dtype: str, attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """An array in one chunk, compressed with zstd, whose frame holds a checksum."""
    endian = {"name": "bytes"} if np.dtype(dtype).itemsize == 1 else _BYTES
    return _metadata(shape, dtype, tuple(max(1, size) for size in shape), [endian, _ZSTD], attributes or {})


def unit_metadata(shape: tuple[int, int], dtype: str, logical_dtype: str, unit_rows: int = UNIT_ROWS) -> dict[str, Any]:
    """Rows in shards of uncompressed units, the index at the end."""
    n_rows, n_columns = shape
    endian = {"name": "bytes"} if np.dtype(dtype).itemsize == 1 else _BYTES
    sharding = {
        "chunk_shape": [unit_rows, n_columns],
        "codecs": [endian],
        "index_codecs": [_BYTES, {"name": "crc32c"}],
        "index_location": "end",
    }
    chunk = (shard_rows(n_rows, n_columns, np.dtype(dtype).itemsize, unit_rows), n_columns)
    codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return _metadata(shape, dtype, chunk, codecs, {"logical_dtype": logical_dtype})


def chunk_name(n_dimensions: int, shard: int = 0) -> str:
    """File, below the array's folder, of the only chunk, or of shard number `shard` of the rows."""
    return "/".join(["c", str(shard), *["0"] * (n_dimensions - 1)])


def encode_chunk(values: Array) -> bytes:
    """The only chunk of a small array."""
    return bytes(Zstd(level=3, checksum=True).encode(np.ascontiguousarray(values)))


def _frame_content_size(data: bytes) -> int | None:
    """What the header of a zstd frame says of its size when decoded (RFC 8878, 3.1.1.1); None if it doesn't say."""
    if len(data) < 6 or data[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = data[4]
    is_single_segment = descriptor >> 5 & 1
    n_bytes = (is_single_segment, 2, 4, 8)[descriptor >> 6]
    start = 5 + (1 - is_single_segment) + (0, 1, 2, 4)[descriptor & 3]
    size = int.from_bytes(data[start : start + n_bytes], "little") + (256 if n_bytes == 2 else 0)
    return size if n_bytes and len(data) >= start + n_bytes else None


def decode_chunk(data: bytes, shape: tuple[int, ...], dtype: str, where: str) -> Array:
    """A small array from its chunk; raises `IntegrityError`. Nothing is allocated before shape and chunk agree."""
    n_bytes, found = math.prod(shape) * np.dtype(dtype).itemsize, _frame_content_size(data)
    if found != n_bytes:  # a shorter one would leave the end of the array as it was in memory
        holds = "no zstd frame that says its size" if found is None else f"{found:,} bytes"
        raise IntegrityError(f"{where} holds {holds}, expected {n_bytes:,} bytes.")
    values = np.empty(shape, dtype)
    try:
        Zstd().decode(data, out=values.reshape(-1).view(np.uint8))
    except (RuntimeError, ValueError) as error:
        raise IntegrityError(f"{where} can't be decoded ({error}).") from error
    return values


def index_bytes(n_units: int, n_slots: int, unit_bytes: int) -> bytes:
    """The index of a shard that holds `n_units` units, one behind the other, and has room for `n_slots`."""
    index = np.full((n_slots, 2), ABSENT, np.uint64)
    index[:n_units, 0] = np.arange(n_units, dtype=np.uint64) * np.uint64(unit_bytes)
    index[:n_units, 1] = unit_bytes
    data = index.astype("<u8").tobytes()
    return data + crc32c(data).to_bytes(4, "little")


def parse_index(data: bytes, n_units: int, unit_bytes: int, shard_bytes: int, where: str) -> Index:
    """Offset `[n_units]` of each unit in a shard; raises `IntegrityError`, `FormatError` for offsets that can't be."""
    if crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise IntegrityError(f"The index of {where} differs from its checksum.")
    index = np.frombuffer(data[:-4], "<u8").reshape(-1, 2)
    offsets, lengths = index[:n_units, 0], index[:n_units, 1]
    last = shard_bytes - len(data) - unit_bytes
    if len(index) < n_units or last < 0 or (lengths != unit_bytes).any() or (offsets > np.uint64(max(last, 0))).any():
        raise FormatError(f"The index of {where} points out of the shard.")
    if n_units > 1 and (np.diff(np.sort(offsets)) < unit_bytes).any():
        raise FormatError(f"The index of {where} has units that overlap.")
    if (index[n_units:] != ABSENT).any():
        raise FormatError(f"The index of {where} has units past the end.")
    return offsets.astype(np.uint64)


@lru_cache(64)
def _extended(n_bytes: int) -> list[list[int]]:
    """What `n_bytes` of zeros make of each of the four bytes of a crc32c: a checksum is linear in its bits."""
    zeros = bytes(n_bytes)
    bits = [crc32c(zeros, 1 << bit) ^ crc32c(zeros) for bit in range(32)]
    tables = [[0] for _ in range(4)]
    for bit, value in enumerate(bits):
        tables[bit // 8] += [entry ^ value for entry in tables[bit // 8]]
    return tables


def join_crc32c(first: int, second: int, n_bytes: int) -> int:
    """The crc32c of two stretches of bytes from that of each; the second one has `n_bytes`."""
    a, b, c, d = _extended(n_bytes)
    return a[first & 255] ^ b[first >> 8 & 255] ^ c[first >> 16 & 255] ^ d[first >> 24] ^ second
