"""The loops over bytes, words and n-grams, compiled by numba when they are first called and kept on disk from then on.

All of them stand in this file: numba compiles a function again when its file changes, not when one it calls does.

Hashes have two lanes of 64 bits. A lane takes in eight bytes at a time, by steps that are one-to-one in the bytes and in
what the lane holds; splitmix64 finishes it. The seeds are fixed, so that a killed run can go on.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
U32 = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]
F = TypeVar("F", bound=Callable[..., object])

PADDING = 8
"""Bytes that must follow the text: it is read eight at a time."""

_SEED = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xD6E8FEB86659FD93), np.uint64(0xC2B2AE3D27D4EB4F)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def compiled(function: F) -> F:
    """`function`, compiled; the compiled code is kept where numba finds a folder that it may write to."""
    try:
        fast = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no such folder: compile it in every process
        fast = numba.njit(nogil=True)(function)
    return cast(F, fast)


@compiled
def _mixed(x: np.uint64) -> np.uint64:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every bit of x moves every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@compiled
def _step(x: np.uint64, a: np.uint64, b: np.uint64) -> tuple[np.uint64, np.uint64]:
    """Both lanes after eight more bytes."""
    a = (a ^ x) * _FIRST
    b = (b + x) * _SECOND
    return a ^ (a >> np.uint64(32)), b ^ (b >> np.uint64(29))


@compiled
def _eight(data: Bytes, place: int) -> np.uint64:
    """Eight bytes as a little-endian number; written so that the compiler makes one load of it."""
    d = data[place : place + 8]
    low = np.uint64(d[0]) | np.uint64(d[1]) << 8 | np.uint64(d[2]) << 16 | np.uint64(d[3]) << 24
    return low | np.uint64(d[4]) << 32 | np.uint64(d[5]) << 40 | np.uint64(d[6]) << 48 | np.uint64(d[7]) << 56


@compiled
def _take_in(data: Bytes, start: int, size: int, a: np.uint64, b: np.uint64) -> tuple[np.uint64, np.uint64]:
    """Both lanes after data[start:start+size]."""
    while size > 8:
        a, b = _step(_eight(data, start), a, b)
        start += 8
        size -= 8
    if size:
        a, b = _step(_eight(data, start) << np.uint64(64 - 8 * size), a, b)
    return a, b


@compiled
def spaces_to_ascii(data: Bytes) -> None:
    """White space beyond ASCII, as `str.split` knows it, becomes spaces, in place; `data` is UTF-8, with `PADDING`."""
    for i in range(len(data) - 2):
        lead, second, third = data[i], data[i + 1], data[i + 2]
        if lead == 0xC2:  # U+0085, U+00A0
            if second in (0x85, 0xA0):
                data[i : i + 2] = 0x20
        elif lead == 0xE1:  # U+1680
            if second == 0x9A and third == 0x80:
                data[i : i + 3] = 0x20
        elif lead == 0xE2:  # U+2000 to U+200A, U+2028, U+2029, U+202F, U+205F
            if (second == 0x80 and (third <= 0x8A or third in (0xA8, 0xA9, 0xAF))) or (
                second == 0x81 and third == 0x9F
            ):
                data[i : i + 3] = 0x20
        elif lead == 0xE3 and second == 0x80 and third == 0x80:  # U+3000
            data[i : i + 3] = 0x20


@compiled
def unit_hashes(
    data: Bytes,
    starts: Numbers,
    stops: Numbers,
    cuts_at: npt.NDArray[np.bool_],
    gap: int,
    cuts: Numbers,
    first: U64,
    second: U64,
    counts: Numbers,
) -> int:
    """Fill in two hashes of every unit of the turns data[start:stop] and the number of units in each; returns their sum.

    Turns are cut at the bytes in `cuts_at`; these take `gap` bytes that belong to no unit. `cuts` is room for the cuts of
    one turn.
    """
    n_units = 0
    for turn in range(len(starts)):
        n_before = n_units
        n_cuts = 1
        cuts[0] = starts[turn] - gap
        for i in range(starts[turn] + 1 - gap, stops[turn]):  # no branch: where words end can't be foreseen
            cuts[n_cuts] = i
            n_cuts += cuts_at[data[i]]
        cuts[n_cuts] = stops[turn]
        for cut in range(n_cuts):
            start = cuts[cut] + gap
            size = cuts[cut + 1] - start
            if size > 0:
                a = np.uint64(size) * _SEED
                a, b = _take_in(data, start, size, a, ~a)
                first[n_units], second[n_units] = _mixed(a), _mixed(b)
                n_units += 1
        counts[turn] = n_units - n_before
    return n_units


@compiled
def pair_up(left: U64, right: U64, factor: np.uint64, out: U64) -> None:
    """Fill in the hash of each `left` with its `right`."""
    for i in range(len(out)):
        out[i] = _mixed(left[i] * factor + right[i])


@compiled
def within_turns(
    first: U64, second: U64, counts: Numbers, owners: U32, n: int, hashes: U64, checks: U32, rows: U32
) -> None:
    """Fill in hash, check and row of the runs of `n` units that don't go over the end of a turn; `owners` `[t]` are rows."""
    place = unit = 0
    for turn in range(len(counts)):
        for i in range(unit, unit + counts[turn] - n + 1):
            hashes[place] = first[i]
            checks[place] = second[i] >> np.uint64(32)
            rows[place] = owners[turn]
            place += 1
        unit += counts[turn]


