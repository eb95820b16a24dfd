"""The paper's deduplication (Algorithm 1) at any size: drop a sample if any of its n-grams was seen in a kept one before it.

What a Python set of n-grams would say, for any number of processes and any memory: `conflicts.py` finds the n-grams that
rows share, then the rows are walked in order. Rows given as excluded come first and own all their n-grams.
"""

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcache.files import make_directory, read_json, write_bytes_atomic, write_json_atomic
from fastcache.progress import Progress
from fastcache.stages.prepare.conflicts import (
    BYTES_PER_GRAM,
    N_BUCKETS,
    PAIR,
    GramFile,
    PairFile,
    find_pairs,
    owners,
    resolve,
)
from fastcache.stages.prepare.staging import Chunk
from fastcache.workers import process_pool

BUCKET_ROWS = 1 << 18
RANGE_GRAMS = 1 << 20
"""N-grams in a range: few, for the processor's caches."""

PIECE_GRAMS = 1 << 12
"""N-grams that a range should have in each file, even if it grows by that: smaller pieces are slow to read."""


SMALL_JOB = 1 << 25
"""N-grams below which starting processes costs more than it gains."""


def _range_pairs(files: list[GramFile], low: int, high: int, path: Path) -> None:
    """Write the pairs of one range of buckets, and the number of its groups."""
    pairs, n_groups = find_pairs(files, low, high)
    write_bytes_atomic(path, pairs.tobytes())
    write_json_atomic(path.with_suffix(".json"), {"n_groups": n_groups})


def find_repeats(
    chunks: list[Chunk], n_excluded: int, folder: Path, n_workers: int, memory_bytes: int, progress: Progress
) -> npt.NDArray[np.int64]:
    """For each row of `chunks` the earlier kept row that it repeats, or -1; the first `n_excluded` rows are all kept.

    The result depends neither on `n_workers` nor on `memory_bytes`. Ranges that an earlier run left are used again.
    """
    make_directory(folder)
    firsts = [0, *accumulate(chunk.n_rows for chunk in chunks)]
    files = [GramFile(chunk.grams_path, first) for chunk, first in zip(chunks, firsts, strict=False)]
    n_grams = sum(chunk.n_grams for chunk in chunks)
    wanted = max(RANGE_GRAMS, PIECE_GRAMS * len(files))
    range_grams = min(wanted, memory_bytes // 2 // BYTES_PER_GRAM // n_workers + 1)
    n_ranges = min(N_BUCKETS, n_grams // range_grams + 1)
    edges = [N_BUCKETS * index // n_ranges for index in range(n_ranges + 1)]
    jobs: list[tuple[Any, ...]] = []
    for index in range(n_ranges):
        path = folder / f"{n_ranges}-{index:05d}.pairs"
        jobs.append((files, edges[index], edges[index + 1], path))
    counts: list[int] = []
    inline = n_workers == 1 or n_grams < SMALL_JOB
    with (
        progress.task("find shared n-grams", n_ranges, "ranges") as task,
        process_pool(n_workers) as pool,
    ):
        waiting = [None if inline or _done(job[3]) else pool.submit(_range_pairs, *job) for job in jobs]
        for job, future in zip(jobs, waiting, strict=True):
            if future is not None:
                future.result()
            elif not _done(job[3]):
                _range_pairs(*job)
            counts.append(read_json(job[3].with_suffix(".json"))["n_groups"])
            task.advance(1)
    pair_files = [PairFile(job[3], first) for job, first in zip(jobs, [0, *accumulate(counts)], strict=False)]
    n_pairs = sum(file.path.stat().st_size for file in pair_files) // PAIR.itemsize
    bucket_rows = max(1, min(BUCKET_ROWS, firsts[-1] * (memory_bytes // 64) // max(n_pairs, 1)))
    blame = resolve(pair_files, firsts[-1], sum(counts), bucket_rows, n_excluded)
    return owners(pair_files, blame, bucket_rows)


def _done(path: Path) -> bool:
    return path.with_suffix(".json").exists()
