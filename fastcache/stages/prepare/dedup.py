"""The paper's deduplication (Algorithm 1): drop a sample if any of its n-grams was seen in a kept one before it.

A sample's n-grams are the union over its turns; a turn shorter than n gives none, so exact duplicates of whole
dialogues are looked for as well, and counted apart.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b


def _digest(text: str) -> bytes:
    # 8 bytes: among 10^7 n-grams, a false match anywhere has probability 3e-6.
    return blake2b(text.encode(), digest_size=8).digest()


def ngrams(text: str, n: int, unit: str) -> Iterator[bytes]:
    """Digests of the n-grams of one turn; words are what white space separates, as they stand."""
    if unit == "character":
        yield from (_digest(text[i : i + n]) for i in range(len(text) - n + 1))
        return
    words = text.split()
    yield from (_digest(" ".join(words[i : i + n])) for i in range(len(words) - n + 1))


class Deduplicator:
    """Sees samples in order and says which are duplicates."""

    def __init__(self, n: int = 20, unit: str = "word", exact: bool = True) -> None:
        self._n, self._unit, self._exact = n, unit, exact
        self._seen: set[bytes] = set()
        self._whole: set[bytes] = set()

    def verdict(self, turns: Sequence[str], whole: str) -> str | None:
        """`"exact duplicate"`, `"n-gram duplicate"` or None (keep); `whole` is the sample with its roles."""
        digest = blake2b(whole.encode(), digest_size=16).digest()
        if self._exact and digest in self._whole:
            return "exact duplicate"
        grams = {gram for turn in turns for gram in ngrams(turn, self._n, self._unit)} if self._n else set()
        if not self._seen.isdisjoint(grams):
            return "n-gram duplicate"
        self._seen |= grams
        self._whole.add(digest)
        return None
