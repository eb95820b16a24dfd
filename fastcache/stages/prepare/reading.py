"""Rows from files and from the hub by blocks, which are cut without looking into the rows: a worker takes them apart.

Where blocks end depends on the input alone. What can't be read becomes `Malformed`, with its place.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from fastcache.errors import InputError
from fastcache.stages.prepare.schema import known_columns
from fastcache.stages.prepare.sources import COMPRESSED, SUFFIXES, Source, files_below, inner_suffix, no_hub

BLOCK_BYTES = 1 << 18
BLOCK_ROWS = 1024

Row = dict[str, Any]


@dataclass(frozen=True)
class Malformed:
    """A row that could not be read."""

    reason: str
    place: str


@dataclass(frozen=True)
class Block(ABC):
    """Some neighbouring rows, packed."""

    n_rows: int
    n_bytes: int

    @abstractmethod
    def rows(self) -> Iterator[Row | Malformed]:
        """The rows, in order."""

    @abstractmethod
    def head(self, n_rows: int) -> "Block":
        """The first rows."""


@dataclass(frozen=True)
class Lines(Block):
    """Lines of a JSONL file as they stand; blank ones are no rows.

    Lines of an uncompressed file have their `offset` there: another process reads them again, which is quicker than to
    send them.
    """

    lines: list[bytes]
    path: str
    first_line: int
    offset: int | None

    @classmethod
    def of(cls, lines: list[bytes], path: str, first_line: int, offset: int | None) -> "Lines":
        """From lines without their ends."""
        n_rows = sum(map(bool, map(bytes.strip, lines)))
        return cls(n_rows, sum(map(len, lines)) + len(lines), lines, path, first_line, offset)

    def __getstate__(self) -> Row:
        return self.__dict__ | ({} if self.offset is None else {"lines": []})

    def _read(self) -> list[bytes]:
        if self.lines or self.offset is None:
            return self.lines
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.n_bytes).split(b"\n")

    def rows(self) -> Iterator[Row | Malformed]:
        """The rows, in order."""
        for number, line in enumerate(self._read(), self.first_line):
            try:
                row = orjson.loads(line)
            except ValueError:
                if line.strip():
                    yield self._parse_slowly(line, number)
            else:
                yield row if type(row) is dict else self._no_object(number)

    def _parse_slowly(self, line: bytes, number: int) -> Row | Malformed:
        """Python's parser has the last word: it takes NaN, and lone surrogates where nobody looks."""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return Malformed("not JSON", f"{self.path}:{number}")
        return row if type(row) is dict else self._no_object(number)

    def _no_object(self, number: int) -> Malformed:
        return Malformed("not an object", f"{self.path}:{number}")

    def head(self, n_rows: int) -> "Lines":
        """The first rows."""
        ends = [number for number, line in enumerate(self.lines, 1) if line.strip()]
        return Lines.of(self.lines[: ends[n_rows - 1]], self.path, self.first_line, self.offset)


@dataclass(frozen=True)
class Table(Block):
    """A batch of Arrow rows, as an IPC stream."""

    data: bytes

    @classmethod
    def of(cls, batch: pa.RecordBatch) -> "Table":
        """From a batch."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        data = sink.getvalue().to_pybytes()
        return cls(batch.num_rows, len(data), data)

    def _batch(self) -> pa.RecordBatch:
        return pa.ipc.open_stream(self.data).read_next_batch()

    def rows(self) -> Iterator[Row | Malformed]:
        """The rows, in order."""
        yield from self._batch().to_pylist()

    def head(self, n_rows: int) -> "Table":
        """The first rows."""
        return Table.of(self._batch().slice(0, n_rows))


@dataclass(frozen=True)
class Parsed(Block):
    """Rows that came as Python objects."""

    values: list[Row | Malformed]

    def rows(self) -> Iterator[Row | Malformed]:
        """The rows, in order."""
        return iter(self.values)

    def head(self, n_rows: int) -> "Parsed":
        """The first rows."""
        return replace(self, n_rows=n_rows, values=self.values[:n_rows])


def read_source(source: Source, split: str, column: str | None) -> Iterator[Block]:
    """The rows of a source, in order; `column` is the one to read. Raises `InputError` if it can't be read."""
    path = Path(source.place)
    if path.is_dir():
        return _read_folder(path, source.name, column)
    if path.is_file():
        return _read_file(path, column)
    return _by_blocks(_read_hub(source, split))


