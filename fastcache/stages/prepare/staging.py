"""The first pass: input rows are read, cleaned and hashed, a chunk at a time, into files that a later run can use again.

A chunk leaves three files: `rows` (Arrow, every input row, cleaned or with the reason why not), `grams` (its n-grams, by
buckets) and `chunk.json`, written last: a chunk with it is done. Where chunks are cut depends on the input alone. This
process only cuts the input; workers parse it.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from fastcache.errors import InputError
from fastcache.files import atomic_file, make_directory, read_json, write_json_atomic
from fastcache.progress import Progress
from fastcache.stages.prepare.blocks import Block
from fastcache.stages.prepare.columns import STAGED, SYSTEM, TEXT, CleanRows, Columns
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.conflicts import write_grams
from fastcache.stages.prepare.ngrams import Grams, Turns, ngram_hashes
from fastcache.stages.prepare.reading import read_source
from fastcache.stages.prepare.sources import Source, estimate_rows
from fastcache.workers import process_pool

CHUNK_ROWS = 20_000
CHUNK_BYTES = 16 * 2**20

FILE_FAULT_SHARE, FILE_FAULT_ROWS = 0.9, 5
"""A file in which this share of the rows can't be read, and so many of them, or all, has a fault as a whole."""

STAGE_VERSION = 2
"""The version of a chunk's files: files of other versions are not used again."""

WORKER_BYTES = 512 * 2**20
"""Memory that a worker takes for a chunk, with the blocks that wait for it."""


class Part(NamedTuple):
    """A block of a chunk: its source, the column to read, and the number of its first row in the source."""

    source: str
    column: str | None
    first_row: int
    block: Block


@dataclass(frozen=True)
class Chunk:
    """One staged chunk: where it lies, how many input rows it holds, and what was seen of unusable ones."""

    folder: Path
    index: int
    n_rows: int
    n_grams: int
    first_places: dict[str, dict[str, str]] = field(default_factory=dict)
    """See `Columns`."""

    files: dict[str, list[Any]] = field(default_factory=dict)
    """See `Columns`."""

    @classmethod
    def load(cls, folder: Path, index: int) -> "Chunk | None":
        """The chunk that an earlier run left, or None; one of an earlier version of fastcache is none."""
        path = folder / f"{index:06d}.json"
        meta = read_json(path) if path.exists() else {}
        if meta.pop("version", None) != STAGE_VERSION:
            return None
        return cls(folder, index, **meta)

    def save(self) -> None:
        """Note that it is done."""
        meta = {"n_rows": self.n_rows, "n_grams": self.n_grams, "first_places": self.first_places, "files": self.files}
        write_json_atomic(self.folder / f"{self.index:06d}.json", {"version": STAGE_VERSION, **meta})

    @property
    def rows_path(self) -> Path:
        """Its rows, `columns.STAGED`, as an Arrow file."""
        return self.folder / f"{self.index:06d}.arrow"

    @property
    def grams_path(self) -> Path:
        """Its n-grams, see `conflicts.GRAM`."""
        return self.folder / f"{self.index:06d}.grams"

    def read(self, columns: list[str]) -> pa.Table:
        """Some columns of its rows, mapped into memory."""
        with pa.memory_map(str(self.rows_path)) as file:
            return pa.ipc.open_file(file).read_all().select(columns)


