"""Hashes of all n-grams of many turns at once.

A word's hash is made of its bytes, an n-gram's of its words' hashes, both twice, and 96 bits of the two are kept. Taken for
random numbers, the chance that any two among N distinct n-grams share all 96 bits is at most N^2 / 2^97, which is 4e-10
for the 8 billion of the paper's mixture. That they behave so is tested, not proven: whoever knows the fixed seeds could
make n-grams that collide.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastcache.stages.prepare.kernels import (
    PADDING,
    U32,
    U64,
    Bytes,
    Numbers,
    pair_up,
    spaces_to_ascii,
    unit_hashes,
    within_turns,
)

BATCH_BYTES = 1 << 17
"""Text hashed at a time: its arrays stay in the processor's caches."""

COLLISION_BITS = 96
_IS_SPACE = np.array([chr(byte).isspace() and byte < 128 for byte in range(256)])
_BEGINS_CHARACTER = np.arange(256) & 0xC0 != 0x80
_DOUBLE, _APPEND = np.uint64(0x9FB21C651E98DF25), np.uint64(0xA24BAED4963EE407)


class Turns(NamedTuple):
    """Texts in UTF-8, one after the other: turn t is data[starts[t]:stops[t]]; `PADDING` follows the last."""

    data: Bytes
    starts: Numbers
    stops: Numbers

    @classmethod
    def of(cls, data: bytearray, stops: Sequence[int]) -> "Turns":
        """Over `data`, which grows by the padding."""
        ends = np.array(stops, np.int64)
        data += bytes(PADDING)
        return cls(np.frombuffer(data, np.uint8), np.append(0, ends)[:-1], ends)

    @classmethod
    def join(cls, texts: Sequence[bytes]) -> "Turns":
        """From encoded texts."""
        return cls.of(bytearray().join(texts), list(accumulate(map(len, texts))))

    def lower(self) -> "Turns":
        """In lower case."""
        texts = [self.data[start:stop].tobytes() for start, stop in zip(self.starts, self.stops, strict=True)]
        return Turns.join([text.lower() if text.isascii() else text.decode().lower().encode() for text in texts])


class Grams(NamedTuple):
    """Some n-grams: hash `[m]`, second hash `[m]` of 32 bits, number of the row `[m]` each stands in."""

    hashes: U64
    checks: U32
    rows: U32


def _paired(left: U64, right: U64, factor: np.uint64) -> U64:
    out = np.empty(len(right), np.uint64)
    pair_up(left[: len(right)], right, factor, out)
    return out


def _folded(run: U64, n: int) -> U64:
    """Hash of every run of `n` neighbours, `[m - n + 1]`, by doubling: about log2(n) passes."""
    covered, length = 0, 1
    folded: U64 = run[:0]
    while True:
        if n & length:
            mine = run[covered:]
            folded = _paired(folded, mine, _APPEND) if covered else mine
            covered += length
        if covered == n:
            return folded
        run = _paired(run, run[length:], _DOUBLE)
        length *= 2


def _batch(turns: Turns, owners: U32, n: int, cuts_at: npt.NDArray[np.bool_], gap: int) -> Grams:
    starts, stops = turns.starts, turns.stops
    sizes = stops - starts
    cuts = np.empty(int(sizes.max(initial=0)) + 2, np.int64)
    n_most = int(((sizes + gap) // (1 + gap)).sum())
    first, second, counts = np.empty(n_most, np.uint64), np.empty(n_most, np.uint64), np.empty_like(starts)
    n_units = unit_hashes(turns.data, starts, stops, cuts_at, gap, cuts, first, second, counts)
    n_grams = int(np.maximum(counts - n + 1, 0).sum())
    grams = Grams(np.empty(n_grams, np.uint64), np.empty(n_grams, np.uint32), np.empty(n_grams, np.uint32))
    if n_grams:
        within_turns(_folded(first[:n_units], n), _folded(second[:n_units], n), counts, owners, n, *grams)
    return grams


def ngram_hashes(turns: Turns, owners: U32, n: int, unit: str) -> Iterator[Grams]:
    """All n-grams of `turns`, with repetitions, by batches; words are what white space separates, as they stand.

    `owners` `[t]` holds the number of the row that each turn belongs to.
    """
    data, starts, stops = turns
    cuts_at, gap = (_IS_SPACE, 1) if unit == "word" else (_BEGINS_CHARACTER, 0)
    if unit == "word" and data.max(initial=0) > 127:
        data = data.copy()
        spaces_to_ascii(data)
    batch_of = np.cumsum(stops - starts) // BATCH_BYTES
    for first, last in pairwise([0, *(np.flatnonzero(np.diff(batch_of)) + 1).tolist(), len(starts)]):
        yield _batch(Turns(data, starts[first:last], stops[first:last]), owners[first:last], n, cuts_at, gap)
