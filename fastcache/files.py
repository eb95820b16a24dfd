"""Files that are whole or absent: strict JSON, atomic replacement, fsync."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastcache.errors import FormatError

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
        if path.stat().st_size > MAX_JSON_BYTES:
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
                f"{path}: {name} should be {kind.__name__}, found {value.get(name)!r}. The file is damaged."
            )


def read_json_lines(path: Path, at_most: int | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a log; a torn last line is left out, none is an empty list. Raises `FormatError`.

    With `at_most`, so many of a longer log (2 or more): evenly spread, the first and the last among them.
    """
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


def fsync_directory(path: Path) -> None:
    """Make renames and new names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Flush every file and folder below `root`, and `root` itself, to disk."""
    for folder, _, names in os.walk(root):
        for name in names:
            with Path(folder, name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(folder))


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of `path` at the end of the block: a crash leaves the old file or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # a full disk gets its space back
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data` so that a crash leaves either the old file or the new one."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def readable_json(value: Any) -> bytes:
    """A file for people: sorted keys, a line each; equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def write_json_atomic(path: Path, value: Any) -> None:
    """Replace `path` by the readable JSON of `value`, atomically."""
    write_bytes_atomic(path, readable_json(value))
