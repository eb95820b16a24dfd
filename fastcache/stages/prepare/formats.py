"""What is in a file: told by how its contents begin, since names are often wrong."""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from fastcache.errors import InputError
from fastcache.stages.prepare.sources import SUFFIXES, inner_suffix

HEAD_BYTES = 1 << 16
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
FOREIGN = {
    b"BZh": "packed with bzip2: unpack it first, or pack it with gzip or zstd",
    b"\xfd7zXZ": "packed with xz: unpack it first, or pack it with gzip or zstd",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"version https://git-lfs": "a pointer of Git LFS, not the data: run `git lfs pull` where it comes from",
    b"SQLite format 3": "an SQLite database: export its rows as JSON lines first",
    b"PARE": "an encrypted Parquet file: decrypt it first",
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ARRAY = re.compile(rb"\[\s*(\{|$)")


@dataclass(frozen=True)
class Format:
    """What a file holds: `jsonl`, `json`, `parquet`, `arrow file` or `arrow stream`; and how it is packed, or None."""

    kind: str
    compression: str | None


def open_file(path: Path, compression: str | None) -> Any:
    """The file as a stream of unpacked bytes."""
    return pa.input_stream(str(path), compression=compression)


def open_mapped(path: Path, compression: str | None) -> Any:
    """The unpacked file with any place in it at hand."""
    return open_file(path, compression).read_buffer() if compression else pa.memory_map(str(path))


def find_format(path: Path) -> Format:
    """What is in the file `path`; raises `InputError` for what can't be read, and says what to do about it."""
    with path.open("rb") as file:
        stored = file.read(HEAD_BYTES)
    compression = next((name for magic, name in COMPRESSIONS.items() if stored.startswith(magic)), None)
    head = stored
    if compression:
        try:
            with open_file(path, compression) as stream:
                head = stream.read(HEAD_BYTES)
        except OSError:
            head = b""  # told when it is read
    for magic, what in FOREIGN.items():
        if head.startswith(magic):
            raise InputError(f"{path} is {what}.")
    return Format(_kind(path, head), compression)


def _kind(path: Path, head: bytes) -> str:
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1"):
        return "arrow file"
    if head.startswith(b"\xff\xff\xff\xff"):
        return "arrow stream"
    _check_text(path, head)
    suffix = inner_suffix(path)
    text = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if text.startswith(b"{") or (text.startswith(b"[") and suffix in (".json", ".jsonl")):
        return _json_kind(text, suffix)
    if text and suffix in (".parquet", ".arrow"):
        raise InputError(f"{path}: expected a {suffix[1:].capitalize()} file by its name, found something else.")
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a {', '.join(SUFFIXES)} file, perhaps with .gz or .zst.")
    return {".parquet": "parquet", ".arrow": "arrow stream"}.get(suffix, suffix[1:])


def _json_kind(text: bytes, suffix: str) -> str:
    """`jsonl` or `json`, of a text that begins with an object or array."""
    first, end, rest = text.partition(b"\n")
    if text.startswith(b"["):
        if suffix == ".json":
            return "json"
        # A line that is an array by itself, with others after it, is a bad row of JSONL.
        return "json" if _ARRAY.match(first) and not (rest.strip() and _is_json(first)) else "jsonl"
    pretty = end and suffix == ".json" and not _is_json(first)
    return "json" if pretty else "jsonl"


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _check_text(path: Path, head: bytes) -> None:
    """Raise `InputError` for text in an encoding that JSON can't be in, and for a web page."""
    if b"\0" in head[:64]:
        for encoding in ("UTF-32", "UTF-16LE", "UTF-16BE"):
            try:
                text = head[: len(head) // 4 * 4].decode(encoding)
            except UnicodeDecodeError:
                continue
            if text.removeprefix("\ufeff").lstrip().startswith(("{", "[")):
                # iconv reads the byte order from the mark at the beginning, so the command need not name it.
                name = encoding[:6] if text.startswith("\ufeff") else encoding
                raise InputError(
                    f"{path} is {name[:6]} text; JSON has to be UTF-8. Convert it first: "
                    f"iconv -f {name} -t UTF-8 {shlex.quote(str(path))} > NEW_FILE"
                )
    if re.match(rb"\s*<(!doctype|html)", head, re.IGNORECASE):
        raise InputError(f"{path} is a web page, not a data set: fetch the file itself, not the page that shows it.")
