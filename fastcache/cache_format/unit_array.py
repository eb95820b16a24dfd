"""An array of rows in units, uncompressed, in shard files, with a crc32c for every unit: written in order, read at random."""

import sys
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from fastcache.cache_format.arrays import (
    Index,
    chunk_name,
    encode_chunk,
    index_bytes,
    parse_index,
    small_metadata,
    to_bytes,
    unit_metadata,
)
from fastcache.cache_format.schema import UNIT_ROWS, checksum_array, shard_rows
from fastcache.errors import FormatError, IntegrityError
from fastcache.files import create_file, write_file

Rows = npt.NDArray[np.generic]

RESTORE = "Run `fastcache verify` to see all damage, `fastcache repair` to compute it again."


class Files:
    """The files of a part being built: each one written once; `entries` holds size and crc32c by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, list[int]] = {}

    def write(self, name: str, data: bytes) -> None:
        """A whole file."""
        write_file(self.folder / name, data)
        self.note(name, len(data), crc32c(data))

    def note(self, name: str, size: int, checksum: int) -> None:
        """Enter a file. All parts have the same few names, and keep them as one string each."""
        self.entries[sys.intern(name)] = [size, checksum]

    def small(self, name: str, values: npt.NDArray[Any]) -> None:
        """A small array, in one compressed chunk."""
        self.write(f"{name}/zarr.json", to_bytes(small_metadata(values.shape, str(values.dtype))))
        if values.size:
            self.write(f"{name}/{chunk_name(values.ndim)}", encode_chunk(values))


class _Shard:
    """One shard file being written, unit by unit."""

    def __init__(self, files: Files, name: str) -> None:
        self._files, self._name = files, name
        self._file: BinaryIO = create_file(files.folder / name)
        self._size = self._crc = self.n_units = 0

    def add(self, unit: memoryview) -> None:
        self._write(unit)
        self.n_units += 1

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._size += len(data)
        self._crc = crc32c(data, self._crc)

    def finish(self, n_slots: int, unit_bytes: int) -> None:
        self._write(index_bytes(self.n_units, n_slots, unit_bytes))
        self._file.close()
        self._files.note(self._name, self._size, self._crc)

    def close(self) -> None:
        self._file.close()


class UnitArrayWriter:
    """Takes the units of an array in order; the last one may be short."""

    def __init__(
        self,
        files: Files,
        name: str,
        shape: tuple[int, int],
        dtype: str,
        logical_dtype: str,
        unit_rows: int = UNIT_ROWS,
    ) -> None:
        self.name = name
        self._files, self._unit_rows = files, unit_rows
        self._unit_bytes = unit_rows * shape[1] * np.dtype(dtype).itemsize
        self._n_slots = shard_rows(*shape, np.dtype(dtype).itemsize, unit_rows) // unit_rows
        self._shard: _Shard | None = None
        self._n_shards = self.n_rows = 0
        self._checksums: list[int] = []
        files.write(f"{name}/zarr.json", to_bytes(unit_metadata(shape, dtype, logical_dtype, unit_rows)))

    def add(self, unit: Rows) -> None:
        """Write a unit `[n, columns]`, contiguous."""
        data = unit.data.cast("B")
        self._checksums.append(crc32c(data))
        if self._shard is None:
            self._shard = _Shard(self._files, f"{self.name}/{chunk_name(2, self._n_shards)}")
            self._n_shards += 1
        # The last unit is stored in full size.
        self._shard.add(
            data if len(data) == self._unit_bytes else memoryview(bytes(data).ljust(self._unit_bytes, b"\0"))
        )
        self.n_rows += len(unit)
        if self._shard.n_units == self._n_slots:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._shard is not None:
            self._shard.finish(self._n_slots, self._unit_bytes)
            self._shard = None

    def finish(self) -> None:
        """End the last shard, and write the checksums."""
        self._end_shard()
        self._files.small(checksum_array(self.name), np.array(self._checksums, np.uint32))

    def close(self) -> None:
        """Let go of the open file, after an error."""
        if self._shard is not None:
            self._shard.close()


class _Home(Protocol):
    """What an array needs of its part."""

    @property
    def path(self) -> str: ...
    def file_size(self, name: str) -> int: ...
    def read_into(self, name: str, offset: int, buffer: memoryview) -> None: ...
    def will_need(self, name: str, offset: int, length: int) -> None: ...
    def through_zarr(self, name: str, selection: Any = ...) -> npt.NDArray[Any]: ...


class UnitArray:
    """An array of units on disk."""

    def __init__(
        self,
        home: _Home,
        name: str,
        shape: tuple[int, int],
        dtype: str,
        checksums: npt.NDArray[np.uint32],
        native: bool,
        unit_rows: int = UNIT_ROWS,
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.name = name
        self.shape, self.unit_rows, self.checksums = shape, unit_rows, checksums
        self.native = native
        """Whether it is laid out as we do it; otherwise it is read through zarr."""
        self._home = home
        self.unit_bytes = unit_rows * shape[1] * self.dtype.itemsize
        self.units_per_shard = shard_rows(*shape, self.dtype.itemsize, unit_rows) // unit_rows
        self._indices: dict[int, Index] = {}

    def unit_arrays(self) -> "list[UnitArray]":
        """The arrays of units that it is made of: itself."""
        return [self]

    def read_unit(self, unit: int, out: Rows, verify: bool = True) -> None:
        """Fill `out` `[n, columns]`, contiguous, with the rows of a unit, of which the last one may be short.

        Raises `IntegrityError`, which names the unit, if they differ from their checksum.
        """
        first = unit * self.unit_rows
        if self.native:
            shard, slot = divmod(unit, self.units_per_shard)
            self._home.read_into(self.file(shard), int(self.offsets(shard)[slot]), out.data.cast("B"))
        else:
            out[...] = self._home.through_zarr(self.name, slice(first, first + len(out)))
        if verify and crc32c(out.data.cast("B")) != int(self.checksums[unit]):
            raise IntegrityError(
                f"{self._home.path}/{self.name}: unit {unit} (rows {first} to {first + len(out) - 1}) "
                f"differs from its checksum: the file is damaged. {RESTORE}"
            )

    def file(self, shard: int) -> str:
        """Name, in the part, of a shard."""
        return f"{self.name}/{chunk_name(2, shard)}"

    def will_need(self, unit: int) -> None:
        """Say that a unit will be read soon."""
        if self.native:
            shard, slot = divmod(unit, self.units_per_shard)
            self._home.will_need(self.file(shard), int(self.offsets(shard)[slot]), self.unit_bytes)

    def offsets(self, shard: int) -> Index:
        """Offset of each unit in a shard of a native array; raises `IntegrityError`, `FormatError`."""
        if shard not in self._indices:
            n_units = -(-self.shape[0] // self.unit_rows)
            mine = min(self.units_per_shard, n_units - shard * self.units_per_shard)
            size = self._home.file_size(self.file(shard))
            data = bytearray(16 * self.units_per_shard + 4)
            where = f"{self._home.path}/{self.file(shard)}"
            if size < len(data):
                raise FormatError(f"{where} is too short for a shard. {RESTORE}")
            self._home.read_into(self.file(shard), size - len(data), memoryview(data))
            self._indices[shard] = parse_index(bytes(data), mine, self.unit_bytes, size, where)
        return self._indices[shard]
