"""Reading one part: its token arrays, its statistics, and its residuals unit by unit, straight from the shard files.

Nothing that a file declares is believed, or allocated for, before it agrees with the log and the manifest.
"""

import math
import threading
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from fastcache.cache_format.arrays import (
    Index,
    chunk_name,
    decode_chunk,
    parse_index,
    residual_metadata,
    small_metadata,
)
from fastcache.cache_format.manifest import Manifest, PartRecord
from fastcache.cache_format.schema import (
    PARTS_FOLDER,
    STORED_DTYPES,
    TOKEN_ARRAYS,
    UNIT_ROWS,
    checksum_array,
    shard_rows,
)
from fastcache.cache_format.statistics import Moments
from fastcache.cache_format.storage import Storage
from fastcache.errors import FormatError, IntegrityError
from fastcache.files import parse_json

Rows = npt.NDArray[np.generic]

RESTORE = "Run `fastcache verify` to see all damage, `fastcache repair` to compute it again."


class Part:
    """One committed part; its arrays are opened when they are first used. Threads may share it."""

    def __init__(self, storage: Storage, record: PartRecord, manifest: Manifest) -> None:
        self.record = record
        self.folder = f"{PARTS_FOLDER}/{record.name}"
        self.path = f"{storage.url}/{self.folder}"
        self._storage = storage
        self._manifest = manifest
        self._residuals: dict[str, ResidualArray] = {}
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
            return self._through_zarr(name)
        data = self._storage.read(f"{self.folder}/{name}/{chunk_name(len(found))}")
        return decode_chunk(data, found, dtype, f"{self.path}/{name}")

    def _through_zarr(self, name: str, selection: Any = ...) -> npt.NDArray[Any]:
        """Values of an array that is laid out otherwise than we do."""
        import zarr

        try:
            array = zarr.open_array(self._storage.zarr_store(f"{self.folder}/{name}"), mode="r")
            return np.asarray(array[selection])
        except (ValueError, RuntimeError, KeyError) as error:  # what codecs say of bytes that they can't decode
            raise IntegrityError(f"{self.path}/{name} can't be decoded ({error}). {RESTORE}") from error

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

    def residual_array(self, hook: str) -> "ResidualArray":
        """The opened array of a hook point."""
        with self._lock:
            if hook not in self._residuals:
                self._residuals[hook] = self._open_residuals(hook)
            return self._residuals[hook]

    def _open_residuals(self, hook: str) -> "ResidualArray":
        metadata = self._metadata(hook)
        dtype = STORED_DTYPES[self._manifest.dtype]
        n_rows, d_in = self._shape(hook, metadata, (self.record.n_tokens, self._manifest.d_in), dtype)
        checksums = self.small(checksum_array(hook), (-(-n_rows // UNIT_ROWS),), "uint32")
        native = metadata == residual_metadata((n_rows, d_in), dtype, self._manifest.dtype)
        return ResidualArray(self, hook, (n_rows, d_in), np.dtype(dtype), checksums, native)

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

    def moments(self, hook: str) -> Moments:
        """The statistics of this part's rows."""
        like = Moments.empty(self._manifest.d_in).arrays()
        return Moments(
            **{
                field: self.small(f"{hook}.statistics.{field}", values.shape, str(values.dtype))
                for field, values in like.items()
            }
        )


class ResidualArray:
    """The residuals of a part at one hook point, on disk."""

    def __init__(
        self,
        part: Part,
        hook: str,
        shape: tuple[int, int],
        dtype: np.dtype[Any],
        checksums: npt.NDArray[np.uint32],
        native: bool,
    ) -> None:
        self.dtype = dtype
        self._part, self._hook = part, hook
        self._shape = shape
        self._checksums = checksums.tolist()
        self._native = native
        self._unit_bytes = UNIT_ROWS * shape[1] * dtype.itemsize
        self._units_per_shard = shard_rows(*shape, dtype.itemsize) // UNIT_ROWS
        self._indices: dict[int, Index] = {}

    def read_unit(self, unit: int, out: Rows, verify: bool = True) -> None:
        """Fill `out` `[n, d_in]`, contiguous, with the rows of a unit (the last one may have fewer than 256).

        Raises `IntegrityError`, which names the unit, if they differ from their checksum.
        """
        if self._native:
            shard, slot = divmod(unit, self._units_per_shard)
            offset = int(self._index(shard)[slot])
            self._part._storage.read_into(self._file(shard), offset, out.data.cast("B"))
        else:
            out[...] = self._part._through_zarr(self._hook, slice(unit * UNIT_ROWS, unit * UNIT_ROWS + len(out)))
        if verify and crc32c(out.data.cast("B")) != self._checksums[unit]:
            raise IntegrityError(
                f"{self._part.path}/{self._hook}: unit {unit} (rows {unit * UNIT_ROWS} to "
                f"{unit * UNIT_ROWS + len(out) - 1}) differs from its checksum: the file is damaged. {RESTORE}"
            )

    def _file(self, shard: int) -> str:
        return f"{self._part.folder}/{self._hook}/{chunk_name(2, shard)}"

    def _index(self, shard: int) -> Index:
        if shard not in self._indices:
            n_units = math.ceil(self._shape[0] / UNIT_ROWS)
            mine = min(self._units_per_shard, n_units - shard * self._units_per_shard)
            size = self._part.record.files[f"{self._hook}/{chunk_name(2, shard)}"][0]
            data = bytearray(16 * self._units_per_shard + 4)
            if size < len(data):
                raise FormatError(f"{self._part.path}/{self._hook}: shard {shard} is too short. {RESTORE}")
            self._part._storage.read_into(self._file(shard), size - len(data), memoryview(data))
            where = f"{self._part.path}/{self._hook}, shard {shard},"
            self._indices[shard] = parse_index(bytes(data), mine, self._unit_bytes, size, where)
        return self._indices[shard]