def worker_count(config: PrepareConfig) -> int:
    """Processes that may run: as many as asked for, or one a core, as far as the memory goes."""
    wanted = config.workers or os.cpu_count() or 1
    return max(1, min(wanted, int(config.memory_gib * 2**30) // WORKER_BYTES))


def _chunks(sources: list[Source], config: PrepareConfig) -> Iterator[tuple[list[Part], bool]]:
    """Blocks of the input by chunks, and whether the chunk is full: all are but the last."""
    chunk: list[Part] = []
    n_rows = n_bytes = 0
    for source in sources:
        column = config.column or source.column
        n_read = 0
        for block in read_source(source, config.split_name, column):
            if config.max_rows and n_read + block.n_rows > config.max_rows:
                taken = block.head(config.max_rows - n_read)
            else:
                taken = block
            chunk.append(Part(source.name, column, n_read, taken))
            n_read += taken.n_rows
            n_rows += taken.n_rows
            n_bytes += taken.n_bytes
            if n_rows >= CHUNK_ROWS or n_bytes >= CHUNK_BYTES:
                yield chunk, True
                chunk, n_rows, n_bytes = [], 0, 0
            if n_read == config.max_rows > 0:
                break
    if n_rows:
        yield chunk, False


def _hashed(rows: CleanRows, config: PrepareConfig, texts_too: bool) -> list[Grams]:
    """The n-grams of cleaned rows, and each row as a whole."""
    counted = rows.is_turn
    if not config.ngram_system:
        counted &= rows.codes != SYSTEM
    if texts_too:
        counted |= rows.codes == TEXT
    turns = Turns(rows.pieces.data, rows.pieces.starts[counted], rows.pieces.stops[counted])
    if config.lowercase:
        turns = turns.lower()
    grams = list(ngram_hashes(turns, rows.owners[counted], config.ngram, config.unit)) if config.ngram else []
    return [*grams, rows.whole] if config.exact else grams


def stage_chunk(parts: list[Part], index: int, folder: Path, config: PrepareConfig, texts_too: bool) -> Chunk:
    """Clean, hash and write one chunk; raises `InputError` for a bad row where that is asked for."""
    columns = Columns()
    for source, column, first_row, block in parts:
        columns.add(block.rows(), source, first_row, column, config, block)
    rows = CleanRows(columns)
    grams = _hashed(rows, config, texts_too)
    n_grams = sum(len(piece.hashes) for piece in grams)
    files = {path: list(counts) for path, counts in columns.files.items() if path}
    chunk = Chunk(folder, index, len(rows.n_pieces), n_grams, columns.first_places, files)
    write_grams(chunk.grams_path, grams)
    with atomic_file(chunk.rows_path) as temporary, pa.ipc.new_file(str(temporary), STAGED) as file:
        file.write_table(rows.table())
    chunk.save()
    return chunk


def first_places(chunks: list[Chunk]) -> dict[str, dict[str, str]]:
    """The place of the first unusable row, by source and reason."""
    places: dict[str, dict[str, str]] = {}
    for chunk in chunks:
        for source, by_reason in chunk.first_places.items():
            mine = places.setdefault(source, {})
            for reason, place in by_reason.items():
                mine.setdefault(reason, place)
    return places


def check_files(chunks: list[Chunk]) -> None:
    """Raise `InputError` for a file of which nearly no line, or no element, can be read: it isn't what it says.

    Such a file has one fault, and not many bad rows. A row that can be read, but not used, isn't counted here.
    """
    files: dict[str, tuple[int, int, str]] = {}
    for chunk in chunks:
        for path, (n_rows, n_bad, place) in chunk.files.items():
            rows, bad, first = files.get(path, (0, 0, ""))
            files[path] = rows + n_rows, bad + n_bad, first or place
    for path, (n_rows, n_bad, place) in files.items():
        if n_bad >= FILE_FAULT_SHARE * n_rows and n_bad >= min(FILE_FAULT_ROWS, n_rows) > 1:
            raise InputError(
                f"{path} isn't what it says: {n_bad:,} of {n_rows:,} rows can't be read as JSON objects, the first at "
                f"{place}. A JSONL file has one JSON object on each line, without commas between the lines; a .json file "
                "is one array of objects. Mend the file, or leave it out. Nothing was written."
            )


def _total_rows(sources: list[Source], config: PrepareConfig) -> int | None:
    """About how many rows there are to read, where all sources can tell."""
    estimates = [estimate_rows(source) for source in sources]
    limit = config.max_rows or 2**60
    return None if None in estimates else sum(min(rows or 0, limit) for rows in estimates)


def stage(
    sources: list[Source], config: PrepareConfig, folder: Path, progress: Progress, texts_too: bool = False
) -> list[Chunk]:
    """Stage all input rows in `folder`; chunks that an earlier run left are used again.

    Plain texts give n-grams only with `texts_too`: Algorithm 1 is for dialogues.
    """
    make_directory(folder)
    n_workers = worker_count(config)
    chunks: list[Chunk] = []
    running: list[Future[Chunk]] = []
    with (
        progress.task("read, clean, hash", _total_rows(sources, config), "rows") as task,
        process_pool(n_workers) as pool,
    ):

        def collect(n_left: int) -> None:
            while len(running) > n_left:
                chunks.append(running.pop(0).result())
                task.advance(chunks[-1].n_rows)

        for index, (parts, full) in enumerate(_chunks(sources, config)):
            if (staged := Chunk.load(folder, index)) is not None:
                chunks.append(staged)
                task.advance(staged.n_rows)
            elif full and n_workers > 1:
                running.append(pool.submit(stage_chunk, parts, index, folder, config, texts_too))
                collect(n_workers)  # so many wait at most: memory stays bounded
            else:  # the last one, and for small inputs the only one, is not worth a process
                collect(0)
                chunks.append(stage_chunk(parts, index, folder, config, texts_too))
                task.advance(chunks[-1].n_rows)
        collect(0)
    # An earlier run's chunks were at hand at once, before others that stand before them.
    return sorted(chunks, key=lambda chunk: chunk.index)
