"""Statistics of residuals per group of tokens, gathered while writing and merged exactly over parts.

Mean and variance are merged by Chan's formula; norms are counted in logarithmic bins, so quantiles of the merged
counts are those of all rows, to the width of a bin (a sixteenth of an octave, 4.4 %).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.schema import SPLITS, TokenType, select

GROUPS = (*SPLITS, "first")
BINS_PER_OCTAVE = 16
LOWEST_OCTAVE, HIGHEST_OCTAVE = -24, 40
N_BINS = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE

Floats = npt.NDArray[np.float64]


def _membership() -> npt.NDArray[np.int64]:
    """For every token type the groups it is in, one bit each."""
    types = np.arange(256, dtype=np.uint8)
    first = (types & TokenType.FIRST_POSITION) != 0
    masks = [first if group == "first" else select(types, group) for group in GROUPS]
    return sum((mask.astype(np.int64) << g for g, mask in enumerate(masks)), np.zeros(256, np.int64))


_MEMBERSHIP = _membership()
_GROUPS_OF = np.arange(1 << len(GROUPS))[:, None] >> np.arange(len(GROUPS)) & 1 == 1
"""The same bits as masks `[g]`."""


def _alike(edges: list[int], membership: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, npt.NDArray[np.bool_]]]:
    """Start, stop and mask of groups of each run of rows that are in the same groups."""
    return ((start, stop, _GROUPS_OF[membership[start]]) for start, stop in pairwise(edges))


def _bins(norms: Floats) -> npt.NDArray[np.int64]:
    with np.errstate(divide="ignore"):
        bins = np.floor((np.log2(norms) - LOWEST_OCTAVE) * BINS_PER_OCTAVE)
    return np.clip(bins, 0, N_BINS - 1).astype(np.int64)


def group_counts(type_counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Tokens of each group, from how often each token type `[256]` occurs."""
    return np.array([type_counts[_MEMBERSHIP >> g & 1 == 1].sum() for g in range(len(GROUPS))])


class NormSpread(NamedTuple):
    """Estimates of the norms of a group of tokens, each to half of a bin."""

    percentile_1: float
    median: float
    percentile_99: float
    maximum: float
    n_far: int
    """Those above a multiple of the median."""


