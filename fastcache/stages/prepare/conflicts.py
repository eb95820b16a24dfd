"""Which n-grams stand in more than one row: found range by range of the hashes, so that memory stays bounded.

The staging step leaves one file of n-grams per chunk, sorted by hash. A range of hashes is a slice of each of them; all
slices of a range together are sorted, and n-grams that two different rows share become a *group*. What is left of billions
of n-grams is a list of (row, group): only these rows can be duplicates.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastcache.stages.prepare.ngrams import U64

GRAM = np.dtype([("hash", "<u8"), ("check", "<u4"), ("row", "<u4")])
"""An n-gram on disk; `row` is the number within the chunk."""

PAIR = np.dtype([("row", "<u4"), ("group", "<u4")])
BYTES_PER_GRAM = 64
"""Memory that finding the groups takes for each n-gram: the n-gram itself, the sorted one, the order, the masks."""


class GramFile(NamedTuple):
    """N-grams of one chunk, sorted by hash, and the number of the chunk's first row."""

    path: Path
    first_row: int


def write_grams(path: Path, hashes: U64, checks: npt.NDArray[np.uint32], rows: npt.NDArray[np.int64]) -> None:
    """Write the n-grams of a chunk, sorted by hash."""
    grams = np.empty(len(hashes), GRAM)
    order = np.argsort(hashes)
    grams["hash"], grams["check"], grams["row"] = hashes[order], checks[order], rows[order]
    grams.tofile(path)


def _slice(file: GramFile, low: int, high: int) -> npt.NDArray[np.void]:
    """The n-grams with low <= hash < high; rows are numbered over all chunks."""
    if not file.path.stat().st_size:
        return np.empty(0, GRAM)
    grams = np.memmap(file.path, GRAM, mode="r")
    start, stop = (int(np.searchsorted(grams["hash"], np.uint64(min(edge, 2**64 - 1)))) for edge in (low, high))
    if high >= 2**64:
        stop = len(grams)
    found = np.array(grams[start:stop])
    found["row"] += np.uint32(file.first_row)
    return found


def find_pairs(files: Sequence[GramFile], low: int, high: int) -> tuple[npt.NDArray[np.void], int]:
    """Pairs `[p]` of row and group, sorted by row, for the n-grams with low <= hash < high; and the number of groups."""
    grams = np.concatenate([_slice(file, low, high) for file in files])
    # Most hashes stand alone: only those that don't are worth a sort by all three fields.
    order = np.argsort(grams["hash"].copy())
    ordered = grams["hash"][order]
    equal = ordered[1:] == ordered[:-1]
    tied = np.zeros(len(grams), bool)
    tied[1:] |= equal
    tied[:-1] |= equal
    grams = grams[order[tied]]
    grams = grams[np.lexsort((grams["row"], grams["check"], grams["hash"]))]
    starts_group = np.ones(len(grams), bool)
    starts_group[1:] = (grams["hash"][1:] != grams["hash"][:-1]) | (grams["check"][1:] != grams["check"][:-1])
    starts = np.flatnonzero(starts_group)
    sizes = np.diff(np.append(starts, len(grams)))
    shared = sizes > 1  # a row that has an n-gram twice shares it with itself, which drops nothing
    pairs = np.empty(int(sizes[shared].sum()), PAIR)
    pairs["row"] = grams["row"][np.repeat(shared, sizes)]
    pairs["group"] = np.repeat(np.arange(shared.sum()), sizes[shared])
    return pairs[np.argsort(pairs["row"], kind="stable")], int(shared.sum())


class PairFile(NamedTuple):
    """Pairs of one range on disk, sorted by row, and the number of the range's first group."""

    path: Path
    first_group: int


def _rows_of(file: PairFile, first: int, last: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    if not file.path.stat().st_size:
        return np.empty(0, np.uint32), np.empty(0, np.int64)
    pairs = np.memmap(file.path, PAIR, mode="r")
    start, stop = np.searchsorted(pairs["row"], np.array([first, last], np.uint32))
    found = np.array(pairs[start:stop])
    return found["row"], found["group"].astype(np.int64) + file.first_group


def resolve(
    files: Sequence[PairFile], n_rows: int, n_groups: int, bucket_rows: int, n_given: int = 0
) -> npt.NDArray[np.int64]:
    """Walk the rows in order, as Algorithm 1 does: for each row the first of its groups that a kept row has, or -1.

    The first `n_given` rows are kept whatever they share.

    Returns `[n_rows]`; rows with -1 are kept. A dropped row's group leads to the kept row that it repeats.
    """
    blame = np.full(n_rows, -1, np.int64)
    owned = np.zeros(n_groups, bool)
    for first in range(0, n_rows, bucket_rows):
        parts = [_rows_of(file, first, min(first + bucket_rows, n_rows)) for file in files]
        if not parts:
            break
        rows, groups = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(rows, kind="stable")
        rows, groups = rows[order], groups[order]
        edges = np.append(np.flatnonzero(np.diff(rows, prepend=-1) != 0), len(rows)).tolist()
        for start, stop in pairwise(edges):
            mine = groups[start:stop]
            taken = owned[mine]
            if taken.any() and rows[start] >= n_given:
                blame[rows[start]] = mine[taken.argmax()]
            else:
                owned[mine] = True
    return blame


def owners(files: Sequence[PairFile], blame: npt.NDArray[np.int64], bucket_rows: int) -> npt.NDArray[np.int64]:
    """For each row `[n_rows]` the kept row that has the group it is blamed for, or -1 for kept rows."""
    wanted = np.unique(blame[blame >= 0])
    owner = np.full(len(wanted), -1, np.int64)
    for first in range(0, len(blame), bucket_rows):
        for file in files:
            rows, groups = _rows_of(file, first, min(first + bucket_rows, len(blame)))
            places = np.searchsorted(wanted, groups)
            hit = (blame[rows] < 0) & (places < len(wanted))
            hit[hit] = wanted[places[hit]] == groups[hit]
            owner[places[hit]] = rows[hit]
    result = np.full(len(blame), -1, np.int64)
    dropped = blame >= 0
    result[dropped] = owner[np.searchsorted(wanted, blame[dropped])]
    return result