@compiled
def whole_hashes(
    data: Bytes, starts: Numbers, stops: Numbers, codes: Bytes, n_turns: Numbers, hashes: U64, checks: U32
) -> None:
    """Fill in hash and check of every row: of its turns' lengths, `codes` and bytes; row r has n_turns[r] turns."""
    turn = 0
    for row in range(len(n_turns)):
        a, b = np.uint64(n_turns[row]), _SEED
        for _ in range(n_turns[row]):
            size = stops[turn] - starts[turn]
            a, b = _step(np.uint64(size) << np.uint64(8) | np.uint64(codes[turn]), a, b)
            a, b = _take_in(data, starts[turn], size, a, b)
            turn += 1
        hashes[row], checks[row] = _mixed(a), _mixed(b) >> np.uint64(32)


@compiled
def count_buckets(hashes: U64, shift: int, counts: Numbers) -> None:
    """Add to `counts` how many hashes fall into each bucket, hash >> shift."""
    for gram in range(len(hashes)):
        counts[np.int64(hashes[gram] >> np.uint64(shift))] += 1


@compiled
def deal(hashes: U64, checks: U32, rows: U32, shift: int, places: Numbers, out: U64) -> None:
    """Put n-grams into `out` `[m, 2]` at their bucket's place, which moves on: the hash, and the check with the row."""
    for gram in range(len(hashes)):
        bucket = np.int64(hashes[gram] >> np.uint64(shift))
        out[places[bucket], 0] = hashes[gram]
        out[places[bucket], 1] = np.uint64(checks[gram]) | np.uint64(rows[gram]) << np.uint64(32)
        places[bucket] += 1


@compiled
def walk(rows: U32, groups: Numbers, n_given: int, owned: npt.NDArray[np.bool_], blame: Numbers) -> None:
    """Algorithm 1 over (row, group) pairs in the order of rows: fills `blame` by row and `owned` by group.

    A row with a group that a row kept before it owns is blamed for the first such; any other comes to own its groups.
    """
    start = 0
    while start < len(rows):
        row = np.int64(rows[start])
        stop = start
        while stop < len(rows) and rows[stop] == row:
            if blame[row] < 0 and row >= n_given and owned[groups[stop]]:
                blame[row] = groups[stop]
            stop += 1
        if blame[row] < 0:
            for pair in range(start, stop):
                owned[groups[pair]] = True
        start = stop
