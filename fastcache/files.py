"""Files that are whole or absent: strict JSON, and everything that fastcache writes to a disk.

Nothing else in fastcache opens a file for writing, renames one or flushes one: the order of these operations, which
decides what a crash leaves, and the words for a disk that is full stand here once.
"""

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from fastcache.disk import disk_errors
from fastcache.errors import FormatError, InputError, quoted

MAX_JSON_BYTES = 256 * 2**20
MAX_JSON_DEPTH = 64


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _finite_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large for a number")
    return value


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return mapping


def check_depth(value: Any, depth: int = 0) -> None:
    """Raise `ValueError` for what is nested deeper than `MAX_JSON_DEPTH`."""
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(child, (dict, list)):
            check_depth(child, depth + 1)


def parse_json(text: str | bytes, where: str) -> Any:
    """Strict JSON: no NaN or infinity, no duplicate keys, bounded depth. Raises `FormatError` that names `where`."""
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        hooks: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite_float}
        value = json.loads(decoded, object_pairs_hook=_unique_pairs, **hooks)
        check_depth(value)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not the JSON it should be: {error}.") from error
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from `path`; raises `FormatError` for anything else."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise FormatError(f"{path} is no regular file.")
        if status.st_size > MAX_JSON_BYTES:
            raise FormatError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB: not a file of fastcache.")
        value = parse_json(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise FormatError(f"{path} is missing.") from error
    except OSError as error:
        raise FormatError(f"{path} can't be read: {error.strerror}.") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} should hold a JSON object, not {type(value).__name__}.")
    return value


def require_fields(value: dict[str, Any], fields: Mapping[str, type], path: Path) -> None:
    """Raise `FormatError` unless `value`, read from `path`, has these fields with these types."""
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            raise FormatError(
                f"{path}: {name} should be {kind.__name__}, found {quoted(value.get(name))}. The file is damaged."
            )


def read_json_lines(path: Path, at_most: int | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a log; a torn last line is left out, none is an empty list. Raises `FormatError`.

    With `at_most`, so many of a longer log (2 or more): evenly spread, the first and the last among them.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise FormatError(f"{path} is no regular file.")
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    chosen: Sequence[int] = range(len(lines))
    if at_most is not None and len(lines) > at_most:
        chosen = [number * (len(lines) - 1) // (at_most - 1) for number in range(at_most)]
    values = [parse_json(lines[number], f"{path} line {number + 1}") for number in chosen]
    if not all(isinstance(value, dict) for value in values):
        raise FormatError(f"{path} should hold a JSON object on each line. The file is damaged.")
    return values


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """SHA-256, in hex, of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def fsync_file(path: Path) -> None:
    """Make the bytes of a file durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    """Make renames and new names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Make every file and folder below `root`, and `root` itself, durable."""
    for folder, _, names in os.walk(root):
        for name in names:
            fsync_file(Path(folder, name))
        fsync_directory(Path(folder))


def make_directory(path: Path) -> None:
    """Create a folder, and those above it, so that a crash can't take it away with what is written into it later."""
    if path.is_dir():
        return
    if path.parent != path:
        make_directory(path.parent)
    with disk_errors(path):
        path.mkdir(exist_ok=True)
        with suppress(PermissionError):  # a folder in which one may write, but which one may not open
            fsync_directory(path.parent)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a file of a folder that is still being built: `publish_folder` makes all of it durable."""
    with create_file(path) as file:
        file.write(data)


def create_file(path: Path) -> BinaryIO:
    """Open a new file of a folder that is still being built; the caller turns errors into ours and closes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")


def open_lock(path: Path) -> TextIO:
    """Open the file whose lock keeps two processes apart; it holds nothing, so that it need not be durable."""
    with disk_errors(path):
        return path.open("w")


def publish_folder(folder: Path, final: Path) -> None:
    """Make a finished folder durable and give it the name `final`, beside it, in the place of anything there."""
    with disk_errors(final):
        fsync_tree(folder)
        remove(final)
        folder.rename(final)
        fsync_directory(final.parent)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to write into, which gets the name `final` at the end of the block: a crash leaves all of it or nothing.

    Raises `SpaceError` or `StorageError` if the disk fails; then the new folder has given its space back.
    """
    folder = final.with_name(".tmp")
    with disk_errors(final):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
            publish_folder(folder, final)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """A name to write to, which takes the place of `path` at the end of the block: a crash leaves the old file or the new.

    Without `durable` that holds for killed processes only, not for a machine that loses its power. Raises `SpaceError`
    or `StorageError` if the disk fails; then the old file is still there, and the new one has given its space back.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            yield temporary
            if durable:
                fsync_file(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if durable:
            fsync_directory(path.parent)


def write_bytes_atomic(path: Path, data: bytes, durable: bool = True) -> None:
    """Replace `path` by `data` so that a crash leaves either the old file or the new one; see `atomic_file`."""
    with atomic_file(path, durable) as temporary, temporary.open("wb", buffering=0) as file:
        _write_all(file.fileno(), data)


def write_named_file(path: Path, data: bytes) -> None:
    """Write a page or table that the user named; it takes the place only of an empty file or one with the same first line.

    Raises `InputError` for anything else that is there, which is left as it is.
    """
    require_replaceable(path, data)
    write_bytes_atomic(path, data)


def require_replaceable(path: Path, data: bytes) -> None:
    """Raise `InputError` unless `data` may take the place of `path`: see `write_named_file`."""
    if not path.exists():
        return
    first_line = data.partition(b"\n")[0]
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(first_line)) in (b"", first_line):
                return
    raise InputError(
        f"{path} is there already and is not a file of this kind, so it was left as it is. Choose another name."
    )


def keep_earlier(path: Path, data: bytes) -> Path | None:
    """Copy the file `path`, before `data` takes its place, to a name that follows from what it holds; None if it is the same.

    Raises `InputError` for a file of another kind, see `write_named_file`.
    """
    require_replaceable(path, data)
    if not path.is_file() or not (earlier := path.read_bytes()) or earlier == data:
        return None
    kept = path.with_name(f"{path.stem}-{hashlib.sha256(earlier).hexdigest()[:12]}{path.suffix}")
    write_bytes_atomic(kept, earlier)
    return kept


def append_to_log(path: Path, data: bytes, size: int | None = None, durable: bool = True) -> None:
    """Add `data` to a log behind its first `size` bytes, or at its end; the log is created if it is missing.

    Where the disk fails, the log keeps what it had, without a torn line. Without `durable` the lines are safe only once
    `flush_log` was called. Raises `SpaceError` or `StorageError`.
    """
    with disk_errors(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            start = os.fstat(descriptor).st_size if size is None else size
            os.ftruncate(descriptor, start)
            os.lseek(descriptor, start, os.SEEK_SET)
            try:
                _write_all(descriptor, data)
                if durable:
                    os.fsync(descriptor)
            except BaseException:
                with suppress(OSError):
                    os.ftruncate(descriptor, start)
                raise
        finally:
            os.close(descriptor)
        if durable:
            fsync_directory(path.parent)


def flush_log(path: Path) -> None:
    """Make all lines of a log durable, if there is one."""
    if path.exists():
        with disk_errors(path):
            fsync_file(path)
            fsync_directory(path.parent)


def _write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`: a disk that is nearly full takes a part of it, and only the next call says why."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def readable_json(value: Any) -> bytes:
    """A file for people: sorted keys, a line each; equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace `path` by the readable JSON of `value`, atomically."""
    write_bytes_atomic(path, readable_json(value))
