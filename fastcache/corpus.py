"""The corpus directory that `prepare` writes and `extract` reads: Parquet files by split, and corpus.json.

A row is a dialogue (`messages`, and `tools` where it has any) or a plain document (`text`). Rows are numbered in their
permuted order, over all splits; that number is the row's name everywhere downstream.

A message has a role (system, user, assistant or tool) and a content, and where the data set has them the fields of
`OPTIONAL_FIELDS`. Its content is null only if it is an assistant's that consists of tool calls or reasoning. Tool calls
and tools are stored as JSON text, because their arguments and parameters have no common type.
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
from fastcache.files import parse_json, read_json, require_fields

CORPUS_FILE = "corpus.json"
CORPUS_VERSION = "1.1"
"""1.1 added `OPTIONAL_FIELDS` and `tools`; corpora of 1.0 are read as those that have none of them."""

OPTIONAL_FIELDS = ("reasoning_content", "tool_calls", "tool_call_id", "name")
"""Fields of a message beside role and content; `tool_calls` is JSON text of a list of
`{"id"?, "type": "function", "function": {"name", "arguments"}}`, with arguments as an object or as text, as the source
had them."""

Message = dict[str, Any]
"""A message in memory: `role`, and of `content` and `OPTIONAL_FIELDS` those that are there; tool calls are parsed."""

MESSAGE = pa.struct([(name, pa.string()) for name in ("role", "content", *OPTIONAL_FIELDS)])
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("messages", pa.list_(MESSAGE)),
        ("text", pa.string()),
        ("tools", pa.string()),
    ]
)


@dataclass(frozen=True)
class CorpusRow:
    """One dialogue or document."""

    row: int
    source: str
    messages: list[Message] | None
    text: str | None
    tools: list[Any] | None = None
    """Definitions of the tools that a dialogue has, as its data set had them."""


def present(stored: dict[str, Any]) -> dict[str, Any]:
    """The fields of a stored struct that are not null."""
    return {name: value for name, value in stored.items() if value is not None}


def _parsed_list(text: str, where: str) -> list[Any]:
    value = parse_json(text, where)
    if not isinstance(value, list):
        raise FormatError(f"{where} should be a JSON list, found {type(value).__name__}. Prepare the corpus again.")
    return value


def to_row(stored: dict[str, Any], path: Path) -> CorpusRow:
    """A row as a file of a corpus of any version 1.x has it; raises `FormatError` that names `path` for broken JSON."""
    where = f"{path}, row {stored['row']}"
    messages = stored["messages"]
    if messages is not None:
        messages = [present(message) for message in messages]
        for message in messages:
            if "tool_calls" in message:
                message["tool_calls"] = _parsed_list(message["tool_calls"], f"{where}: tool_calls")
    tools = stored.get("tools")
    if tools is not None:
        tools = _parsed_list(tools, f"{where}: tools")
    return CorpusRow(stored["row"], stored["source"], messages, stored["text"], tools)


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
                yield to_row(raw, path)
        if found != expected:
            raise IntegrityError(
                f"{self.path} has {found} rows in the split {split!r}, expected {expected}. Prepare it again."
            )
