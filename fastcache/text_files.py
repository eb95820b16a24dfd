"""Text files that a user names in an option: read whole, after a look at what they are, or refused at once."""

import stat
from pathlib import Path

from fastcache.errors import InputError, first_line, quoted
from fastcache.files import require_replaceable

MAX_TEXT_BYTES = 16 * 2**20
PAGE_BEGINS = "<!doctype html>"
"""The first text of every page that fastcache writes."""

KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def require_regular_file(path: Path, what: str) -> int:
    """The size in bytes of the file at `path`, which messages call `what`.

    Raises `InputError` for what isn't there or can't be looked at, and for directories, pipes and devices: those may have
    no end, or may wait for ever.
    """
    try:
        status = path.stat()
    except OSError as error:
        reason = (
            "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror or first_line(error)
        )
        raise InputError(f"{what} {quoted(str(path))}: {reason}.") from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{what} {quoted(str(path))}: {first_line(error)}.") from error
    for is_kind, name in KINDS:
        if is_kind(status.st_mode):
            raise InputError(f"{what} {quoted(str(path))} is {name}; expected a file.")
    return status.st_size


def require_output_file(path: Path, what: str, begins: str) -> None:
    """Raise `InputError` unless an output can be written to `path`, which messages call `what`.

    It must be no folder, device or address, and an existing file must be an earlier output of the same kind, whose
    first line `begins` is: anything else would be destroyed.
    """
    shown = f"{what} {quoted(str(path))}"
    if not path.name or path.name == "..":
        raise InputError(f"{shown} is no name of a file.")
    if path.parts[0].endswith(":") and len(path.parts) > 1:
        raise InputError(f"{shown} is an address; it is written on this machine only, so give a path.")
    try:
        is_other = path.exists() and not path.is_file()
        holder = next(folder for folder in path.absolute().parents if folder.exists())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{shown} can't be a file: {getattr(error, 'strerror', None) or first_line(error)}."
        ) from error
    if is_other:
        raise InputError(f"{shown} is there already, and is no file. Choose another name.")
    if not holder.is_dir():
        raise InputError(f"{shown}: {holder} is a file, so nothing can be in it. Choose another name.")
    require_replaceable(path, begins.encode())


def read_text_file(path: Path, what: str, at_most: int = MAX_TEXT_BYTES) -> str:
    """The UTF-8 text in the file at `path`, which messages call `what`, such as the option that named it.

    Raises `InputError` for what is no regular file, can't be read, has more than `at_most` bytes, or is no text.
    """
    if require_regular_file(path, what) > at_most:
        raise InputError(f"{what} {quoted(str(path))} is larger than {at_most >> 20} MiB; expected a small text file.")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} {quoted(str(path))} can't be read: {error.strerror or first_line(error)}.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{what} {quoted(str(path))} is not UTF-8 text (line {line}). Save it as UTF-8.") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{what} {quoted(str(path))} is not text: it holds a NUL character (line {line}).")
    return text
