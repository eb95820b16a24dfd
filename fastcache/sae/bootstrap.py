"""Confidence intervals by resampling dialogues: tokens of one dialogue aren't independent of each other."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

N_SAMPLES = 1000
LEVEL = 0.95
SEED = 0
MOST_WEIGHTS = 2**23
"""Held at a time."""

Sums = npt.NDArray[np.float64]


def resampled(sums: Sums) -> Sums:
    """Totals `[samples, ...]` of samples with replacement (Efron 1979) of dialogues with the sums `[dialogues, ...]`.

    The seed is fixed, so that equal data have equal intervals, and all columns see the same samples.
    """
    rng, n = np.random.default_rng(SEED), len(sums)
    flat = sums.reshape(n, -1)
    at_once = max(1, MOST_WEIGHTS // n)
    totals = [
        rng.multinomial(n, np.full(n, 1 / n), min(at_once, N_SAMPLES - first)) @ flat
        for first in range(0, N_SAMPLES, at_once)
    ]
    return np.concatenate(totals).reshape(-1, *sums.shape[1:])


def interval(values: Sums) -> tuple[float, float]:
    """The middle 95 % of the finite ones of `values` `[samples]`; NaN if there are none."""
    known = values[np.isfinite(values)]
    low, high = np.quantile(known, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)) if len(known) else (np.nan, np.nan)
    return float(low), float(high)


def with_intervals(figures: dict[str, Any], samples: dict[str, Sums]) -> dict[str, Any]:
    """JSON-ready: the figures, and under `intervals` the interval of each over its `samples`.

    What isn't finite is None. A figure that is None has no interval: both of its ends are None.
    """
    shown = {name: _finite(value) for name, value in figures.items()}
    intervals = {
        name: [None, None] if shown[name] is None else [_finite(end) for end in interval(values)]
        for name, values in samples.items()
    }
    return {**shown, "intervals": intervals}


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
