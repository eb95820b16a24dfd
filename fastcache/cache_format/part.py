"""Reading one part: its token arrays, its statistics, and its residuals unit by unit, straight from the shard files.

Nothing that a file declares is believed, or allocated for, before it agrees with the log and the manifest.
"""

import math
import threading
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.arrays import chunk_name, decode_chunk, small_metadata, unit_metadata
from fastcache.cache_format.manifest import Manifest, PartRecord
from fastcache.cache_format.quantize import Int8Array, Scheme, int8_array
from fastcache.cache_format.schema import PARTS_FOLDER, STORED_DTYPES, TOKEN_ARRAYS, UNIT_ROWS, checksum_array
from fastcache.cache_format.statistics import GROUPS, Moments
from fastcache.cache_format.storage import Storage
from fastcache.cache_format.unit_array import RESTORE, Rows, UnitArray
from fastcache.errors import FormatError, IntegrityError
from fastcache.files import parse_json

MAX_CHUNK = 2**28
"""Values in the largest chunk that is read through zarr."""


class Part:
    """One committed part; its arrays are opened when they are first used. Threads may share it."""

    def __init__(self, storage: Storage, record: PartRecord, manifest: Manifest) -> None:
        self.record = record
        self.folder = f"{PARTS_FOLDER}/{record.name}"
        self.path = f"{storage.url}/{self.folder}"
        self._storage = storage
        self._manifest = manifest
        self._residuals: dict[str, UnitArray | Int8Array] = {}
        self._lock = threading.Lock()

    @cached_property
    def _whole(self) -> bool:
        """True, once all files are seen to be there with their sizes; raises `IntegrityError`."""
        found = self._storage.sizes(self.folder)
        if not found:
            raise IntegrityError(f"The part {self.path} is listed in the log but missing. {RESTORE}")
        for name, (size, _) in self.record.files.items():
            if found.get(name) != size:
                what = f"has {found[name]} bytes" if name in found else "is missing"
                raise IntegrityError(f"{self.path}/{name} {what}, expected {size} bytes. {RESTORE}")
        return True

    def _metadata(self, name: str) -> dict[str, Any]:
        """The checked beginning of every reading of an array: its zarr.json."""
        assert self._whole  # noqa: S101 - for what it raises
        where = f"{self.path}/{name}/zarr.json"
        if f"{name}/zarr.json" not in self.record.files:
            raise FormatError(f"{self.path} has no array {name!r}.")
        metadata = parse_json(self._storage.read(f"{self.folder}/{name}/zarr.json", 2**20), where)
        if not isinstance(metadata, dict) or metadata.get("node_type") != "array":
            raise FormatError(f"{where} is not the metadata of an array.")
        return metadata

    def _shape(self, name: str, metadata: dict[str, Any], shape: tuple[int | None, ...], dtype: str) -> tuple[int, ...]:
        """The declared shape, which must fit the expected one (None: any length that the part has room for)."""
        declared, kind = metadata.get("shape"), metadata.get("data_type")
        limit = self.record.n_tokens + 1
        if isinstance(declared, list) and len(declared) == len(shape) and kind == dtype:
            pairs = zip(declared, shape, strict=True)
            if all(type(n) is int and (n == size if size is not None else 0 <= n <= limit) for n, size in pairs):
                return tuple(declared)
        raise FormatError(f"{self.path}/{name} should be {dtype} {shape}, found {kind} {declared}. {RESTORE}")

    def small(self, name: str, shape: tuple[int | None, ...], dtype: str) -> npt.NDArray[Any]:
        """A whole small array; raises `FormatError` for another dtype or shape, `IntegrityError` for damage."""
        metadata = self._metadata(name)
        found = self._shape(name, metadata, shape, dtype)
        if metadata != small_metadata(found, dtype, metadata.get("attributes")):
            return self.through_zarr(name)
        if 0 in found:
            return np.empty(found, dtype)
        chunk = f"{name}/{chunk_name(len(found))}"
        self.file_size(chunk)  # raises for a file that nobody checks, for the log doesn't list it
        data = self._storage.read(f"{self.folder}/{chunk}")
        return decode_chunk(data, found, dtype, f"{self.path}/{name}")

    def through_zarr(self, name: str, selection: Any = ...) -> npt.NDArray[Any]:
        """Values of an array that is laid out otherwise than we do."""
        import zarr

        _require_sane_chunks(self._metadata(name), f"{self.path}/{name}")
        try:
            array = zarr.open_array(self._storage.zarr_store(f"{self.folder}/{name}"), mode="r")
            return np.asarray(array[selection])
        except Exception as error:  # zarr and its codecs raise anything for what they can't read
            raise IntegrityError(f"{self.path}/{name} can't be decoded ({error!r}). {RESTORE}") from error

    @cached_property
    def tokens(self) -> dict[str, npt.NDArray[Any]]:
        """The token arrays by name, as docs/FORMAT.md lists them."""
        n, m = self.record.n_tokens, self.record.n_instances
        shapes = {"token_ids": n, "token_types": n, "instance_ids": m, "instance_offsets": m + 1}
        values = {name: self.small(name, (shapes.get(name),), dtype) for name, dtype in TOKEN_ARRAYS.items()}
        for name, count in (("instance_offsets", m), ("document_offsets", len(values["document_ids"]))):
            offsets = values[name]
            if len(offsets) != count + 1 or offsets[0] != 0 or offsets[-1] != n or (np.diff(offsets) <= 0).any():
                raise FormatError(f"{self.path}/{name} should rise from 0 to {n} in {count} steps. {RESTORE}")
        return values

    def residual_array(self, hook: str) -> UnitArray | Int8Array:
        """The opened array of a hook point."""
        if hook in self._residuals:  # without the lock: this is asked for every unit
            return self._residuals[hook]
        with self._lock:
            if hook not in self._residuals:
                self._residuals[hook] = self._open_residuals(hook)
            return self._residuals[hook]

    def _open_residuals(self, hook: str) -> UnitArray | Int8Array:
        dtype, n_rows, d_in = self._manifest.dtype, self.record.n_tokens, self._manifest.d_in
        rows = self._unit_array(hook, (n_rows, d_in), STORED_DTYPES[dtype], dtype)
        if dtype != "int8":
            return rows
        raw_rows = self.small(int8_array(hook, "raw_rows"), (None,), "int64")
        if len(raw_rows) and (raw_rows[0] < 0 or raw_rows[-1] >= n_rows or (np.diff(raw_rows) <= 0).any()):
            raise FormatError(f"{self.path}/{int8_array(hook, 'raw_rows')} should rise within {n_rows} rows. {RESTORE}")
        scales = self._unit_array(int8_array(hook, "scales"), (n_rows, 1), "float32", "float32")
        raw = self._unit_array(int8_array(hook, "raw"), (len(raw_rows), d_in), "float32", "float32", unit_rows=1)
        mean, deviation = (self.small(int8_array(hook, name), (d_in,), "float32") for name in ("mean", "deviation"))
        return Int8Array(rows, scales, raw, raw_rows, Scheme(mean, deviation, np.inf))

    def _unit_array(
        self, name: str, shape: tuple[int, int], dtype: str, logical_dtype: str, unit_rows: int = UNIT_ROWS
    ) -> UnitArray:
        metadata = self._metadata(name)
        self._shape(name, metadata, shape, dtype)
        checksums = self.small(checksum_array(name), (-(-shape[0] // unit_rows),), "uint32")
        native = metadata == unit_metadata(shape, dtype, logical_dtype, unit_rows)
        return UnitArray(self, name, shape, dtype, checksums, native, unit_rows)

    def file_size(self, name: str) -> int:
        """Size in bytes of a file, as the log has it; raises `FormatError` for one that it doesn't list."""
        if name not in self.record.files:
            raise FormatError(f"{self.path} has no file {name}. {RESTORE}")
        return self.record.files[name][0]

    def will_need(self, name: str, offset: int, length: int) -> None:
        """See `Storage.will_need`."""
        self._storage.will_need(f"{self.folder}/{name}", offset, length)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `Storage.read_into`."""
        self._storage.read_into(f"{self.folder}/{name}", offset, buffer)

    def read_unit(self, hook: str, unit: int, out: Rows, verify: bool = True) -> None:
        """Fill `out` `[n, d_in]`, contiguous, with the rows of a unit, of which the last one may have fewer than 256.

        Raises `IntegrityError`, which names the unit, if they differ from their checksum.
        """
        self.residual_array(hook).read_unit(unit, out, verify)

    def rows(self, hook: str, start: int, stop: int, verify: bool = True) -> Rows:
        """Rows `[stop - start, d_in]`, before decoding; raises `IntegrityError` if a unit they touch is damaged."""
        array = self.residual_array(hook)
        first, last = start // UNIT_ROWS, -(-stop // UNIT_ROWS)
        n_rows = min(last * UNIT_ROWS, self.record.n_tokens) - first * UNIT_ROWS
        values = np.empty((max(n_rows, 0), self._manifest.d_in), array.dtype)
        for unit in range(first, last):
            place = (unit - first) * UNIT_ROWS
            array.read_unit(unit, values[place : place + UNIT_ROWS], verify)
        return values[start - first * UNIT_ROWS : stop - first * UNIT_ROWS]

    def squared_error(self, hook: str) -> npt.NDArray[np.float64] | None:
        """Summed squared error `[g]` of quantised rows by group of tokens; None where nothing was lost but rounding."""
        if self._manifest.dtype != "int8":
            return None
        return self.small(int8_array(hook, "squared_error"), (len(GROUPS),), "float64")

    def moments(self, hook: str) -> Moments:
        """The statistics of this part's rows."""
        like = Moments.empty(self._manifest.d_in).arrays()
        return Moments(
            **{
                field: self.small(f"{hook}.statistics.{field}", values.shape, str(values.dtype))
                for field, values in like.items()
            }
        )


def _require_sane_chunks(metadata: dict[str, Any], where: str) -> None:
    """Raise `FormatError` for chunks above `MAX_CHUNK`, or no chunks: zarr allocates a chunk before it looks at it."""
    try:
        chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
        sane = all(type(size) is int and size > 0 for size in chunk) and math.prod(chunk) <= MAX_CHUNK
    except (KeyError, TypeError):
        sane = False
    if not sane:
        raise FormatError(f"{where} should have chunks of at most {MAX_CHUNK:,} values. {RESTORE}")
