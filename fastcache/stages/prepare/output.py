"""The last pass: kept rows are numbered in their permuted order and written by split, in bounded memory.

Rows are first dealt to the shard that their new number falls into, then each shard is sorted. A ledger file keeps what
became of every input row.
"""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fastcache.corpus import SCHEMA
from fastcache.disk import disk_errors
from fastcache.files import atomic_file, canonical_json, make_directory
from fastcache.progress import Progress
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.staging import Chunk

ROWS_PER_SHARD = 50_000
ROWS_PER_GROUP = 1024
"""Rows that are read from a shard together: what reading a corpus takes of memory."""


def split_bounds(n_rows: int, config: PrepareConfig) -> dict[str, tuple[int, int]]:
    """First row and last row + 1 of each split in the permuted order."""
    sizes = {
        "eval": min(config.eval_rows, n_rows // 10),
        "interpret": min(config.interpret_rows, n_rows // 10),
        "steer": min(config.steer_rows, n_rows // 20),
    }
    bounds, start = {}, 0
    for name, size in {**sizes, "train": n_rows - sum(sizes.values())}.items():
        bounds[name] = (start, start + size)
        start += size
    return bounds


def _shards(bounds: dict[str, tuple[int, int]], out: Path) -> Iterator[tuple[int, int, Path]]:
    """First row, last row + 1 and file of every shard."""
    for name, (start, stop) in bounds.items():
        for number, first in enumerate(range(start, stop, ROWS_PER_SHARD)):
            yield first, min(first + ROWS_PER_SHARD, stop), out / f"{name}-{number:05d}.parquet"


def _as_before(row: dict[str, Any]) -> dict[str, Any]:
    """A stored row without the null fields that corpora of version 1.0 lack, so that equal rows have equal fingerprints."""
    kept = dict(row)
    if kept["tools"] is None:
        del kept["tools"]
    if kept["messages"] is not None:
        kept["messages"] = [
            {name: value for name, value in message.items() if value is not None or name in ("role", "content")}
            for message in kept["messages"]
        ]
    return kept


def write_rows(
    chunks: list[Chunk],
    numbers: npt.NDArray[np.int64],
    bounds: dict[str, tuple[int, int]],
    out: Path,
    work: Path,
    progress: Progress,
) -> str:
    """Write the corpus files; `numbers` `[n]` holds each staged row's new number, or -1. Returns the fingerprint."""
    shards = list(_shards(bounds, out))
    firsts = np.array([first for first, _, _ in shards])
    make_directory(work)
    with (
        progress.task("deal rows to shards", len(numbers), "rows") as task,
        disk_errors(work),
        ExitStack() as stack,
    ):
        writers = [
            stack.enter_context(pq.ParquetWriter(work / path.name, SCHEMA, compression="zstd")) for _, _, path in shards
        ]
        start = 0
        for chunk in chunks:
            table = chunk.read(["source", "source_row", "messages", "text", "tools"])
            mine = numbers[start : start + chunk.n_rows]
            table = table.add_column(0, "row", pa.array(mine)).select(SCHEMA.names)
            shard_of = np.where(mine >= 0, np.searchsorted(firsts, mine, side="right") - 1, -1)
            for shard in np.unique(shard_of[shard_of >= 0]).tolist():
                writers[shard].write_table(table.filter(pa.array(shard_of == shard)))
            start += chunk.n_rows
            task.advance(chunk.n_rows)
    digest = hashlib.sha256()
    with progress.task("write shards", len(shards), "shards") as task:
        for _, _, path in shards:
            table = pq.read_table(work / path.name, schema=SCHEMA).sort_by("row")
            for row in table.to_pylist():
                digest.update(canonical_json(_as_before(row)).encode() + b"\n")
            with atomic_file(path) as temporary:
                pq.write_table(table, temporary, compression="zstd", row_group_size=ROWS_PER_GROUP)
            (work / path.name).unlink()
            task.advance(1)
    return digest.hexdigest()
