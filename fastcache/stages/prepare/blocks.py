"""Neighbouring rows, packed: what a process that reads a source gives to those that take the rows apart.

What can't be read becomes `Malformed`, with its place.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from fastcache.stages.prepare.json_rows import Refused, parse, to_row
from fastcache.stages.prepare.tables import python_rows

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
    path: str
    """The file that they stand in, or nothing."""

    @abstractmethod
    def rows(self) -> Iterator[Row | Malformed]:
        """The rows, in order."""

    @abstractmethod
    def head(self, n_rows: int) -> "Block":
        """The first rows."""

    def place(self, _index: int) -> str | None:
        """Where the row with this number in the block stands, if that is known."""
        return None


@dataclass(frozen=True)
class Lines(Block):
    """Lines of a JSONL file as they stand; blank ones are no rows.

    Lines of an uncompressed file have their `offset` there: another process reads them again, which is quicker than to
    send them.
    """

    lines: list[bytes]
    first_line: int
    offset: int | None

    @classmethod
    def of(cls, lines: list[bytes], path: str, first_line: int, offset: int | None) -> "Lines":
        """From lines without their ends."""
        n_rows = sum(map(bool, map(bytes.strip, lines)))
        return cls(n_rows, sum(map(len, lines)) + len(lines), path, lines, first_line, offset)

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
            if line and not line.isspace():
                try:
                    yield to_row(*parse(line))
                except Refused as refusal:
                    yield Malformed(str(refusal), f"{self.path}:{number}")

    def place(self, index: int) -> str:
        """File and line."""
        numbers = [number for number, line in enumerate(self._read(), self.first_line) if line.strip()]
        return f"{self.path}:{numbers[index]}"

    def head(self, n_rows: int) -> "Lines":
        """The first rows."""
        ends = [number for number, line in enumerate(self.lines, 1) if line.strip()]
        return Lines.of(self.lines[: ends[n_rows - 1]], self.path, self.first_line, self.offset)


@dataclass(frozen=True)
class Table(Block):
    """A batch of Arrow rows, as an IPC stream."""

    data: bytes

    @classmethod
    def of(cls, batch: pa.RecordBatch, path: str) -> "Table":
        """From a batch."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        data = sink.getvalue().to_pybytes()
        return cls(batch.num_rows, len(data), path, data)

    def _batch(self) -> pa.RecordBatch:
        return pa.ipc.open_stream(self.data).read_next_batch()

    def rows(self) -> Iterator[Row | Malformed]:
        """The rows, in order."""
        yield from python_rows(self._batch())

    def head(self, n_rows: int) -> "Table":
        """The first rows."""
        return Table.of(self._batch().slice(0, n_rows), self.path)


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
