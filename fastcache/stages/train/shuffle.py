"""How well training's order mixes a cache, as numbers, beside a global permutation and sequential reading.

Only the order matters, so no residual is read: `MixedOrder` is run as training runs it, and some of its batches, spread
evenly over an epoch, are measured. Memory is that of the buffer's row numbers and of a few numbers an instance.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.reader import Cache
from fastcache.corpus import Corpus
from fastcache.errors import MismatchError
from fastcache.figures import figure
from fastcache.progress import Progress
from fastcache.stages.train.config import ShuffleConfig
from fastcache.stages.train.order import MixedOrder, Numbers, mixed_order

RHO = 0.2
"""Correlation of two rows of one instance that the variance inflation assumes."""

MEASURED_BATCHES = 64
N_TENTHS = 10

GOOD_DISTINCT = 0.8
"""A shuffle is good with at least this share of a global permutation's distinct instances ..."""
GOOD_INFLATION = 1.15
"""... and at most this many times its variance inflation: 1.2 where that is 1.05, as with 16M tokens of dialogues."""


@dataclass(frozen=True)
class Runs:
    """The rows of a cache as consecutive runs, each of one group: an instance, a tenth of the cache, a source."""

    starts: Numbers  # [n_runs], first row of each run
    groups: Numbers  # [n_runs], number of its group
    n_rows: int

    def of(self, rows: Numbers) -> Numbers:
        """Group `[n]` of each of `rows` `[n]`."""
        return self.groups[np.searchsorted(self.starts, rows, side="right") - 1]

    def shares(self) -> npt.NDArray[np.float64]:
        """Share of all rows that is in each group."""
        lengths = np.diff(self.starts, append=self.n_rows)
        return np.bincount(self.groups, weights=lengths) / self.n_rows


@dataclass(frozen=True)
class Quality:
    """Means over the measured batches of one order."""

    distinct: float
    """Instances with a row in the batch."""
    inflation: float
    """See `variance_inflation`."""
    drift: dict[str, float]
    """By grouping, see `drift`."""


@dataclass(frozen=True)
class Comparison:
    """Training's order beside the best and the worst there is."""

    mixed: Quality
    permutation: Quality
    sequential: Quality
    n_measured: int

    @property
    def distinct_ratio(self) -> float:
        """Distinct instances, as a share of a global permutation's."""
        return self.mixed.distinct / self.permutation.distinct

    @property
    def inflation_ratio(self) -> float:
        """Variance inflation, over that of a global permutation."""
        return self.mixed.inflation / self.permutation.inflation

    @property
    def good(self) -> bool:
        """Whether both ratios are within bounds."""
        return self.distinct_ratio >= GOOD_DISTINCT and self.inflation_ratio <= GOOD_INFLATION


def variance_inflation(counts: Numbers) -> float:
    """Variance of a batch mean over that of as many independent rows (Kish's design effect).

        1 + RHO * (sum_j c_j^2 / B - 1),    c_j rows of instance j, B = sum_j c_j

    A row is u_j + e with variances RHO and 1 - RHO, where u_j is shared by the rows of instance j: the variance of the
    mean of the batch is RHO * sum_j c_j^2 / B^2 + (1 - RHO) / B, that of independent rows 1 / B.
    """
    size = int(counts.sum())
    return float(1 + RHO * (np.square(counts.astype(np.float64)).sum() / size - 1))


def drift(found: Numbers, shares: npt.NDArray[np.float64]) -> float:
    """Total variation distance of a batch's groups `found` `[n]` from `shares`: 0 alike, 1 nothing in common."""
    return float(np.abs(np.bincount(found, minlength=len(shares)) / len(found) - shares).sum() / 2)


def measure(batches: Iterable[Numbers], instances: Runs, groupings: Mapping[str, Runs]) -> Quality:
    """Means over `batches`, each the numbers of its rows."""
    shares = {name: runs.shares() for name, runs in groupings.items()}
    distinct, inflation, drifts = [], [], []
    for rows in batches:
        counts = np.unique(instances.of(rows), return_counts=True)[1]
        distinct.append(len(counts))
        inflation.append(variance_inflation(counts))
        drifts.append([drift(runs.of(rows), shares[name]) for name, runs in groupings.items()])
    means = np.mean(drifts, axis=0)
    return Quality(
        float(np.mean(distinct)), float(np.mean(inflation)), dict(zip(groupings, means.tolist(), strict=True))
    )


