"""Writing a cache: parts are built under a temporary name, flushed, renamed, and then logged.

A crash at any moment leaves committed parts as they are and at most one temporary folder, which the next writer
removes. Nothing in a part depends on the time or the machine, so a repeated part is equal byte for byte. Encoding,
statistics and the disk are the business of a thread of its own.
"""

import shutil
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from crc32c import crc32c

from fastcache.cache_format.arrays import group_metadata, to_bytes
from fastcache.cache_format.background import Background
from fastcache.cache_format.manifest import Log, Manifest, PartRecord, load_manifest, read_log
from fastcache.cache_format.part_writer import ArraysBuilder, Instance, PartBuilder, Residuals
from fastcache.cache_format.schema import FORMAT_VERSION, MANIFEST_FILE, PARTS_FOLDER
from fastcache.cache_format.storage import Storage, open_storage
from fastcache.config import differences, other_settings
from fastcache.disk import disk_error
from fastcache.errors import FastcacheError, FormatError, MismatchError

QUEUE_BYTES = 512 * 2**20


def groups(format_version: str = FORMAT_VERSION) -> dict[str, bytes]:
    """The metadata files above the parts."""
    return {
        "zarr.json": to_bytes(group_metadata({"fastcache_format_version": format_version})),
        f"{PARTS_FOLDER}/zarr.json": to_bytes(group_metadata()),
    }


def write_groups(storage: Storage, manifest: Manifest) -> None:
    """Write the metadata files above the parts, and note them in `manifest`."""
    files = groups(manifest.format_version)
    manifest.files = {name: [len(data), crc32c(data)] for name, data in files.items()}
    for name, data in files.items():
        storage.write(name, data)


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Turn an error of the disk while `where` is written into a `SpaceError` or a `StorageError`."""
    try:
        yield
    except FastcacheError:
        raise
    except OSError as error:
        raise disk_error(error, where, "All earlier parts are safe; the same command goes on from there.") from error


class PartSink:
    """Where a worker process writes parts: it puts them in their place, and leaves the log to the process that owns it."""

    def __init__(self, storage: Storage, manifest: Manifest, queue_bytes: int = QUEUE_BYTES) -> None:
        self.storage, self.manifest = storage, manifest
        self.background = Background(queue_bytes)
        self.publishing = Background(1)
        """Flushes one part to disk while the next is built."""

    def part(self, index: int, instances: Sequence[Instance]) -> "PartWriter":
        """A writer of part `index` with these instances."""
        return PartWriter(self, index, instances)

    def builder(self, folder: Path, instances: Sequence[Instance]) -> ArraysBuilder:
        """What makes the files of a part in `folder`."""
        return PartBuilder(folder, instances, self.manifest)

    def put(self, folder: Path, record: PartRecord) -> None:
        """Put the finished files of a part in their place, durably."""
        self.storage.publish(folder, f"{PARTS_FOLDER}/{record.name}")

    def log_part(self, record: PartRecord) -> None:
        """Nothing: see `CacheWriter.log_part`."""

    def drain(self) -> None:
        """Wait until everything that was given is on disk; raises what went wrong."""
        self.background.drain()
        self.publishing.drain()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.drain()
        finally:
            self.background.close()
            self.publishing.close()


class PartWriter:
    """One part; `append` takes the residuals of its instances in the same order."""

    def __init__(self, writer: PartSink, index: int, instances: Sequence[Instance]) -> None:
        self._writer, self.index = writer, index
        self._instances = instances
        self._builder: ArraysBuilder | None = None
        self._folder: Path | None = None
        writer.background.submit(0, self._begin)

    def _begin(self) -> None:
        with self._guarded():
            self._folder = self._writer.storage.workspace(f"{PARTS_FOLDER}/{self.index:08d}")
            self._builder = self._writer.builder(self._folder, self._instances)

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
    def _open_builder(self) -> ArraysBuilder:
        if self._builder is None:
            raise FormatError(f"Part {self.index} was not begun.")
        return self._builder

    def commit_soon(self, ledger: dict[str, Any]) -> "Future[PartRecord]":
        """Have the part checked, flushed to disk, given its name, and logged: from then on it exists."""
        done: Future[PartRecord] = Future()
        self._writer.background.submit(0, lambda: self._finish(ledger, done)).add_done_callback(partial(_pass_on, done))
        return done

    def commit(self, ledger: dict[str, Any]) -> PartRecord:
        """`commit_soon`, done when it returns."""
        return self.commit_soon(ledger).result()

    def _finish(self, ledger: dict[str, Any], done: "Future[PartRecord]") -> None:
        with self._guarded():
            builder = self._open_builder
            files = builder.finish()
            record = PartRecord(self.index, builder.n_tokens, len(self._instances), ledger, files)
            future = self._writer.publishing.submit(1, lambda: self._publish(record))  # waits for the part before
        future.add_done_callback(partial(_pass_on, done))

    def _publish(self, record: PartRecord) -> PartRecord:
        with self._guarded():
            assert self._folder is not None  # noqa: S101 - it was made with the builder
            self._writer.put(self._folder, record)
            self._writer.log_part(record)
            return record

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Says what an error of the disk means, and leaves nothing half-written."""
        try:
            with storage_errors(f"Part {self.index} of {self._writer.storage.url}"):
                yield
        except BaseException:
            self.abandon()
            raise

    def abandon_soon(self) -> None:
        """Have the part forgotten."""
        self._writer.background.submit(0, self.abandon)

    def abandon(self) -> None:
        """Remove what was written, after an error: a full disk gets its space back."""
        if self._builder is not None:
            with suppress(OSError):  # a full disk refuses what was still to be written
                self._builder.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _pass_on(done: "Future[PartRecord]", step: "Future[PartRecord | None]") -> None:
    """Settle a commit by what became of one of its two steps; the first one gives no record."""
    if done.done():
        return
    if step.cancelled():
        done.cancel()
    elif error := step.exception():
        done.set_exception(error)
    elif record := step.result():
        done.set_result(record)


