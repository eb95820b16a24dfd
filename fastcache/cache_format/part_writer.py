"""Building one part in a folder of its own, every file written once and in order, with its size and crc32c noted."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.arrays import group_metadata, to_bytes
from fastcache.cache_format.manifest import Manifest
from fastcache.cache_format.quantize import Int8Writer
from fastcache.cache_format.schema import STORED_DTYPES, TOKEN_ARRAYS, UNIT_ROWS, encode
from fastcache.cache_format.statistics import Moments
from fastcache.cache_format.unit_array import Files, UnitArrayWriter
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


class _PlainWriter:
    """Writes the rows of one hook point in their dtype."""

    def __init__(self, files: Files, hook: str, shape: tuple[int, int], dtype: str) -> None:
        self._dtype = dtype
        self._rows = UnitArrayWriter(files, hook, shape, STORED_DTYPES[dtype], dtype)
        self.finish, self.close = self._rows.finish, self._rows.close

    @property
    def n_rows(self) -> int:
        return self._rows.n_rows

    def add(self, unit: Residuals) -> None:
        self._rows.add(encode(unit, self._dtype))


class _ResidualArray:
    """One residual array being filled in row order, a unit at a time, with its statistics."""

    def __init__(self, files: Files, name: str, shape: tuple[int, int], dtype: str) -> None:
        self.name = name
        self._files = files
        self._writer = Int8Writer(files, name, shape) if dtype == "int8" else _PlainWriter(files, name, shape, dtype)
        self._rows = np.empty((UNIT_ROWS, shape[1]), np.float32)
        self._types = np.empty(UNIT_ROWS, np.uint8)
        self._filled = 0
        self._moments = Moments.empty(shape[1])

    @property
    def n_rows(self) -> int:
        return self._writer.n_rows

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
        rows, types = self._rows[: self._filled], self._types[: self._filled]
        self._moments.add(rows, types)
        if isinstance(self._writer, Int8Writer):
            self._writer.add(rows, types)
        else:
            self._writer.add(rows)
        self._filled = 0

    def finish(self) -> None:
        """Write what is left, the checksums and the statistics."""
        if self._filled:
            self._flush()
        self._writer.finish()
        for field, values in self._moments.arrays().items():
            self._files.small(f"{self.name}.statistics.{field}", values)

    def close(self) -> None:
        """Let go of open files, after an error."""
        self._writer.close()


class ArraysBuilder:
    """The residual arrays of a part, from its instances and their residuals; knows nothing of threads and commits."""

    def __init__(self, folder: Path, instances: Sequence[Instance], manifest: Manifest) -> None:
        """`manifest` names the hook points that are written."""
        self.files = Files(folder)
        self._instances = instances
        lengths = [len(instance.token_ids) for instance in instances]
        self._offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.n_tokens = int(self._offsets[-1])
        shape = (self.n_tokens, manifest.d_in)
        self._arrays = [_ResidualArray(self.files, hook, shape, manifest.dtype) for hook in manifest.hook_points]
        self._next = 0

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
                    "Try `fastcache extract --model-dtype float32`, or leave the row out of the corpus."
                )
            array.append(rows, instance.token_types)
        self._next += 1

    def finish(self) -> dict[str, list[int]]:
        """Write what is left and check that the part is whole; returns its files."""
        for array in self._arrays:
            array.finish()
        rows = {array.n_rows for array in self._arrays}
        if self._next != len(self._instances) or rows != {self.n_tokens}:
            raise FormatError(f"A part has {rows} rows, expected {self.n_tokens}.")
        return self.files.entries

    def close(self) -> None:
        """Let go of open files, after an error."""
        for array in self._arrays:
            array.close()


class PartBuilder(ArraysBuilder):
    """All files of a part: its tokens, too."""

    def __init__(self, folder: Path, instances: Sequence[Instance], manifest: Manifest) -> None:
        super().__init__(folder, instances, manifest)
        self.files.write("zarr.json", to_bytes(group_metadata()))
        self._write_tokens()

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