def compare(
    order: MixedOrder, instances: Runs, groupings: Mapping[str, Runs], batch_size: int, seed: int, progress: Progress
) -> Comparison:
    """Run `order`, which is at its beginning, through an epoch; the global permutation is sampled batch by batch."""
    n_rows, n_batches = instances.n_rows, instances.n_rows // batch_size
    n_measured = min(MEASURED_BATCHES, n_batches)
    chosen = ((np.arange(n_measured) + 0.5) * n_batches / n_measured).astype(np.int64)

    def mixed() -> Iterator[Numbers]:
        with progress.task("order of an epoch", int(chosen[-1]) + 1, "batches") as task:
            for gap in np.diff(chosen, prepend=-1).tolist():
                for _ in range(gap):
                    rows = order.next_batch()
                task.advance(gap)
                yield rows

    rng = np.random.default_rng([seed, 2])
    drawn = (rng.choice(n_rows, batch_size, replace=False, shuffle=False) for _ in chosen)
    in_sequence = (np.arange(start, start + batch_size) for start in (chosen * batch_size).tolist())
    return Comparison(
        mixed=measure(mixed(), instances, groupings),
        permutation=measure(drawn, instances, groupings),
        sequential=measure(in_sequence, instances, groupings),
        n_measured=n_measured,
    )


def enough_buffer(cache: Cache, config: ShuffleConfig, instances: Runs, progress: Progress) -> int:
    """The first good buffer among twice, four times, ... that of `config`; the whole cache is always good."""
    capacity = config.buffer_tokens
    while (capacity := 2 * capacity) < cache.n_tokens:
        order = mixed_order(cache, capacity, config.batch_size, config.seed)
        if compare(order, instances, {}, config.batch_size, config.seed, progress).good:
            return capacity
    return cache.n_tokens


def verdict(comparison: Comparison, enough: int | None) -> str:
    """One sentence: good, or the buffer that would do."""
    figures = (
        f"{figure(comparison.distinct_ratio)} of a global permutation's distinct instances (good from {GOOD_DISTINCT:.2f}), "
        f"{figure(comparison.inflation_ratio)} times its variance inflation (good to {GOOD_INFLATION:.2f})"
    )
    return f"Good: {figures}." if enough is None else f"Not good: {figures}. Train with --buffer-tokens {enough:,}."


def tenths(n_rows: int) -> Runs:
    """Early, ..., late rows of the cache, in ten groups."""
    return Runs(np.arange(N_TENTHS) * n_rows // N_TENTHS, np.arange(N_TENTHS), n_rows)


def runs_of(cache: Cache, corpus: Corpus | None = None) -> tuple[Runs, dict[str, Runs]]:
    """The instances of `cache`; and its rows by place and, where `corpus` is at hand, by source.

    Raises `MismatchError` if the cache was made from another corpus.
    """
    origin = cache.manifest.identity["corpus"]
    if corpus and corpus.fingerprint != origin["fingerprint"]:
        raise MismatchError(
            f"{cache.path} was made from the corpus {origin['fingerprint'][:16]}, but {corpus.path} is "
            f"{corpus.fingerprint[:16]}. Give the corpus that the cache was extracted from."
        )
    instances, documents, corpus_rows = [], [], []
    for index, part in enumerate(cache.parts):
        tokens = copy.copy(part).tokens  # of a copy: with the part, the token ids of all parts would stay in memory
        instances.append(tokens["instance_offsets"][:-1] + cache.first_row(index))
        documents.append(tokens["document_offsets"][:-1] + cache.first_row(index))
        corpus_rows.append(tokens["document_ids"])
    starts = np.concatenate(instances)
    groupings = {"place": tenths(cache.n_tokens)}
    if corpus:
        sources = corpus.source_numbers(origin["split"], np.concatenate(corpus_rows))
        groupings["source"] = Runs(np.concatenate(documents), sources, cache.n_tokens)
    return Runs(starts, np.arange(len(starts)), cache.n_tokens), groupings
