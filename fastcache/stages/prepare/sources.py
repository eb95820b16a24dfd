"""Rows from files and from the hub, as plain dictionaries; what can't be read becomes `Malformed`, with its place."""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from fastcache.assets import DEMO_CHAT, DEMO_TEXT
from fastcache.errors import InputError

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
ESTIMATE_BYTES = 4 * 2**20
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class Source:
    """Where rows come from: a local file or folder, or a data set on the hub."""

    name: str
    place: str
    column: str | None = None
    config: str | None = None
    revision: str | None = None
    rows: int | None = None
    """Rows that a known set has, for the estimate of the time left."""


KNOWN = {
    "wildchat": Source("wildchat", "allenai/WildChat-1M-Full", "conversation", rows=990_372),
    "infinity-instruct": Source("infinity-instruct", "BAAI/Infinity-Instruct", "conversations", "7M", rows=7_449_106),
    "tulu-3": Source("tulu-3", "allenai/tulu-3-sft-mixture", "messages", rows=939_343),
    "orca-agentinstruct": Source(
        "orca-agentinstruct", "mlabonne/orca-agentinstruct-1M-v1-cleaned", "messages", rows=1_046_410
    ),
    "lmsys-chat": Source("lmsys-chat", "lmsys/lmsys-chat-1m", "conversation", rows=1_000_000),
    "pile": Source("pile", "monology/pile-uncopyrighted", "text"),
    "demo": Source("demo", str(DEMO_CHAT)),
    "demo-text": Source("demo-text", str(DEMO_TEXT)),
}
RECIPES = {"fast-paper": ("wildchat", "infinity-instruct", "tulu-3", "orca-agentinstruct", "lmsys-chat")}
"""The paper's mixture, in the order of its table."""


@dataclass(frozen=True)
class Malformed:
    """A row that could not be read."""

    reason: str
    place: str


def find_source(text: str) -> Source:
    """The source that `--source text` means: a known name, NAME=PATH, a path, or a data set on the hub."""
    name, equals, place = text.partition("=")
    if equals and name in KNOWN:
        return Source(name, place, KNOWN[name].column)
    return KNOWN.get(text, Source(text, text))


def stamps(sources: Iterable[Source]) -> dict[str, list[int]]:
    """Size in bytes and time of change in ns of every local file of `sources`: tells when one has changed."""
    found = {}
    for source in sources:
        path = Path(source.place)
        for file in [path] if path.is_file() else _files_below(path) if path.is_dir() else []:
            status = file.stat()
            found[str(file)] = [status.st_size, status.st_mtime_ns]
    return found


def estimate_rows(source: Source) -> int | None:
    """About how many rows a source has, or None: from Parquet's own counts, or from the beginning of a JSONL file."""
    path = Path(source.place)
    if not path.exists():
        return source.rows
    total = 0.0
    for file in [path] if path.is_file() else _files_below(path):
        if file.suffix == ".parquet":
            total += _parquet_rows(file)
        elif _inner_suffix(file) == ".jsonl":
            total += _jsonl_rows(file)
        else:
            return None
    return round(total)


def _parquet_rows(path: Path) -> int:
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowInvalid, OSError):
        return 0  # told when it is read


def _jsonl_rows(path: Path) -> float:
    """Lines in the first bytes, scaled by how much of the file, as it is stored, they took."""
    with pa.OSFile(str(path)) as stored:
        try:
            stream = pa.CompressedInputStream(stored, COMPRESSED[path.suffix]) if path.suffix in COMPRESSED else stored
            sample = stream.read(ESTIMATE_BYTES)
        except OSError:
            return 0  # told when it is read
        return sample.count(b"\n") * path.stat().st_size / max(stored.tell(), 1)


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and _inner_suffix(path) in SUFFIXES)


def read_source(source: Source, split: str) -> Iterator[dict[str, Any] | Malformed]:
    """The rows of a source, in order. Raises `InputError` if it can't be read."""
    path = Path(source.place)
    if path.is_dir():
        return _read_folder(path, source.name)
    if path.is_file():
        return _read_file(path)
    return _read_hub(source, split)


