"""The prepare stage: every input row ends as a row of the corpus, or in a count with its reason."""

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fastcache.config import as_dict
from fastcache.corpus import CORPUS_FILE, CORPUS_VERSION, ROWS_PER_SHARD, SCHEMA
from fastcache.errors import InputError
from fastcache.files import canonical_json, fsync_directory, read_json, write_json_atomic
from fastcache.progress import Progress
from fastcache.rundir import output_directory, require_space
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.dedup import Deduplicator
from fastcache.stages.prepare.schema import TEXT_COLUMN, Unusable, detect_column, to_messages, to_text
from fastcache.stages.prepare.sources import Malformed, read_source

Row = dict[str, Any]


def prepare(config: PrepareConfig, out: Path, progress: Progress, fresh: bool = False) -> dict[str, Any]:
    """Make the corpus directory `out`; returns what stands in its corpus.json.

    Does nothing if `out` already holds this corpus. Raises `MismatchError` if it was made with other settings,
    `InputError` for sources that can't be read or leave nothing.
    """
    with output_directory(out, "prepare", as_dict(config), fresh=fresh):
        if (out / CORPUS_FILE).exists():
            progress.say(f"{out} is already prepared; nothing to do (--fresh starts over).")
            return read_json(out / CORPUS_FILE)
        for leftover in out.glob("*.parquet"):
            leftover.unlink()
        rows, kind, counts = _collect(config, progress)
        info = {**_write(rows, kind, config, out), "counts": counts}
        write_json_atomic(out / CORPUS_FILE, info)
    return info


def _collect(config: PrepareConfig, progress: Progress) -> tuple[list[Row], str, dict[str, Any]]:
    """All kept rows in input order, `chat` or `text`, and the counts of every source."""
    deduplicator = Deduplicator(config.ngram, config.unit, config.exact)
    kept: list[Row] = []
    kinds: set[str] = set()
    counts: dict[str, Any] = {}
    with progress.task("prepare", None, "rows") as task:
        for source in config.source:
            dropped: Counter[str] = Counter()
            n_rows = n_kept = 0
            for number, raw in enumerate(read_source(source, config.split_name)):
                if config.max_rows and number >= config.max_rows:
                    break
                n_rows += 1
                try:
                    row = _usable(raw, config)
                    if reason := _duplicate(deduplicator, row, config):
                        raise Unusable(reason)
                except Unusable as verdict:
                    dropped[str(verdict)] += 1
                    if config.strict and "duplicate" not in str(verdict):
                        place = raw.place if isinstance(raw, Malformed) else f"{source}, row {number}"
                        raise InputError(f"{place}: {verdict} (--strict). Nothing was written.") from None
                else:
                    n_kept += 1
                    kinds.add("text" if row["messages"] is None else "chat")
                    kept.append({**row, "source": source, "source_row": number})
                task.advance(1, f"{len(kept):,} kept")
            counts[source] = {"rows": n_rows, "kept": n_kept, "dropped": dict(sorted(dropped.items()))}
    if not kept:
        raise InputError(f"No usable row in {', '.join(config.source)}: {_explain(counts)}. Nothing was written.")
    if len(kinds) > 1:
        raise InputError("The sources mix dialogues and plain texts; prepare them as two corpora.")
    return kept, kinds.pop(), counts


def _explain(counts: dict[str, Any]) -> str:
    reasons = Counter[str]()
    for entry in counts.values():
        reasons.update(entry["dropped"])
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common()) or "0 rows read"


def _usable(raw: Row | Malformed, config: PrepareConfig) -> Row:
    """The row in one schema, `{"messages", "text"}` with one of the two None; raises `Unusable`."""
    if isinstance(raw, Malformed):
        raise Unusable(raw.reason)
    column = config.column or detect_column(raw)
    if column is None or raw.get(column) is None:
        raise Unusable("no known column")
    if column == TEXT_COLUMN or isinstance(raw[column], str):
        text = to_text(raw[column])
        if not text.strip():
            raise Unusable("empty text")
        return {"messages": None, "text": text}
    return {"messages": to_messages(raw[column]), "text": None}


def _duplicate(deduplicator: Deduplicator, row: Row, config: PrepareConfig) -> str | None:
    if row["messages"] is None:  # a document: Algorithm 1 is for dialogues
        return deduplicator.verdict((), row["text"])
    counted = [m["content"] for m in row["messages"] if config.ngram_system or m["role"] != "system"]
    return deduplicator.verdict(counted, canonical_json(row["messages"]))


def _write(rows: list[Row], kind: str, config: PrepareConfig, out: Path) -> dict[str, Any]:
    """Permute, split and write the rows; returns the corpus.json without counts."""
    order = np.random.default_rng(config.seed).permutation(len(rows))
    n_eval = min(config.eval_rows, len(rows) // 10)
    splits = {"eval": (0, n_eval), "train": (n_eval, len(rows))}
    digest = hashlib.sha256()
    for name, (start, stop) in splits.items():
        for number, first in enumerate(range(start, stop, ROWS_PER_SHARD)):
            last = min(first + ROWS_PER_SHARD, stop)
            shard = [{"row": row, **rows[order[row]]} for row in range(first, last)]
            for row in shard:
                digest.update(canonical_json(row).encode() + b"\n")
            _write_shard(shard, out / f"{name}-{number:05d}.parquet")
    return {
        "format": "fastcache-corpus",
        "format_version": CORPUS_VERSION,
        "kind": kind,
        "fingerprint": digest.hexdigest(),
        "settings": as_dict(config),
        "splits": {name: stop - start for name, (start, stop) in splits.items()},
    }


def _write_shard(rows: list[Row], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    require_space(path.parent, table.nbytes, "This part of the corpus")
    pq.write_table(table, path, compression="zstd")
    with path.open("rb") as file:
        os.fsync(file.fileno())
    fsync_directory(path.parent)
