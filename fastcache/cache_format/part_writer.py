"""Building one part in a folder of its own, every file written once and in order, with its size and crc32c noted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from fastcache.cache_format.arrays import (
    chunk_name,
    encode_chunk,
    group_metadata,
    index_bytes,
    residual_metadata,
    small_metadata,
    to_bytes,
)
from fastcache.cache_format.manifest import Manifest
from fastcache.cache_format.schema import STORED_DTYPES, TOKEN_ARRAYS, UNIT_ROWS, checksum_array, encode, shard_rows
from fastcache.cache_format.statistics import Moments
from fastcache.errors import FormatError, NonFiniteError

Residuals = npt.NDArray[np.float32]


class Instance(NamedTuple):
    """One sequence as the model sees it."""

    instance_id: int
    """Row of the corpus for `fast`, number of the block for block training."""
    token_ids: npt.NDArray[np.int32]
    token_types: npt.NDArray[np.uint8]
    documents: Sequence[tuple[int, int]]
    """Corpus row and first position of each document in the sequence."""


class Files:
    """The files of a part: each one written once; `entries` holds size and crc32c by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, list[int]] = {}

    def write(self, name: str, data: bytes) -> None:
        """A whole file."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        self.entries[name] = [len(data), crc32c(data)]

    def small(self, name: str, values: npt.NDArray[Any]) -> None:
        """A small array, in one compressed chunk."""
        self.write(f"{name}/zarr.json", to_bytes(small_metadata(values.shape, str(values.dtype))))
        self.write(f"{name}/{chunk_name(values.ndim)}", encode_chunk(values))


class _Shard:
    """One shard file being written, unit by unit."""

    def __init__(self, files: Files, name: str) -> None:
        self._files, self._name = files, name
        path = files.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = path.open("wb")
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
        self._files.entries[self._name] = [self._size, self._crc]

    def close(self) -> None:
        self._file.close()


class _ResidualArray:
    """One residual array being filled in row order, a unit at a time."""

    def __init__(self, files: Files, name: str, shape: tuple[int, int], dtype: str) -> None:
        stored = np.dtype(STORED_DTYPES[dtype])
        self.name = name
        self._files, self._dtype = files, dtype
        self._n_slots = shard_rows(*shape, stored.itemsize) // UNIT_ROWS
        files.write(f"{name}/zarr.json", to_bytes(residual_metadata(shape, str(stored), dtype)))
        self._rows = np.empty((UNIT_ROWS, shape[1]), np.float32)
        self._types = np.empty(UNIT_ROWS, np.uint8)
        self._filled = 0
        self._shard: _Shard | None = None
        self._n_shards = self.n_written = 0
        self._checksums: list[int] = []
        self.moments = Moments.empty(shape[1])

    def append(self, residuals: Residuals, token_types: npt.NDArray[np.uint8]) -> None:
        while len(residuals):
            taken = min(len(residuals), UNIT_ROWS - self._filled)
            place = slice(self._filled, self._filled + taken)
            self._rows[place], self._types[place] = residuals[:taken], token_types[:taken]
            self._filled += taken
            residuals, token_types = residuals[taken:], token_types[taken:]
            if self._filled == UNIT_ROWS:
                self._flush()

    def _flush(self) -> None:
        rows = self._rows[: self._filled]
        self.moments.add(rows, self._types[: self._filled])
        unit = encode(rows, self._dtype)
        self._checksums.append(crc32c(unit.data.cast("B")))
        if len(unit) < UNIT_ROWS:  # the last unit is stored in full size
            unit = np.concatenate([unit, np.zeros((UNIT_ROWS - len(unit), unit.shape[1]), unit.dtype)])
        if self._shard is None:
            self._shard = _Shard(self._files, f"{self.name}/{chunk_name(2, self._n_shards)}")
            self._n_shards += 1
        self._shard.add(unit.data.cast("B"))
        if self._shard.n_units == self._n_slots:
            self._end_shard(unit.nbytes)
        self.n_written += len(rows)
        self._filled = 0

    def _end_shard(self, unit_bytes: int) -> None:
        if self._shard is not None:
            self._shard.finish(self._n_slots, unit_bytes)
            self._shard = None

    def finish(self) -> None:
        """Write what is left, the checksums and the statistics."""
        if self._filled:
            self._flush()
        self._end_shard(UNIT_ROWS * self._rows.shape[1] * np.dtype(STORED_DTYPES[self._dtype]).itemsize)
        self._files.small(checksum_array(self.name), np.array(self._checksums, np.uint32))
        for field, values in self.moments.arrays().items():
            self._files.small(f"{self.name}.statistics.{field}", values)

    def close(self) -> None:
        """Let go of the open file, after an error."""
        if self._shard is not None:
            self._shard.close()


class PartBuilder:
    """The files of a part, from its instances and their residuals; knows nothing of threads and commits."""

    def __init__(self, folder: Path, instances: Sequence[Instance], manifest: Manifest) -> None:
        self.files = Files(folder)
        self.files.write("zarr.json", to_bytes(group_metadata()))
        self._instances = instances
        lengths = [len(instance.token_ids) for instance in instances]
        self._offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.n_tokens = int(self._offsets[-1])
        self._write_tokens()
        shape = (self.n_tokens, manifest.d_in)
        self._arrays = [_ResidualArray(self.files, hook, shape, manifest.dtype) for hook in manifest.hook_points]
        self._next = 0

    def _write_tokens(self) -> None:
        starts = self._offsets.tolist()
        documents = [
            (row, start + position)
            for instance, start in zip(self._instances, starts, strict=False)
            for row, position in instance.documents
        ]
        values = {
            "token_ids": np.concatenate([instance.token_ids for instance in self._instances]),
            "token_types": np.concatenate([instance.token_types for instance in self._instances]),
            "instance_ids": np.array([instance.instance_id for instance in self._instances]),
            "instance_offsets": self._offsets,
            "document_ids": np.array([row for row, _ in documents]),
            "document_offsets": np.array([*(start for _, start in documents), self.n_tokens]),
        }
        for name, dtype in TOKEN_ARRAYS.items():
            self.files.small(name, values[name].astype(dtype))

    def append(self, residuals: dict[str, Residuals]) -> None:
        """Take the residuals `[n, d_in]`, by hook point, of the next instance.

        Raises `NonFiniteError`, which names the instance, for NaN and infinity.
        """
        instance = self._instances[self._next]
        for array in self._arrays:
            rows = np.ascontiguousarray(residuals[array.name], np.float32)
            if len(rows) != len(instance.token_ids):
                raise FormatError(f"{len(rows)} residuals for the {len(instance.token_ids)} tokens of an instance.")
            if not np.isfinite(rows).all():
                bad = ~np.isfinite(rows).all(1)
                raise NonFiniteError(
                    f"Instance {instance.instance_id} has NaN or infinity in {array.name} at {int(bad.sum())} of its "
                    f"{len(rows)} tokens, first at position {int(bad.argmax())}. Nothing of its unit was written. "
                    "Try --model-dtype float32, or leave the row out of the corpus."
                )
            array.append(rows, instance.token_types)
        self._next += 1

    def finish(self) -> dict[str, list[int]]:
        """Write what is left and check that the part is whole; returns its files."""
        for array in self._arrays:
            array.finish()
        rows = {array.n_written for array in self._arrays}
        if self._next != len(self._instances) or rows != {self.n_tokens}:
            raise FormatError(f"A part has {rows} rows, expected {self.n_tokens}.")
        return self.files.entries

    def close(self) -> None:
        """Let go of open files, after an error."""
        for array in self._arrays:
            array.close()