def _read_folder(folder: Path, name: str, column: str | None) -> Iterator[Block]:
    paths = files_below(folder)
    if not paths:
        raise InputError(f"--source {name}: the folder {folder} holds no {', '.join(SUFFIXES)} file.")
    for path in paths:
        yield from _read_file(path, column)


def _read_file(path: Path, column: str | None) -> Iterator[Block]:
    kind = inner_suffix(path)
    if kind == ".jsonl":
        return _read_jsonl(path)
    if kind == ".json":
        return _by_blocks(_read_json(path))
    if kind == ".parquet":
        return _read_parquet(path, column)
    if kind == ".arrow":
        return _read_arrow(path, column)
    raise InputError(f"{path}: expected a {', '.join(SUFFIXES)} file, perhaps with .gz or .zst.")


def _open(path: Path) -> Any:
    return pa.input_stream(str(path), compression=COMPRESSED.get(path.suffix))


def _read_jsonl(path: Path) -> Iterator[Block]:
    n_lines = offset = 0
    plain = path.suffix not in COMPRESSED
    try:
        with _open(path) as file:
            tail: list[bytes] = []  # of a line that goes on
            while data := file.read(BLOCK_BYTES):
                lines = data.split(b"\n")
                tail.append(lines[0])
                if len(lines) > 1:
                    lines[0] = b"".join(tail)
                    tail = [lines.pop()]
                    block = Lines.of(lines, str(path), n_lines + 1, offset if plain else None)
                    yield block
                    n_lines += len(lines)
                    offset += block.n_bytes
            if (line := b"".join(tail)).strip():
                yield Lines.of([line], str(path), n_lines + 1, offset if plain else None)
    except OSError as error:
        raise InputError(
            f"{path} breaks off or is damaged after line {n_lines} ({error}). Fetch it again, or unpack what can be saved."
        ) from error


def _read_json(path: Path) -> Iterator[Row | Malformed]:
    try:
        with _open(path) as file:
            rows = json.loads(file.read())
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} is not JSON: {error}. For one row a line, name it .jsonl.") from error
    if not isinstance(rows, list):
        raise InputError(f"{path} should hold a JSON array of rows, found {type(rows).__name__}.")
    for number, row in enumerate(rows):
        yield row if isinstance(row, dict) else Malformed("not an object", f"{path}[{number}]")


def _read_parquet(path: Path, column: str | None) -> Iterator[Block]:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = known_columns(file.schema_arrow.names, column)
        for batch in file.iter_batches(batch_size=BLOCK_ROWS, columns=names):
            yield Table.of(batch)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}.") from error


def _read_arrow(path: Path, column: str | None) -> Iterator[Block]:
    """The Arrow stream that `datasets` keeps a data set in."""
    try:
        with _open(path) as file, pa.ipc.open_stream(file) as batches:
            for batch in batches:
                yield Table.of(batch.select(known_columns(batch.schema.names, column)))
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a readable Arrow stream: {error}.") from error


def _read_hub(source: Source, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the user's business
    try:
        yield from load_dataset(source.place, source.config, split=split, streaming=True, revision=source.revision)
    except Exception as error:  # datasets raises many kinds, from many libraries
        raise no_hub(source, error) from error


def _text_size(value: Any) -> int:
    """About the bytes of text in a row."""
    if isinstance(value, str):
        return len(value)
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_text_size, children))


def _by_blocks(rows: Iterable[Row | Malformed]) -> Iterator[Block]:
    block: list[Row | Malformed] = []
    size = 0
    for row in rows:
        block.append(row)
        size += _text_size(row)
        if len(block) >= BLOCK_ROWS or size >= BLOCK_BYTES:
            yield Parsed(len(block), size, block)
            block, size = [], 0
    if block:
        yield Parsed(len(block), size, block)
