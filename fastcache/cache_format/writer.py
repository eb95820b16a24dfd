"""Writing a cache: parts are built under a temporary name, checked, flushed, renamed, and then logged.

A crash at any moment leaves committed parts as they are and at most one temporary folder, which the next writer
removes. Nothing in a part depends on the time or the machine, so a repeated part is equal byte for byte.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, ShardingCodec, ZstdCodec
from zarr.core.array_spec import ArrayConfigParams

from fastcache.cache_format.manifest import Manifest, PartRecord, append_log, load_manifest, read_log
from fastcache.cache_format.schema import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    PARTS_FOLDER,
    STORED_DTYPES,
    TOKEN_ARRAYS,
    UNIT_ROWS,
    checksum_array,
    encode,
    shard_rows,
)
from fastcache.cache_format.statistics import Moments
from fastcache.config import differences
from fastcache.errors import FormatError, MismatchError, NonFiniteError
from fastcache.files import fsync_directory, fsync_tree

WHOLE_CHUNKS: ArrayConfigParams = {"write_empty_chunks": True}
"""Zarr leaves out chunks of zeros unless told otherwise; a whole file is checkable, a missing one isn't."""


class Instance(NamedTuple):
    """One sequence as the model sees it."""

    instance_id: int
    """Row of the corpus for `fast`, number of the block for block training."""
    token_ids: npt.NDArray[np.int32]
    token_types: npt.NDArray[np.uint8]
    documents: Sequence[tuple[int, int]]
    """Corpus row and first position of each document in the sequence."""


def _create(group: zarr.Group, name: str, data: npt.NDArray[Any], attributes: dict[str, Any] | None = None) -> None:
    """A small array in one chunk, compressed, with zstd's own checksum inside."""
    group.create_array(
        name,
        shape=data.shape,
        dtype=data.dtype,
        chunks=tuple(max(1, size) for size in data.shape),
        compressors=ZstdCodec(level=3, checksum=True),
        attributes=attributes,
        config=WHOLE_CHUNKS,
    )[...] = data


class _ResidualArray:
    """One residual array being filled in row order, a whole shard at a time."""

    def __init__(self, group: zarr.Group, name: str, shape: tuple[int, int], dtype: str) -> None:
        stored = np.dtype(STORED_DTYPES[dtype])
        rows = shard_rows(shape[0], shape[1], stored.itemsize)
        self.name = name
        self._group = group
        self._dtype = dtype
        self._array = group.create_array(
            name,
            shape=shape,
            dtype=stored,
            chunks=(rows, shape[1]),
            serializer=ShardingCodec(chunk_shape=(UNIT_ROWS, shape[1]), codecs=[BytesCodec()]),
            compressors=None,
            filters=None,
            attributes={"logical_dtype": dtype},
            config=WHOLE_CHUNKS,
        )
        self._buffer = np.empty((rows, shape[1]), stored)
        self._filled = self._written = 0
        self._checksums: list[int] = []
        self.moments = Moments.empty(shape[1])

    def append(self, residuals: npt.NDArray[np.float32], token_types: npt.NDArray[np.uint8]) -> None:
        stored = encode(residuals, self._dtype)
        self.moments.add(residuals, token_types)
        while len(stored):
            taken = min(len(stored), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + taken] = stored[:taken]
            self._filled += taken
            stored = stored[taken:]
            if self._filled == len(self._buffer):
                self._flush()

    def _flush(self) -> None:
        rows = self._buffer[: self._filled]
        self._array[self._written : self._written + len(rows)] = rows
        units = (rows[start : start + UNIT_ROWS] for start in range(0, len(rows), UNIT_ROWS))
        self._checksums += [google_crc32c.value(unit.tobytes()) for unit in units]
        self._written += len(rows)
        self._filled = 0

    def finish(self) -> int:
        """Write what is left, the checksums and the statistics; returns the number of rows."""
        if self._filled:
            self._flush()
        _create(self._group, checksum_array(self.name), np.array(self._checksums, np.uint32))
        for field, values in self.moments.arrays().items():
            _create(self._group, f"{self.name}.statistics.{field}", values)
        return self._written