@dataclass
class Moments:
    """Count `[g]`, mean `[g, d_in]`, summed squared deviation `[g, d_in]`, norm counts `[g, N_BINS]`, norm sum `[g]`."""

    count: npt.NDArray[np.int64]
    mean: Floats
    squared_deviation: Floats
    norm_counts: npt.NDArray[np.int64]
    norm_sum: Floats

    @classmethod
    def empty(cls, d_in: int) -> "Moments":
        """Moments of no rows."""
        g = len(GROUPS)
        zeros = np.zeros((g, d_in))
        return cls(np.zeros(g, np.int64), zeros, zeros.copy(), np.zeros((g, N_BINS), np.int64), np.zeros(g))

    def add(self, residuals: npt.NDArray[np.float32], token_types: npt.NDArray[np.uint8]) -> None:
        """Take in rows `[n, d_in]` with their token types `[n]`.

        Rows that are in the same groups are summed once. Plain ufuncs: the same bits on every machine. Squares are summed as
        they are, not as deviations: in float64, and over few rows, that loses nothing, and saves two passes.
        """
        membership = _MEMBERSHIP[token_types]
        order = np.argsort(membership, kind="stable")
        edges = np.flatnonzero(np.diff(membership[order], prepend=-1, append=-1)).tolist()
        wide = residuals[order].astype(np.float64)
        batch = Moments.empty(wide.shape[1])
        for start, stop, groups in _alike(edges, membership[order]):
            batch.mean[groups] += wide[start:stop].sum(0)
        np.square(wide, out=wide)
        norms = np.sqrt(wide.sum(1))
        bins = _bins(norms)
        for start, stop, groups in _alike(edges, membership[order]):
            batch.count[groups] += stop - start
            batch.squared_deviation[groups] += wide[start:stop].sum(0)
            batch.norm_counts[groups] += np.bincount(bins[start:stop], minlength=N_BINS)
            batch.norm_sum[groups] += norms[start:stop].sum()
        sums = batch.mean.copy()
        batch.mean /= np.maximum(batch.count, 1)[:, None]
        batch.squared_deviation -= sums * batch.mean
        np.maximum(batch.squared_deviation, 0, out=batch.squared_deviation)
        self.merge(batch)

    def merge(self, other: "Moments") -> None:
        """Take in the rows of `other`: Chan, Golub and LeVeque (1979), equation 2.1."""
        total = self.count + other.count
        share = (other.count / np.maximum(total, 1))[:, None]
        delta = other.mean - self.mean
        self.mean += delta * share
        self.squared_deviation += other.squared_deviation + delta**2 * (self.count[:, None] * share)
        self.count = total
        self.norm_counts += other.norm_counts
        self.norm_sum += other.norm_sum

    def norm_quantile(self, group: str, q: float) -> float:
        """Norm below which the share `q` of the rows of `group` lies: the middle of its bin."""
        counts = self.norm_counts[GROUPS.index(group)]
        if not counts.any():
            return 0.0
        bin_index = int(np.searchsorted(np.cumsum(counts), q * counts.sum(), side="left"))
        return float(2 ** (LOWEST_OCTAVE + (bin_index + 0.5) / BINS_PER_OCTAVE))

    def norm_spread(self, group: str, multiple: float) -> NormSpread | None:
        """The norms of `group`, and how many are above `multiple` times their median; None where it has no rows.

        In each bin the norms are taken to be at one and the same share of its width, that share at which they add up to the
        sum of the norms, which is exact. So they agree with the mean, and where all lie in one bin all are the mean.
        """
        counts = self.norm_counts[GROUPS.index(group)]
        if not counts.any():
            return None
        edges = np.exp2(LOWEST_OCTAVE + np.arange(N_BINS) / BINS_PER_OCTAVE)
        shift = self.norm_sum[GROUPS.index(group)] / (counts * edges).sum()
        norms = edges * np.clip(shift, 1, 2 ** (1 / BINS_PER_OCTAVE))
        cumulated = np.cumsum(counts)
        low, median, high = (float(norms[np.searchsorted(cumulated, q * cumulated[-1])]) for q in (0.01, 0.5, 0.99))
        maximum = float(norms[np.flatnonzero(counts)[-1]])
        return NormSpread(low, median, high, maximum, int(counts[norms > multiple * median].sum()))

    def summary(self, squared_error: Floats | None = None, n_outliers: int = 5) -> dict[str, Any]:
        """JSON-ready figures per group: count, norm mean and quantiles, variance, the dimensions of largest size.

        With `squared_error` `[g]`, of rows that were stored with loss, also its share of the variance.
        """
        figures: dict[str, Any] = {}
        for g, group in enumerate(GROUPS):
            count = int(self.count[g])
            if not count:
                figures[group] = {"count": 0}
                continue
            root_mean_square = np.sqrt(self.mean[g] ** 2 + self.squared_deviation[g] / count)
            top = np.argsort(-root_mean_square, kind="stable")[:n_outliers]
            figures[group] = {
                "count": count,
                "norm_mean": float(self.norm_sum[g] / count),
                "norm_quantiles": {str(q): self.norm_quantile(group, q) for q in (0.01, 0.5, 0.99, 1.0)},
                "total_variance": float(self.squared_deviation[g].sum() / count),
                "top_dimensions": [[int(d), float(root_mean_square[d])] for d in top],
            }
            if squared_error is not None and (deviation := float(self.squared_deviation[g].sum())):
                figures[group]["quantization_fvu"] = float(squared_error[g]) / deviation
        return figures

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays to store, by name."""
        return dict(vars(self))


def merged(moments: Iterable[Moments], d_in: int) -> Moments:
    """All rows of `moments` together, in the order given."""
    total = Moments.empty(d_in)
    for one in moments:
        total.merge(one)
    return total


def sums_by_group(values: Floats, token_types: npt.NDArray[np.uint8]) -> Floats:
    """Sums `[g]` of the values `[n]` of tokens of these types `[n]`."""
    membership = _MEMBERSHIP[token_types]
    return np.array([values[membership >> g & 1 == 1].sum() for g in range(len(GROUPS))])