class CacheWriter(PartSink):
    """A cache being written, new or resumed."""

    def __init__(
        self,
        root: Path | str | Storage,
        manifest: Manifest,
        replace: Collection[int] = (),
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        """`replace` names parts to be made anew (a repair): committed ones, or some whose lines were lost.

        Raises `MismatchError`, naming the fields, if `root` holds a cache with another identity.
        """
        self.storage = open_storage(root) if isinstance(root, str | Path) else root
        with storage_errors(self.storage.url):
            manifest = self._open(manifest)
            self.storage.clear_workspaces()
            self._log = Log(self.storage)
        super().__init__(self.storage, manifest, queue_bytes)
        self._replaced = set(replace)
        self.logged = {record.index: record for record in self._log.records}
        """What the log listed at the beginning."""
        self.committed = {index: record for index, record in self.logged.items() if index not in self._replaced}

    def _open(self, manifest: Manifest) -> Manifest:
        """The manifest that is there, if it says the same; otherwise a new one."""
        try:
            found = load_manifest(self.storage)
        except FormatError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            return self._begin(manifest)
        if changed := differences(found.identity, manifest.identity):
            raise MismatchError(other_settings(self.storage.url, changed))
        found.require_writable(self.storage.url)
        return found

    def _begin(self, manifest: Manifest) -> Manifest:
        """Make the groups, then the manifest: a cache without it is none."""
        if read_log(self.storage):
            raise FormatError(
                f"{self.storage.url} has parts but no {MANIFEST_FILE}, which says what they are. "
                "Restore it from a copy, choose another --out, or start over with --fresh."
            )
        write_groups(self.storage, manifest)
        manifest.save(self.storage)
        return manifest

    def save_manifest(self) -> None:
        """Write what `manifest` says now."""
        with storage_errors(f"{self.storage.url}/{MANIFEST_FILE}"):
            self.manifest.save(self.storage)

    def part(self, index: int, instances: Sequence[Instance]) -> PartWriter:
        """A writer of part `index` with these instances; raises `FormatError` if it is committed already."""
        if index in self.committed:
            raise FormatError(f"Part {index} of {self.storage.url} is committed; parts never change.")
        return PartWriter(self, index, instances)

    def log_part(self, record: PartRecord) -> None:
        """Write the line that makes a part exist."""
        if record.index not in self._replaced:
            self._log.append(record)
        elif self.logged.get(record.index) != record:
            self._log.replace(record)
        self.committed[record.index] = record
