"""The first pass: input rows are read, cleaned and hashed, a chunk at a time, into files that a later run can use again.

A chunk leaves three files: `rows` (Parquet, every input row, cleaned or with the reason why not), `grams` (its n-grams,
sorted) and `chunk.json`, written last: a chunk with it is done. Where chunks are cut depends on the input alone.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastcache.corpus import MESSAGE
from fastcache.errors import InputError
from fastcache.files import canonical_json, read_json, write_json_atomic
from fastcache.progress import Progress
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.conflicts import write_grams
from fastcache.stages.prepare.ngrams import ngram_hashes
from fastcache.stages.prepare.schema import Unusable, usable
from fastcache.stages.prepare.sources import Malformed, Source, estimate_rows, read_source
from fastcache.workers import process_pool

CHUNK_ROWS = 20_000
CHUNK_BYTES = 16 * 2**20

WORKER_BYTES = 512 * 2**20
"""Memory that a worker takes for a chunk, with the raw rows that wait for it."""

STAGED = pa.schema(
    [
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("reason", pa.string()),
        ("whole", pa.binary(12)),
        ("messages", pa.list_(MESSAGE)),
        ("text", pa.string()),
    ]
)

Row = dict[str, Any]
RawRow = tuple[str, int, Row | Malformed]


@dataclass(frozen=True)
class Chunk:
    """One staged chunk: where it lies and how many input rows it holds."""

    folder: Path
    index: int
    n_rows: int
    n_grams: int

    @property
    def rows_path(self) -> Path:
        """Its rows, Parquet."""
        return self.folder / f"{self.index:06d}.parquet"

    @property
    def grams_path(self) -> Path:
        """Its n-grams, see `conflicts.GRAM`."""
        return self.folder / f"{self.index:06d}.grams"


def worker_count(config: PrepareConfig) -> int:
    """Processes that may run: as many as asked for, or one a core, as far as the memory goes."""
    wanted = config.workers or os.cpu_count() or 1
    return max(1, min(wanted, int(config.memory_gib * 2**30) // WORKER_BYTES))


def _text_size(value: Any) -> int:
    """About the bytes of text in a raw row."""
    if isinstance(value, str):
        return len(value)
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_text_size, children))


def _raw_chunks(sources: list[Source], config: PrepareConfig) -> Iterator[tuple[list[RawRow], bool]]:
    """Input rows by chunks, and whether the chunk is full: all are but the last."""
    chunk: list[RawRow] = []
    size = 0
    for source in sources:
        for number, raw in enumerate(read_source(source, config.split_name)):
            if config.max_rows and number >= config.max_rows:
                break
            chunk.append((source.name, number, raw))
            size += _text_size(raw)
            if len(chunk) >= CHUNK_ROWS or size >= CHUNK_BYTES:
                yield chunk, True
                chunk, size = [], 0
    if chunk:
        yield chunk, False


def _clean(raw: RawRow, config: PrepareConfig, column: str | None) -> Row:
    """A row of `STAGED`; raises `InputError` for a bad one where that is asked for."""
    source, number, value = raw
    row: Row = {"source": source, "source_row": number, "reason": None, "whole": None, "messages": None, "text": None}
    try:
        if isinstance(value, Malformed):
            raise Unusable(value.reason)
        row |= usable(value, config.column or column, config.alternating, config.max_turn_chars)
        row["whole"] = blake2b(canonical_json([row["messages"], row["text"]]).encode(), digest_size=12).digest()
    except Unusable as verdict:
        if config.strict:
            place = value.place if isinstance(value, Malformed) else f"{source}, row {number}"
            raise InputError(f"{place}: {verdict} (--strict). Nothing was written.") from None
        row["reason"] = str(verdict)
    return row


def _hash(rows: list[Row], config: PrepareConfig, texts_too: bool) -> tuple[Any, Any, Any]:
    """Hashes, checks and row numbers of the n-grams of cleaned rows, and of each row as a whole."""
    turns: list[str] = []
    owners: list[int] = []
    for number, row in enumerate(rows):
        counted = [m["content"] for m in row["messages"] or () if config.ngram_system or m["role"] != "system"]
        if texts_too and row["text"]:
            counted.append(row["text"])
        turns += [turn.lower() for turn in counted] if config.lowercase else counted
        owners += [number] * len(counted)
    grams = ngram_hashes(turns if config.ngram else [], config.ngram or 1, config.unit)
    whole = [(number, row["whole"]) for number, row in enumerate(rows) if row["whole"] and config.exact]
    words = np.frombuffer(b"".join(digest for _, digest in whole), np.dtype([("hash", "<u8"), ("check", "<u4")]))
    numbers = np.array(owners, np.int64)[grams.turns]
    return (
        np.concatenate([grams.hashes, words["hash"]]),
        np.concatenate([grams.checks, words["check"]]),
        np.concatenate([numbers, np.array([number for number, _ in whole], np.int64)]),
    )


def stage_chunk(
    raw: list[RawRow], index: int, folder: Path, config: PrepareConfig, columns: dict[str, str | None], texts_too: bool
) -> Chunk:
    """Clean, hash and write one chunk."""
    rows = [_clean(one, config, columns[one[0]]) for one in raw]
    hashes, checks, numbers = _hash(rows, config, texts_too)
    chunk = Chunk(folder, index, len(rows), len(hashes))
    write_grams(chunk.grams_path, hashes, checks, numbers)
    pq.write_table(pa.Table.from_pylist(rows, schema=STAGED), chunk.rows_path, compression="zstd")
    write_json_atomic(folder / f"{index:06d}.json", {"n_rows": chunk.n_rows, "n_grams": chunk.n_grams})
    return chunk


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
    folder.mkdir(parents=True, exist_ok=True)
    columns = {source.name: source.column for source in sources}
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

        for index, (raw, full) in enumerate(_raw_chunks(sources, config)):
            if (folder / f"{index:06d}.json").exists():
                meta = read_json(folder / f"{index:06d}.json")
                chunks.append(Chunk(folder, index, meta["n_rows"], meta["n_grams"]))
                task.advance(len(raw))
            elif full:
                running.append(pool.submit(stage_chunk, raw, index, folder, config, columns, texts_too))
                collect(n_workers)  # so many wait at most: memory stays bounded
            else:  # the last one, and for small inputs the only one: not worth a process
                collect(0)
                chunks.append(stage_chunk(raw, index, folder, config, columns, texts_too))
                task.advance(len(raw))
        collect(0)
    return chunks
