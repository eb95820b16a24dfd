"""Where the files of a cache lie, behind one small interface: a local folder, or a bucket (`object_storage.py`).

Names are relative, with `/`. What makes local disks quick or safe (preadv into reused buffers, rename, fsync) stays
behind the interface; so does what object stores need instead (range requests, conditional writes).
"""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from fastcache.errors import FastcacheError, FormatError, IntegrityError, StorageError
from fastcache.files import append_to_log, make_directory, publish_folder, remove, write_bytes_atomic

MAX_SMALL_FILE = 256 * 2**20
"""Bytes of the largest file that is read whole: a manifest, a log, a token array."""


class Storage(Protocol):
    """The files of one cache."""

    @property
    def url(self) -> str:
        """The folder or address, for messages and for opening it again."""

    def read(self, name: str, limit: int = MAX_SMALL_FILE) -> bytes:
        """A whole small file; raises `FileNotFoundError`, and `FormatError` if it has more than `limit` bytes."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset`; raises `IntegrityError` if the file ends before."""

    def will_need(self, name: str, offset: int, length: int) -> None:
        """Say that these bytes will be read soon; only a hint."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Size of every file below `folder`, by name relative to it; empty if there is none.

        Raises `IntegrityError` for a symbolic link.
        """

    def write(self, name: str, data: bytes) -> None:
        """Put `data` in the place of a file, which has the old bytes or the new ones at any moment."""

    def append(self, name: str, old: bytes | bytearray, line: bytes) -> None:
        """Make the file `old + line`, durably; `old` is the good beginning of what was read.

        Raises `BusyError` where another writer is seen to have changed it meanwhile.
        """

    def workspace(self, name: str) -> Path:
        """A new local folder in which to build what `publish` will put at `name`."""

    def publish(self, workspace: Path, name: str) -> None:
        """Put the finished folder at `name`, in the place of anything there, durably."""

    def clear_workspaces(self) -> None:
        """Remove what killed writers left."""

    def zarr_store(self, folder: str) -> Any:
        """The folder as a store for zarr-python."""


class LocalStorage:
    """A folder on a local disk."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def url(self) -> str:
        """The folder."""
        return str(self.root)

    def read(self, name: str, limit: int = MAX_SMALL_FILE) -> bytes:
        """See `Storage`."""
        path = self.root / name
        # A pipe would be waited for forever without O_NONBLOCK.
        with _disk_errors(path), os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{path} is not a plain file.")
            if status.st_size > limit:
                raise FormatError(f"{path} is larger than {limit >> 20} MiB: not a file of fastcache.")
            return file.read()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `Storage`; one `preadv`, straight into the buffer, without the interpreter's lock."""
        try:
            descriptor = os.open(f"{self.root}/{name}", os.O_RDONLY | os.O_NOFOLLOW)
            try:
                while len(buffer):
                    n = os.preadv(descriptor, [buffer], offset)
                    if not n:
                        raise IntegrityError(f"{self.root}/{name} ends before byte {offset + len(buffer):,}.")
                    buffer, offset = buffer[n:], offset + n
            finally:
                os.close(descriptor)
        except OSError as error:
            if isinstance(error, IntegrityError):
                raise
            raise IntegrityError(f"{self.root}/{name} can't be read: {error.strerror}.") from error

    def will_need(self, name: str, offset: int, length: int) -> None:
        """See `Storage`; the kernel begins to read, so that a disk has more to do than threads wait for."""
        with suppress(OSError):  # reading says what is wrong
            descriptor = os.open(f"{self.root}/{name}", os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Storage`."""
        path = self.root
        with _disk_errors(f"{path}/{folder}"):
            for component in folder.split("/") if folder else ():
                path /= component
                if path.is_symlink():
                    raise _link(path)
            return dict(_walk(str(path), "")) if path.is_dir() else {}

    def write(self, name: str, data: bytes) -> None:
        """See `Storage`."""
        path = self.root / name
        make_directory(path.parent)
        write_bytes_atomic(path, data)

    def append(self, name: str, old: bytes | bytearray, line: bytes) -> None:
        """See `Storage`; the caller holds the folder's lock, so nobody else writes."""
        append_to_log(self.root / name, line, len(old))

    def workspace(self, name: str) -> Path:
        """See `Storage`; beside its goal, so that a rename puts it there."""
        folder = self.root / name
        folder = folder.with_name(f".{folder.name}.tmp")
        remove(folder)
        make_directory(folder.parent)
        folder.mkdir()
        return folder

    def publish(self, workspace: Path, name: str) -> None:
        """See `Storage`."""
        publish_folder(workspace, self.root / name)

    def clear_workspaces(self) -> None:
        """See `Storage`."""
        for leftover in [*self.root.glob(".*.tmp"), *self.root.glob("*/.*.tmp")]:
            remove(leftover)

    def zarr_store(self, folder: str) -> Any:
        """See `Storage`."""
        from zarr.storage import LocalStore

        return LocalStore(self.root / folder, read_only=True)


@contextmanager
def _disk_errors(path: Path | str) -> Iterator[None]:
    """Tell an error of the disk while reading as ours; a missing file stays what it is."""
    try:
        yield
    except (FastcacheError, FileNotFoundError):
        raise
    except OSError as error:
        raise StorageError(f"{path} can't be read ({error.strerror}). Mend that and repeat the command.") from error


def _link(path: str | Path) -> IntegrityError:
    return IntegrityError(f"{path} is a symbolic link; a cache holds none. Restore it from a copy.")


def _walk(folder: str, prefix: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                raise _link(entry.path)
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name, entry.stat().st_size
            else:
                raise IntegrityError(f"{entry.path} is neither a file nor a folder. Restore it from a copy.")


def open_storage(place: str | PathLike[str]) -> Storage:
    """The storage at a path, or at an address such as `s3://bucket/folder`."""
    text = os.fspath(place)
    if "://" in text and not text.startswith("file://"):
        from fastcache.cache_format.object_storage import ObjectStorage

        return ObjectStorage(text)
    return LocalStorage(Path(text.removeprefix("file://")))


def local_workspace() -> Path:
    """A new folder for what is built here and stored elsewhere."""
    return Path(tempfile.mkdtemp(prefix="fastcache-"))
