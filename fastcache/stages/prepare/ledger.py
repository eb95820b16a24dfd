"""What became of every input row, in compact columns: counts by reason, who repeats whom, and the ledger file."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from fastcache.files import atomic_file
from fastcache.stages.prepare.field_sets import MAX_NAMES, OTHER_FIELDS
from fastcache.stages.prepare.staging import Chunk

LEDGER_FILE = "ledger.parquet"
KEPT = "kept"
EXACT, NGRAM, EXCLUDED = "exact duplicate", "n-gram duplicate", "in an excluded set"
NEAR = "near duplicate"
ROWS_PER_GROUP = 500_000

Codes = npt.NDArray[np.int32]
Numbers = npt.NDArray[np.int64]


def _raw(values: pa.Array, kind: npt.DTypeLike) -> npt.NDArray[Any]:
    """A column without nulls; unlike `to_numpy` it doesn't import pandas, a quarter of a second."""
    return np.frombuffer(values.buffers()[1], kind, len(values))


def _coded(values: pa.ChunkedArray, names: list[str]) -> Codes:
    """Place of each value in `names`, which grows by those it lacks; nothing stands for KEPT."""
    encoded = values.combine_chunks().dictionary_encode("encode")
    known = [KEPT if name is None else name for name in encoded.dictionary.to_pylist()]
    names += [name for name in known if name not in names]
    places = np.array([names.index(name) for name in known], np.int32)
    return places[_raw(encoded.indices, np.int32)]


def _most_common(counts: Counter[str]) -> dict[str, int]:
    """The counts of the `MAX_NAMES` most common names, by name, with the sum of the others."""
    common = dict(counts.most_common(MAX_NAMES))
    others = counts.total() - sum(common.values())
    if others:
        common[OTHER_FIELDS] = common.get(OTHER_FIELDS, 0) + others
    return dict(sorted(common.items()))


