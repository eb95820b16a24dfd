"""Writing a cache: parts are built under a temporary name, flushed, renamed, and then logged.

A crash at any moment leaves committed parts as they are and at most one temporary folder, which the next writer
removes. Nothing in a part depends on the time or the machine, so a repeated part is equal byte for byte. Encoding,
statistics and the disk are the business of a thread of its own.
"""

import errno
import shutil
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any

from crc32c import crc32c

from fastcache.cache_format.arrays import group_metadata, to_bytes
from fastcache.cache_format.background import Background
from fastcache.cache_format.manifest import Log, Manifest, PartRecord, load_manifest
from fastcache.cache_format.part_writer import Instance, PartBuilder, Residuals
from fastcache.cache_format.schema import FORMAT_VERSION, PARTS_FOLDER
from fastcache.cache_format.storage import Storage, open_storage
from fastcache.config import differences
from fastcache.errors import FastcacheError, FormatError, MismatchError, SpaceError, StorageError

QUEUE_BYTES = 512 * 2**20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

GROUPS = {
    "zarr.json": to_bytes(group_metadata({"fastcache_format_version": FORMAT_VERSION})),
    f"{PARTS_FOLDER}/zarr.json": to_bytes(group_metadata()),
}
"""The metadata files above the parts."""


class PartWriter:
    """One part; `append` takes the residuals of its instances in the same order."""

    def __init__(self, writer: "CacheWriter", index: int, instances: Sequence[Instance]) -> None:
        self._writer, self.index = writer, index
        self._instances = instances
        self._builder: PartBuilder | None = None
        self._folder: Path | None = None
        writer.background.submit(0, self._begin)

    def _begin(self) -> None:
        with self._guarded():
            self._folder = self._writer.storage.workspace(f"{PARTS_FOLDER}/{self.index:08d}")
            self._builder = PartBuilder(self._folder, self._instances, self._writer.manifest)

    def append(self, residuals: dict[str, Residuals]) -> None:
        """Take the residuals `[n, d_in]`, by hook point, of the next instance; the arrays must not change afterwards.

        Blocks while the queue is full. Raises what went wrong before: `NonFiniteError`, which names the instance,
        `SpaceError`, `StorageError`.
        """
        n_bytes = sum(rows.nbytes for rows in residuals.values())
        self._writer.background.submit(n_bytes, lambda: self._append(residuals))

    def _append(self, residuals: dict[str, Residuals]) -> None:
        with self._guarded():
            self._open_builder.append(residuals)

    @property
    def _open_builder(self) -> PartBuilder:
        if self._builder is None:
            raise FormatError(f"Part {self.index} was not begun.")
        return self._builder

    def commit_soon(self, ledger: dict[str, Any]) -> "Future[PartRecord]":
        """Have the part checked, flushed to disk, given its name, and logged: from then on it exists."""
        return self._writer.background.submit(0, lambda: self._commit(ledger))

    def commit(self, ledger: dict[str, Any]) -> PartRecord:
        """`commit_soon`, done when it returns."""
        return self.commit_soon(ledger).result()

    def _commit(self, ledger: dict[str, Any]) -> PartRecord:
        with self._guarded():
            builder, folder = self._open_builder, self._folder
            files = builder.finish()
            record = PartRecord(self.index, builder.n_tokens, len(self._instances), ledger, files)
            assert folder is not None  # noqa: S101 - it was made with the builder
            self._writer.storage.publish(folder, f"{PARTS_FOLDER}/{record.name}")
            self._writer.log_part(record)
            return record

    def _guarded(self) -> "_Guard":
        return _Guard(self)

    def abandon(self) -> None:
        """Remove what was written, after an error: a full disk gets its space back."""
        if self._builder is not None:
            self._builder.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Guard:
    """Says what an error of the disk means, and leaves nothing half-written."""

    def __init__(self, part: PartWriter) -> None:
        self._part = part

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            return
        self._part.abandon()
        if isinstance(error, OSError) and not isinstance(error, FastcacheError):
            where = f"Part {self._part.index} of {self._part._writer.storage.url}"
            safe = "All earlier parts are safe; the same command goes on from there."
            if error.errno in NO_SPACE:
                raise SpaceError(f"{where}: the disk is full ({error.strerror}). Free some space. {safe}") from error
            raise StorageError(f"{where} could not be written ({error}). {safe}") from error


class CacheWriter:
    """A cache being written, new or resumed."""

    def __init__(
        self,
        root: Path | str | Storage,
        manifest: Manifest,
        replace: Collection[int] = (),
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        """`replace` names committed parts to be made anew (a repair).

        Raises `MismatchError`, naming the fields, if `root` holds a cache with another identity.
        """
        self.storage = open_storage(root) if isinstance(root, str | Path) else root
        try:
            self.manifest = load_manifest(self.storage)
        except FormatError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            self.manifest = self._begin(manifest)
        if found := differences(self.manifest.identity, manifest.identity):
            raise MismatchError(
                f"{self.storage.url} was begun with other settings ({'; '.join(found)}). "
                "Repeat the settings it was begun with, choose another --out, or start over with --fresh."
            )
        self.storage.clear_workspaces()
        self._log = Log(self.storage)
        self._replaced = set(replace)
        self.committed = {record.index: record for record in self._log.records if record.index not in self._replaced}
        self.background = Background(queue_bytes)

    def _begin(self, manifest: Manifest) -> Manifest:
        """Make the groups, then the manifest: a cache without it is none."""
        manifest.files = {name: [len(data), crc32c(data)] for name, data in GROUPS.items()}
        for name, data in GROUPS.items():
            self.storage.write(name, data)
        manifest.save(self.storage)
        return manifest

    def part(self, index: int, instances: Sequence[Instance]) -> PartWriter:
        """A writer of part `index` with these instances; raises `FormatError` if it is committed already."""
        if index in self.committed:
            raise FormatError(f"Part {index} of {self.storage.url} is committed; parts never change.")
        return PartWriter(self, index, instances)

    def log_part(self, record: PartRecord) -> None:
        """Write the line that makes a part exist."""
        if record.index in self._replaced:
            self._log.replace(record)
        else:
            self._log.append(record)
        self.committed[record.index] = record

    def drain(self) -> None:
        """Wait until everything that was given is on disk; raises what went wrong."""
        self.background.drain()

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.drain()
        finally:
            self.background.close()