class PartWriter:
    """Builds one part from its instances; `append` takes their residuals in the same order."""

    def __init__(self, root: Path, index: int, instances: Sequence[Instance], manifest: Manifest) -> None:
        self.index = index
        self._root = root
        self._instances = instances
        self._folder = root / PARTS_FOLDER / f".{index:08d}.tmp"
        shutil.rmtree(self._folder, ignore_errors=True)
        group = zarr.create_group(self._folder)
        lengths = [len(instance.token_ids) for instance in instances]
        self._offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self.n_tokens = int(self._offsets[-1])
        self._write_tokens(group)
        shape = (self.n_tokens, manifest.d_in)
        self._arrays = [_ResidualArray(group, hook, shape, manifest.dtype) for hook in manifest.hook_points]
        self._next = 0

    def _write_tokens(self, group: zarr.Group) -> None:
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
            _create(group, name, values[name].astype(dtype))

    def append(self, residuals: dict[str, npt.NDArray[np.float32]]) -> None:
        """Take the residuals `[n, d_in]`, by hook point, of the next instance.

        Raises `NonFiniteError`, which names the instance, for NaN and infinity.
        """
        instance = self._instances[self._next]
        for array in self._arrays:
            rows = np.ascontiguousarray(residuals[array.name], np.float32)
            if len(rows) != len(instance.token_ids):
                raise FormatError(f"{len(rows)} residuals for the {len(instance.token_ids)} tokens of an instance.")
            bad = ~np.isfinite(rows).all(1)
            if bad.any():
                position = int(bad.argmax())
                raise NonFiniteError(
                    f"Instance {instance.instance_id} has NaN or infinity in {array.name} at {int(bad.sum())} of its "
                    f"{len(rows)} tokens, first at position {position}. Nothing of its unit was written. "
                    "Try --model-dtype float32, or leave the row out of the corpus."
                )
            array.append(rows, instance.token_types)
        self._next += 1

    def commit(self, ledger: dict[str, Any]) -> PartRecord:
        """Check the part, flush it to disk, give it its name, and log it: from now on it exists."""
        rows = {array.finish() for array in self._arrays}
        if self._next != len(self._instances) or rows != {self.n_tokens}:
            raise FormatError(f"Part {self.index} has {rows} rows, expected {self.n_tokens}.")
        files = {}
        for path in sorted(self._folder.rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                files[path.relative_to(self._folder).as_posix()] = [len(data), google_crc32c.value(data)]
        fsync_tree(self._folder)
        final = self._folder.with_name(f"{self.index:08d}")
        shutil.rmtree(final, ignore_errors=True)  # renamed, but never logged: a crash in between
        self._folder.rename(final)
        fsync_directory(final.parent)
        record = PartRecord(self.index, self.n_tokens, len(self._instances), ledger, files)
        append_log(self._root, record)
        return record


class CacheWriter:
    """A cache being written at `root`, new or resumed."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        """Raises `MismatchError`, naming the fields, if `root` holds a cache with another identity."""
        self.root = root
        if (root / MANIFEST_FILE).exists():
            self.manifest = load_manifest(root)
            if found := differences(self.manifest.identity, manifest.identity):
                raise MismatchError(
                    f"{root} was begun with other settings ({'; '.join(found)}). "
                    "Repeat the settings it was begun with, choose another --out, or start over with --fresh."
                )
        else:
            self.manifest = manifest
            self._create_groups()
            manifest.save(root)
        for leftover in (root / PARTS_FOLDER).glob(".*.tmp"):
            shutil.rmtree(leftover)
        self.committed = {record.index: record for record in read_log(root)}

    def _create_groups(self) -> None:
        """Make the root group and the group of the parts, unless a killed run has made them."""
        attributes = {"fastcache_format_version": FORMAT_VERSION}
        for folder, given in ((self.root, attributes), (self.root / PARTS_FOLDER, {})):
            if not (folder / "zarr.json").exists():
                zarr.create_group(folder, attributes=given)
            fsync_tree(folder)

    def part(self, index: int, instances: Sequence[Instance]) -> PartWriter:
        """A writer of part `index` with these instances; raises `FormatError` if it is committed already."""
        if index in self.committed:
            raise FormatError(f"Part {index} of {self.root} is committed; parts never change.")
        return PartWriter(self.root, index, instances, self.manifest)
