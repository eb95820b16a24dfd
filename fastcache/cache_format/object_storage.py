"""A cache in a bucket (S3, GCS, Azure), through obstore: range requests to read, conditional writes to commit.

Parts are built in a local folder and uploaded whole before their line is written into the log. The log is replaced only
if it is still the one that was read, and a lease object keeps a second writer out, so neither can spoil the other's work.
Credentials come from the environment or the machine, as for every tool of the provider; none is ever stored or logged.
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastcache.cache_format.storage import MAX_SMALL_FILE, local_workspace
from fastcache.errors import BusyError, FormatError, InputError, IntegrityError, StorageError, first_line, quoted
from fastcache.extras import require_packages

LEASE = ".writer"
PARALLEL_UPLOADS = 8


class ObjectStorage:
    """The objects below an address such as `s3://bucket/folder`; see `Storage` for what the methods do."""

    def __init__(self, address: str) -> None:
        """Raises `InputError` for an address that obstore doesn't know."""
        if address.startswith("memory://"):
            raise InputError(
                f"{quoted(address)} ends with the process: what is written there is lost. Name a bucket or folder."
            )
        require_packages(address, "s3", "obstore")
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        self._url = address.rstrip("/")
        try:
            self._store = from_url(self._url, client_options={"allow_http": True})
        except (BaseError, ValueError) as error:
            raise InputError(f"{address} is no address that can be opened ({first_line(error)}).") from error
        self._versions: dict[str, str | None] = {}
        self._lease: str | None = None

    @property
    def url(self) -> str:
        """The address."""
        return self._url

    def read(self, name: str, limit: int = MAX_SMALL_FILE) -> bytes:
        """See `Storage`; remembers the version, for `append`."""
        with self._errors(name, may_be_missing=True):
            self._versions[name] = None
            found = _obstore().get(self._store, name)
            if found.meta["size"] > limit:
                raise FormatError(f"{self._url}/{name} is larger than {limit >> 20} MiB: not a file of fastcache.")
            self._versions[name] = found.meta["e_tag"]
            return bytes(found.bytes())

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """See `Storage`; one range request."""
        with self._errors(name):
            data = memoryview(_obstore().get_range(self._store, name, start=offset, length=len(buffer)))
        if len(data) != len(buffer):
            raise IntegrityError(f"{self._url}/{name} ends before byte {offset + len(buffer):,}.")
        buffer[:] = data.cast("B")

    def will_need(self, name: str, offset: int, length: int) -> None:
        """See `Storage`; nothing here."""

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Storage`."""
        prefix = f"{folder}/" if folder else ""
        with self._errors(folder):
            batches = _obstore().list(self._store, prefix or None)
            return {entry["path"].removeprefix(prefix): entry["size"] for batch in batches for entry in batch}

    def write(self, name: str, data: bytes) -> None:
        """See `Storage`; object stores replace whole objects."""
        with self._errors(name):
            self._versions[name] = _obstore().put(self._store, name, data)["e_tag"]

    def append(self, name: str, old: bytes | bytearray, line: bytes) -> None:
        """See `Storage`; the object is written anew if it still is the one that was read."""
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        version = self._versions.get(name)
        mode: Any = {"e_tag": version} if version else "create"
        with self._errors(name):
            try:
                self._versions[name] = _obstore().put(self._store, name, bytes(old) + line, mode=mode)["e_tag"]
            except (AlreadyExistsError, PreconditionError) as error:
                raise BusyError(
                    f"{self._url}/{name} was changed by another writer. Nothing of its work was touched; wait for it."
                ) from error

    def workspace(self, name: str) -> Path:
        """See `Storage`; a folder for temporary files."""
        return local_workspace()

    def publish(self, workspace: Path, name: str) -> None:
        """See `Storage`; uploads every file, in several connections, large ones in several requests."""
        self._require_lease()
        old = [f"{name}/{path}" for path in self.sizes(name)]
        files = [path for path in workspace.rglob("*") if path.is_file()]
        with self._errors(name), ThreadPoolExecutor(PARALLEL_UPLOADS) as pool:
            if old:
                _obstore().delete(self._store, old)
            jobs = {f"{name}/{path.relative_to(workspace).as_posix()}": path for path in files}
            list(pool.map(lambda job: _obstore().put(self._store, *job), jobs.items()))
        shutil.rmtree(workspace)

    def clear_workspaces(self) -> None:
        """See `Storage`; nothing is left in the bucket, for parts are uploaded under their own names."""

    def remove(self, folder: str) -> None:
        """Delete all objects below `folder`, or the object of this name."""
        with self._errors(folder):
            names = [f"{folder}/{name}" for name in self.sizes(folder)] or [folder]
            _obstore().delete(self._store, names)

    def zarr_store(self, folder: str) -> Any:
        """See `Storage`."""
        from obstore.store import from_url
        from zarr.storage import ObjectStore

        store = from_url(f"{self._url}/{folder}", client_options={"allow_http": True})
        return ObjectStore(store, read_only=True)

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Be the only writer. Raises `BusyError`, which says who is; a dead process of this machine gives way."""
        from obstore.exceptions import AlreadyExistsError

        mine = json.dumps({"host": platform.node(), "pid": os.getpid()}).encode()
        with self._errors(LEASE):
            try:
                self._lease = _obstore().put(self._store, LEASE, mine, mode="create")["e_tag"]
            except AlreadyExistsError as error:
                holder = self._holder()
                if not _is_dead(holder):
                    raise BusyError(
                        f"Another fastcache process (host {holder.get('host')}, process {holder.get('pid')}) is writing to "
                        f"{self._url}. Wait for it; if it is dead, delete {self._url}/{LEASE} and try again."
                    ) from error
                self._lease = _obstore().put(self._store, LEASE, mine)["e_tag"]
        try:
            yield
        finally:
            self._require_lease()
            self.remove(LEASE)
            self._lease = None

    def _holder(self) -> dict[str, Any]:
        try:
            holder = json.loads(self.read(LEASE, 4096))
        except (ValueError, FormatError):
            return {}
        return holder if isinstance(holder, dict) else {}

    def _require_lease(self) -> None:
        if self._lease is not None and _obstore().head(self._store, LEASE)["e_tag"] != self._lease:
            raise BusyError(f"Another process has taken over {self._url}; this one stops.")

    @contextmanager
    def _errors(self, name: str, may_be_missing: bool = False) -> Iterator[None]:
        """Errors of the network and the provider, said in our words; a missing object or bucket is one, too."""
        from obstore.exceptions import BaseError

        try:
            yield
        except NotImplementedError as error:
            raise InputError(
                f"{self._url} can be read only, if at all ({first_line(error)}). Write into a bucket (s3://, gs://) or a "
                "folder."
            ) from error
        except (BaseError, FileNotFoundError) as error:
            if may_be_missing and isinstance(error, FileNotFoundError):
                raise
            raise StorageError(f"{self._url}/{name}: the object store says: {first_line(error)}") from error


def _obstore() -> Any:
    import obstore

    return obstore


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder of a lease was a process of this machine that runs no more."""
    pid = holder.get("pid")
    if holder.get("host") != platform.node() or type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
