"""Which n-grams stand in more than one row: found range by range of the hashes, so that memory stays bounded.

The staging step leaves one file of n-grams per chunk, dealt to buckets by the first bits of their hashes. A range is some
neighbouring buckets of all the files; n-grams in it that two different rows share become a *group*. What is left of billions
of n-grams is a list of (row, group): only these rows can be duplicates.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastcache.files import atomic_file, create_file
from fastcache.stages.prepare.kernels import U64, count_buckets, deal, walk
from fastcache.stages.prepare.ngrams import Grams

GRAM = np.dtype([("hash", "<u8"), ("check", "<u4"), ("row", "<u4")])
"""An n-gram on disk; `row` is the number within the chunk."""

BUCKET_BITS = 12
N_BUCKETS = 1 << BUCKET_BITS
PAIR = np.dtype([("row", "<u4"), ("group", "<u4")])
BYTES_PER_GRAM = 64
"""Memory that finding the groups takes for each n-gram: itself, its hash twice, once sorted, and masks."""


class GramFile(NamedTuple):
    """N-grams of one chunk, by buckets, and the number of the chunk's first row."""

    path: Path
    first_row: int


def write_grams(path: Path, pieces: Sequence[Grams]) -> None:
    """Write the n-grams of a chunk: the edges of the buckets, then the n-grams bucket by bucket."""
    shift = 64 - BUCKET_BITS
    edges = np.zeros(N_BUCKETS + 1, np.int64)
    for piece in pieces:
        count_buckets(piece.hashes, shift, edges[1:])
    np.cumsum(edges, out=edges)
    places = edges.copy()
    grams = np.empty((int(edges[-1]), 2), np.uint64)
    for piece in pieces:
        deal(*piece, shift, places, grams)
    with atomic_file(path) as temporary, create_file(temporary) as file:
        file.write(edges.data)  # numpy's `tofile` doesn't say why a disk takes no more
        file.write(grams.data)


def _tied(hashes: U64) -> npt.NDArray[np.bool_]:
    """Mask `[m]` that holds all hashes that occur more than once, and few others."""
    ordered = np.sort(hashes)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    # Of 64 places or more at most one is marked; where nearly all hashes are tied, memory stays at 8 bytes a hash.
    n_bits = min(len(twice).bit_length() + 6, len(hashes).bit_length() + 2)
    mask = np.uint64((1 << n_bits) - 1)
    marked = np.zeros(1 << n_bits, bool)
    marked[twice & mask] = True
    return marked[hashes & mask]


def _tied_grams(files: Sequence[GramFile], low: int, high: int) -> npt.NDArray[np.void]:
    """The n-grams in the buckets low..high - 1 that may stand in two rows; rows are numbered over all chunks."""
    edges = np.array([np.fromfile(path, np.int64, high - low + 1, offset=8 * low)[[0, -1]] for path, _ in files])
    ends = np.cumsum(edges[:, 1] - edges[:, 0])
    grams = np.empty((int(ends[-1]), 2), np.uint64)
    for file, first, end, count in zip(files, edges[:, 0], ends, np.diff(edges)[:, 0], strict=True):
        with file.path.open("rb") as stream:
            stream.seek(8 * (N_BUCKETS + 1) + int(first) * GRAM.itemsize)
            stream.readinto(grams[end - count : end].data)
    places = np.flatnonzero(_tied(grams[:, 0].copy()))
    found = grams[places].view(GRAM)[:, 0]
    found["row"] += np.array([file.first_row for file in files], np.uint32)[np.searchsorted(ends, places, side="right")]
    return found


def find_pairs(files: Sequence[GramFile], low: int, high: int) -> tuple[npt.NDArray[np.void], int]:
    """Pairs `[p]` of row and group, sorted by row, for the n-grams in the buckets low..high - 1; and the number of groups."""
    grams = _tied_grams(files, low, high)  # few: most n-grams stand alone, and are not worth a sort by both fields
    grams = grams[np.lexsort((grams["check"], grams["hash"]))]
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
        walk(rows[order], groups[order], n_given, owned, blame)
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
