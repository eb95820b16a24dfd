"""Rows from files and from the hub, as plain dictionaries; what can't be read becomes `Malformed`, with its place."""

import gzip
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcache.assets import DEMO_CHAT, DEMO_TEXT
from fastcache.errors import InputError

BUILT_IN = {"demo": DEMO_CHAT, "demo-text": DEMO_TEXT}


@dataclass(frozen=True)
class Malformed:
    """A row that could not be read."""

    reason: str
    place: str


def read_source(name: str, split: str) -> Iterator[dict[str, Any] | Malformed]:
    """The rows of a file, of `demo` or `demo-text`, or of a data set on the hub. Raises `InputError` if there is none."""
    path = BUILT_IN.get(name, Path(name))
    if not path.is_file():
        if path.exists() or path.suffix in (".json", ".jsonl", ".parquet", ".gz") or name.count("/") > 1:
            raise InputError(f"--source {name}: there is no such file.")
        return _read_hub(name, split)
    inner = path.with_suffix("") if path.suffix == ".gz" else path
    if inner.suffix == ".parquet":
        return _read_parquet(path)
    if inner.suffix == ".json":
        return _read_json(path)
    if inner.suffix == ".jsonl":
        return _read_jsonl(path)
    raise InputError(
        f"--source {name}: expected .jsonl, .json or .parquet (or .gz of the first two), found {path.name}."
    )


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _read_jsonl(path: Path) -> Iterator[dict[str, Any] | Malformed]:
    with _open(path) as file:
        number = 0
        try:
            for line in file:
                number += 1
                if line.strip():
                    yield _parse(line, f"{path}:{number}")
        except (EOFError, gzip.BadGzipFile, OSError) as error:
            yield Malformed("unreadable file", f"{path} after line {number}: {error}")


def _parse(line: bytes, place: str) -> dict[str, Any] | Malformed:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return Malformed("not JSON", place)
    return row if isinstance(row, dict) else Malformed("not an object", place)


def _read_json(path: Path) -> Iterator[dict[str, Any] | Malformed]:
    with _open(path) as file:
        try:
            rows = json.load(file)
        except (ValueError, RecursionError, EOFError) as error:
            raise InputError(f"{path} is not JSON: {error}. For one row a line, name it .jsonl.") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} should hold a JSON array of rows, found {type(rows).__name__}.")
    for number, row in enumerate(rows):
        yield row if isinstance(row, dict) else Malformed("not an object", f"{path}[{number}]")


def _read_parquet(path: Path) -> Iterator[dict[str, Any] | Malformed]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}.") from error


def _read_hub(name: str, split: str) -> Iterator[dict[str, Any] | Malformed]:
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the user's business
    try:
        yield from load_dataset(name, split=split, streaming=True)
    except Exception as error:  # datasets raises many kinds, from many libraries
        raise InputError(
            f"--source {name}: no file of this name, and the hub could not give the data set "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}). Check the name and the network; for a gated set, "
            "accept its terms on its page and run `hf auth login`."
        ) from error
