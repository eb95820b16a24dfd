"""Near duplicates by MinHash, through datasketch: what shares most of its words' n-grams with a kept dialogue is dropped.

An addition to the paper's deduplication, off by default. It keeps a signature of every kept dialogue in memory, about
2 kB each, and works on one core.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fastcache.progress import Progress
from fastcache.stages.prepare.ngrams import Turns, ngram_hashes
from fastcache.stages.prepare.staging import Chunk

SHINGLE_WORDS = 5
PERMUTATIONS = 128


def near_duplicates(
    chunks: list[Chunk], kept: npt.NDArray[np.bool_], threshold: float, progress: Progress
) -> npt.NDArray[np.int64]:
    """For each staged row `[n]` the earlier kept row that it nearly repeats, or -1; only rows in `kept` are looked at.

    Two dialogues are near duplicates if the estimated Jaccard similarity of their turns' 5-word n-grams is at least
    `threshold`. Turns shorter than 5 words count as one n-gram.
    """
    from datasketch import MinHash, MinHashLSH

    repeats = np.full(len(kept), -1, np.int64)
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    with progress.task("MinHash", len(kept), "rows") as task:
        for row, turns in _turns(chunks):
            task.advance(1)
            if not kept[row] or not turns:
                continue
            short = [" ".join(turn.split()) for turn in turns if len(turn.split()) < SHINGLE_WORDS]
            encoded = Turns.join([turn.encode() for turn in turns])
            grams = ngram_hashes(encoded, np.zeros(len(turns), np.uint32), SHINGLE_WORDS, "word")
            hashes = [value for piece in grams for value in piece.hashes.tolist()]
            signature = MinHash(num_perm=PERMUTATIONS)
            signature.update_batch(
                [value.to_bytes(8, "little") for value in hashes] + [turn.encode() for turn in short]
            )
            if near := index.query(signature):
                repeats[row] = min(near)
            else:
                index.insert(row, signature, check_duplication=False)
    return repeats


def _turns(chunks: list[Chunk]) -> Iterator[tuple[int, list[str]]]:
    """Number and contents, system turns left out, of every staged row."""
    row = 0
    for chunk in chunks:
        for messages in chunk.read(["messages"])["messages"].to_pylist():
            yield row, [message["content"] or "" for message in messages or () if message["role"] != "system"]
            row += 1
