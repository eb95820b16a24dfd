"""The corpus directory that `prepare` writes and `extract` reads: Parquet files by split, and corpus.json.

A row is a dialogue (`messages`) or a plain document (`text`). Rows are numbered in their permuted order, over all
splits; that number is the row's name everywhere downstream.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fastcache.errors import FormatError, InputError, IntegrityError
from fastcache.files import read_json, require_fields

CORPUS_FILE = "corpus.json"
CORPUS_VERSION = "1.0"

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("messages", pa.list_(MESSAGE)),
        ("text", pa.string()),
    ]
)


@dataclass(frozen=True)
class CorpusRow:
    """One dialogue or document."""

    row: int
    source: str
    messages: list[dict[str, str]] | None
    text: str | None


def _rows_of(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import dataset  # 40 MB, which only readers of rows need

    try:
        # Arrow's own memory pool keeps what it once had; the system's gives it back.
        pool = pa.system_memory_pool()
        rows = dataset.dataset(path, format="parquet").scanner(
            batch_size=1024, batch_readahead=1, fragment_readahead=0, use_threads=False, memory_pool=pool
        )
        for batch in rows.to_batches():
            yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise IntegrityError(f"{path} can't be read ({error}). Prepare the corpus again.") from error


class Corpus:
    """A corpus directory opened for reading."""

    def __init__(self, path: Path, info: dict[str, Any] | None = None) -> None:
        """Raises `FormatError` if `path` is no corpus directory of this version; `info` stands in for its corpus.json."""
        self.path = path
        self.info = info or read_json(path / CORPUS_FILE)
        if self.info.get("format") != "fastcache-corpus" or str(self.info.get("format_version"))[:2] != "1.":
            raise FormatError(
                f"{path / CORPUS_FILE} is not a fastcache corpus of version 1.x. Run `fastcache prepare`."
            )
        fields = {"fingerprint": str, "kind": str, "splits": dict, "counts": dict}
        require_fields(self.info, fields, path / CORPUS_FILE)

    @property
    def fingerprint(self) -> str:
        """Hash of every row in order: tells this corpus from any other."""
        return str(self.info["fingerprint"])

    @property
    def kind(self) -> str:
        """`chat` or `text`."""
        return str(self.info["kind"])

    def n_rows(self, split: str) -> int:
        """Number of rows of a split; raises `InputError` for an unknown or empty one."""
        splits = self.info["splits"]
        if not splits.get(split):
            known = ", ".join(f"{name} ({count})" for name, count in splits.items())
            raise InputError(f"{self.path} has no rows in the split {split!r}; it has {known}.")
        return int(splits[split])

    def sources_of(self, split: str, rows: set[int]) -> dict[str, int]:
        """How many of `rows` come from each source."""
        counts = Counter[str]()
        for path in sorted(self.path.glob(f"{split}-*.parquet")) if rows else []:
            table = pq.read_table(path, columns=["row", "source"])
            wanted = pa.array(np.isin(table["row"].to_numpy(), list(rows)))
            counts.update(table["source"].filter(wanted).to_pylist())
        return dict(sorted(counts.items()))

    def source_numbers(self, split: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The source of each of `rows` `[n]`, as a number; raises `InputError` for rows that aren't in the split."""
        columns = ["row", "source"]
        tables = [pq.read_table(path, columns=columns) for path in sorted(self.path.glob(f"{split}-*.parquet"))]
        table = pa.concat_tables([SCHEMA.empty_table().select(columns), *tables]).sort_by("row")
        there = table["row"].to_numpy()
        places = np.searchsorted(there, rows)
        if len(rows) and (not len(there) or (there[np.minimum(places, len(there) - 1)] != rows).any()):
            raise InputError(f"{self.path} hasn't all the rows that were asked for in the split {split!r}.")
        sources = table["source"].to_numpy()
        return np.unique(sources.astype(str), return_inverse=True)[1][places]

    def rows(self, split: str) -> Iterator[CorpusRow]:
        """The rows of a split, in order; raises `IntegrityError` at the end if some are missing."""
        expected, found = self.n_rows(split), 0
        for path in sorted(self.path.glob(f"{split}-*.parquet")):
            for raw in _rows_of(path):
                found += 1
                yield CorpusRow(raw["row"], raw["source"], raw["messages"], raw["text"])
        if found != expected:
            raise IntegrityError(
                f"{self.path} has {found} rows in the split {split!r}, expected {expected}. Prepare it again."
            )
