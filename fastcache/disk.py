"""What a disk that is full or fails says, in our words, whichever library was writing."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from fastcache.errors import FastcacheError, SpaceError, StorageError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KEPT = "What was finished before is kept; the same command goes on from there."

_NUMBER = re.compile(r"\b(?:os error|errno) (\d+)\b", re.IGNORECASE)


def error_number(error: BaseException) -> int | None:
    """The errno behind an exception, or None.

    Rust libraries (safetensors) raise exceptions of their own and give the number only in the text: "(os error 28)".
    """
    if isinstance(error, OSError) and error.errno:
        return error.errno
    match = _NUMBER.search(str(error))
    return int(match[1]) if match else None


@contextmanager
def disk_errors(path: str | PathLike[str], kept: str = KEPT) -> Iterator[None]:
    """Turn an error of the disk while `path`, or something in its folder, is written into one of ours.

    A full disk, an exhausted quota and a limit on the size of files become a `SpaceError`, anything else a
    `StorageError`. `kept` says what is safe and what to do next. Errors that name a file in another folder pass.
    """
    where = os.fspath(path)
    try:
        yield
    except FastcacheError:
        raise
    except Exception as error:
        number = error_number(error)
        if number is None and not isinstance(error, OSError):
            raise
        if _is_elsewhere(error, Path(where)):
            raise
        raise disk_error(error, where, kept) from error


def disk_error(error: BaseException, where: str, kept: str = KEPT) -> SpaceError | StorageError:
    """Our error for `error`, which a library or the system raised while `where` was written."""
    number = error_number(error)
    reason = str(error) if number is None else os.strerror(number)
    if number in NO_SPACE:
        limit = " or a limit on the size of files is reached" if number == errno.EFBIG else ""
        return SpaceError(
            f"{where} could not be written: the disk is full{limit} ({reason}). Free some space, or write to another "
            f"disk. {kept}"
        )
    if number is None:  # numpy's tofile says how much it wrote, but not why it stopped
        return StorageError(
            f"{where} was written only in part ({reason}); the disk may be full. Free some space, or write to another "
            f"disk. {kept}"
        )
    return StorageError(
        f"{where} could not be written ({reason}). Mend the disk or its permissions, or write to another disk. {kept}"
    )


def _is_elsewhere(error: Exception, path: Path) -> bool:
    """Whether the error names a file that has nothing to do with `path`: one that was read at the same time."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str | bytes):
        return False
    named = Path(name.decode(errors="replace") if isinstance(name, bytes) else name)
    return path not in named.parents and named.parent not in (path, path.parent) and named not in (path, *path.parents)
