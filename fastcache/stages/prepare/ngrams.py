"""Hashes of all n-grams of many turns at once, in numpy.

A word's hash is a polynomial over its bytes modulo 2^64, read off a running sum over the whole batch; an n-gram's hash
folds its words' hashes together in about log2(n) steps. Two independent hashes are made of everything, and 96 bits of
them are kept: among N distinct n-grams, the chance that any two share all 96 bits is at most N^2 / 2^97, which is 4e-10
for the 8 billion of the paper's mixture.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
BATCH_BYTES = 1 << 18
"""Text hashed at a time: its arrays stay in the processor's caches."""

COLLISION_BITS = 96
_IS_SPACE = np.array([chr(byte).isspace() and byte < 128 for byte in range(256)])
_BASES = (0x9E3779B97F4A7C13, 0xC2B2AE3D27D4EB4B)
"""Odd, and 3 modulo 8, so that differences of their powers have few factors of two."""


class Grams(NamedTuple):
    """N-grams of a batch: hash `[m]`, second hash `[m]` of 32 bits, number of the turn `[m]` each stands in."""

    hashes: U64
    checks: npt.NDArray[np.uint32]
    turns: npt.NDArray[np.int64]


def _mixed(x: U64) -> U64:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every bit of x moves every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@cache
def _byte_values(which: int) -> U64:
    return np.random.default_rng([20, which]).integers(0, 2**64, 256, dtype=np.uint64)


@cache
def _powers(base: int, log2_length: int) -> U64:
    factors = np.full(1 << log2_length, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _word_hashes(
    data: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64], which: int
) -> U64:
    """Hash of data[start:end] for each word."""
    size = max(10, len(data).bit_length())
    base = _BASES[which]
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum(_byte_values(which)[data] * _powers(base, size)[: len(data)], out=sums[1:])
    shifted = (sums[ends] - sums[starts]) * _powers(pow(base, -1, 2**64), size)[starts]
    return _mixed(shifted + (ends - starts).astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93))


def _folded(hashes: U64, n: int) -> U64:
    """Hash of every run of `n` neighbours, `[len - n + 1]`, by doubling."""
    folded: U64 = np.empty(0, np.uint64)
    covered, power, length = 0, hashes, 1
    while covered < n:
        if n & length:
            stop = len(hashes) - covered - length + 1
            mine = power[covered : covered + stop]
            folded = _mixed(folded[:stop] * np.uint64(0xA24BAED4963EE407) + mine) if covered else mine
            covered += length
        if covered < n:
            power = _mixed(power[:-length] * np.uint64(0x9FB21C651E98DF25) + power[length:])
            length *= 2
    return folded


def _word_grams(turns: Sequence[str], n: int) -> Grams:
    if not all(map(str.isascii, turns)):  # leave Unicode's white space to Python
        turns = [" ".join(turn.split()) for turn in turns]
    encoded = [turn.encode() for turn in turns]
    data = np.frombuffer(b"\n".join(encoded), np.uint8)
    gaps = np.flatnonzero(_IS_SPACE[data])
    starts, ends = np.concatenate([[0], gaps + 1]), np.concatenate([gaps, [len(data)]])
    real = ends > starts
    starts, ends = starts[real], ends[real]
    turn_starts = np.cumsum([0, *(len(turn) + 1 for turn in encoded[:-1])])
    owners = np.searchsorted(turn_starts, starts, side="right") - 1
    return _grams([_word_hashes(data, starts, ends, which) for which in (0, 1)], owners, n)


def _character_grams(turns: Sequence[str], n: int) -> Grams:
    points = np.frombuffer("".join(turns).encode("utf-32-le"), np.uint32).astype(np.uint64)
    owners = np.repeat(np.arange(len(turns)), [len(turn) for turn in turns])
    hashes = [_mixed((points + np.uint64(1)) * np.uint64(base)) for base in _BASES]
    return _grams(hashes, owners, n)


def _grams(hashes: list[U64], owners: npt.NDArray[np.int64], n: int) -> Grams:
    if len(owners) < n:
        empty = np.empty(0, np.uint64)
        return Grams(empty, empty.astype(np.uint32), empty.astype(np.int64))
    whole = owners[: len(owners) - n + 1] == owners[n - 1 :]  # an n-gram doesn't go over the end of a turn
    first, second = (_folded(one, n)[whole] for one in hashes)
    return Grams(first, (second >> np.uint64(32)).astype(np.uint32), owners[: len(whole)][whole])


def ngram_hashes(turns: Sequence[str], n: int, unit: str) -> Grams:
    """All n-grams of `turns`, with repetitions; words are what white space separates, as they stand."""
    make = _word_grams if unit == "word" else _character_grams
    pieces: list[Grams] = []
    first, size = 0, 0
    for index, turn in enumerate(turns):
        size += len(turn)
        if size >= BATCH_BYTES or index + 1 == len(turns):
            piece = make(turns[first : index + 1], n)
            pieces.append(piece._replace(turns=piece.turns + first))
            first, size = index + 1, 0
    if not pieces:
        return make([""], n)
    return Grams(*(np.concatenate(column) for column in zip(*pieces, strict=True)))