def _inner_suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def _read_folder(folder: Path, name: str) -> Iterator[dict[str, Any] | Malformed]:
    """Every file below `folder` that can be read, in the order of their paths."""
    paths = _files_below(folder)
    if not paths:
        raise InputError(f"--source {name}: the folder {folder} holds no {', '.join(SUFFIXES)} file.")
    for path in paths:
        yield from _read_file(path)


def _read_file(path: Path) -> Iterator[dict[str, Any] | Malformed]:
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet, ".arrow": _read_arrow}
    if _inner_suffix(path) not in readers:
        raise InputError(f"{path}: expected a {', '.join(SUFFIXES)} file, perhaps with .gz or .zst.")
    return readers[_inner_suffix(path)](path)


def _open(path: Path) -> Any:
    return pa.input_stream(str(path), compression=COMPRESSED.get(path.suffix))


def _read_jsonl(path: Path) -> Iterator[dict[str, Any] | Malformed]:
    number = 0
    try:
        with _open(path) as file:
            tail = b""
            while data := file.read(1 << 20):
                *lines, tail = (tail + data).split(b"\n")
                for line in lines:
                    number += 1
                    if line.strip():
                        yield _parse(line, f"{path}:{number}")
            if tail.strip():
                yield _parse(tail, f"{path}:{number + 1}")
    except OSError as error:
        raise InputError(
            f"{path} breaks off or is damaged after line {number} ({error}). Fetch it again, or unpack what can be saved."
        ) from error


def _parse(line: bytes, place: str) -> dict[str, Any] | Malformed:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return Malformed("not JSON", place)
    return row if isinstance(row, dict) else Malformed("not an object", place)


def _read_json(path: Path) -> Iterator[dict[str, Any] | Malformed]:
    try:
        with _open(path) as file:
            rows = json.loads(file.read())
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is not JSON: {error}. For one row a line, name it .jsonl.") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} should hold a JSON array of rows, found {type(rows).__name__}.")
    for number, row in enumerate(rows):
        yield row if isinstance(row, dict) else Malformed("not an object", f"{path}[{number}]")


def _read_parquet(path: Path) -> Iterator[dict[str, Any] | Malformed]:
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}.") from error


def _read_arrow(path: Path) -> Iterator[dict[str, Any] | Malformed]:
    """The Arrow stream that `datasets` keeps a data set in."""
    try:
        with _open(path) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a readable Arrow stream: {error}.") from error


def is_on_hub(source: Source) -> bool:
    """Whether the source is a data set on the hub, and no local file or folder; raises `InputError` if it is neither."""
    path = Path(source.place)
    if path.exists():
        return False
    hub_name = source.place.count("/") <= 1 and not source.place.startswith((".", "/", "~"))
    if not hub_name or _inner_suffix(path) in SUFFIXES:
        raise InputError(f"--source {source.name}: there is no such file: {path}.")
    return True


def hub_revisions(sources: Iterable[Source]) -> dict[str, str]:
    """The commit that each data set on the hub is at; raises `InputError` where the hub doesn't tell."""
    from huggingface_hub import HfApi

    found = {}
    for source in sources:
        if is_on_hub(source):
            try:
                found[source.name] = str(HfApi().dataset_info(source.place).sha)
            except Exception as error:  # of the network, of the hub, of a wrong name
                raise _no_hub(source, error) from error
    return found


def _no_hub(source: Source, error: Exception) -> InputError:
    reason = (str(error).splitlines() or [""])[0][:200]
    return InputError(
        f"--source {source.name}: no file of this name, and the hub could not give the data set {source.place} "
        f"({type(error).__name__}: {reason}). Check the name and the network; for a gated set, accept its terms at "
        f"https://huggingface.co/datasets/{source.place} and run `hf auth login`; for a local copy, say "
        f"--source {source.name}=PATH."
    )


def _read_hub(source: Source, split: str) -> Iterator[dict[str, Any] | Malformed]:
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the user's business
    try:
        yield from load_dataset(source.place, source.config, split=split, streaming=True, revision=source.revision)
    except Exception as error:  # datasets raises many kinds, from many libraries
        raise _no_hub(source, error) from error