@dataclass
class Ledger:
    """Columns over all input rows, in order: source, row there, outcome, and the input row that it repeats, or -1."""

    sources: list[str]
    outcomes: list[str]
    source: Codes
    source_row: Numbers
    outcome: Codes
    repeats: Numbers
    kinds: set[str]
    """`chat`, `text` or both: what the usable rows are."""

    @classmethod
    def of(cls, chunks: list[Chunk], repeats: Numbers) -> "Ledger":
        """From the staged rows and the row that each repeats: -1 for none, less for one of an excluded set."""
        sources: list[str] = []
        outcomes = [KEPT, EXACT, NGRAM, EXCLUDED]
        columns: list[tuple[Any, ...]] = []
        kinds: set[str] = set()
        for chunk in chunks:
            table = chunk.read(["source", "source_row", "reason", "whole", "text"])
            n_texts = chunk.n_rows - table["text"].null_count
            kinds |= ({"text"} if n_texts else set()) | ({"chat"} if table["reason"].null_count > n_texts else set())
            digests = _raw(table["whole"].combine_chunks(), "S12")
            reasons = _coded(table["reason"], outcomes)
            columns.append(
                (
                    _coded(table["source"], sources),
                    _raw(table["source_row"].combine_chunks(), np.int64),
                    reasons,
                    digests,
                )
            )
        source, source_row, outcome, whole = (np.concatenate(column) for column in zip(*columns, strict=True))
        same = (repeats >= 0) & (whole == whole[np.maximum(repeats, 0)])
        outcome[repeats >= 0] = outcomes.index(NGRAM)
        outcome[same] = outcomes.index(EXACT)
        outcome[repeats < -1] = outcomes.index(EXCLUDED)
        return cls(sources, outcomes, source, source_row, outcome, np.maximum(repeats, -1), kinds)

    def drop_near_duplicates(self, repeats: Numbers) -> None:
        """Drop the rows `[n]` that nearly repeat another one, -1 for those that don't."""
        self.outcomes.append(NEAR)
        self.outcome[repeats >= 0] = self.outcomes.index(NEAR)
        self.repeats = np.where(repeats >= 0, repeats, self.repeats)

    @property
    def kept(self) -> Numbers:
        """Input rows that are kept, in order."""
        return np.flatnonzero(self.outcome == 0)

    def counts(self) -> dict[str, Any]:
        """Rows read, kept, and dropped by reason, of every source."""
        table = np.zeros((len(self.sources), len(self.outcomes)), np.int64)
        np.add.at(table, (self.source, self.outcome), 1)
        return {
            name: {
                "rows": int(row.sum()),
                "kept": int(row[0]),
                "dropped": {reason: int(n) for reason, n in sorted(zip(self.outcomes[1:], row[1:], strict=True)) if n},
            }
            for name, row in zip(self.sources, table, strict=True)
        }

    def field_counts(self, chunks: list[Chunk]) -> dict[str, dict[str, dict[str, int]]]:
        """For each source, in how many kept rows of `chunks` each field beside the dialogue was kept, and was not kept.

        Of very many fields, those in most rows have their names; the rest are counted together as `OTHER_FIELDS`.
        """
        counts: dict[str, dict[str, Counter[str]]] = {
            name: {"kept": Counter(), "not_kept": Counter()} for name in self.sources
        }
        start = 0
        for chunk in chunks:
            rows = slice(start, start + chunk.n_rows)
            fields = chunk.read(["fields"])["fields"].combine_chunks()
            sets = [json.loads(text) for text in fields.dictionary.to_pylist()]
            kept = self.outcome[rows] == 0
            pairs = self.source[rows][kept].astype(np.int64) * len(sets) + _raw(fields.indices, np.int32)[kept]
            for pair, count in zip(*np.unique(pairs, return_counts=True), strict=True):
                source, number = divmod(int(pair), len(sets))
                for kind, names in zip(("kept", "not_kept"), sets[number], strict=True):
                    for name in names:
                        counts[self.sources[source]][kind][name] += int(count)
            start += chunk.n_rows
        return {
            source: {kind: _most_common(named) for kind, named in kinds.items()} for source, kinds in counts.items()
        }

    def explain(self) -> str:
        """The reasons for dropping, most frequent first."""
        reasons = Counter[str]()
        for entry in self.counts().values():
            reasons.update(entry["dropped"])
        return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common())

    def duplicates(self) -> dict[str, dict[str, int]]:
        """How many rows of a source repeat a row of each source."""
        table = np.zeros((len(self.sources),) * 2, np.int64)
        dropped = np.flatnonzero(self.repeats >= 0)
        np.add.at(table, (self.source[dropped], self.source[self.repeats[dropped]]), 1)
        return {
            name: {other: int(n) for other, n in zip(self.sources, row, strict=True) if n}
            for name, row in zip(self.sources, table, strict=True)
        }

    def write(self, path: Path, numbers: Numbers) -> None:
        """Write the ledger file; `numbers` `[n]` holds the number in the corpus of each input row, or -1."""
        schema = pa.schema(
            {"source": pa.string(), "source_row": pa.int64(), "outcome": pa.string(), "row": pa.int64()}
            | {"repeats_source": pa.string(), "repeats_row": pa.int64()}
        )
        sources, outcomes = (pa.array(names, pa.string()) for names in (self.sources, self.outcomes))
        with atomic_file(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for start in range(0, len(self.source), ROWS_PER_GROUP):
                rows = slice(start, start + ROWS_PER_GROUP)
                repeated = self.repeats[rows]
                none = repeated < 0
                other = pa.array(self.source[repeated], mask=none)
                columns = [
                    sources.take(pa.array(self.source[rows])),
                    pa.array(self.source_row[rows]),
                    outcomes.take(pa.array(self.outcome[rows])),
                    pa.array(numbers[rows], mask=numbers[rows] < 0),
                    sources.take(other),
                    pa.array(self.source_row[repeated], mask=none),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
