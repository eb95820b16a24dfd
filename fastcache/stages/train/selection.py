"""Which rows of a cache are trained on: by type of token, known before a row is read, and by norm, seen when it is.

A few tokens of massive norm, such as the first of every dialogue, can take over a squared error: with 1 token in 512 at 100
times the norm, the error on all others grew by a quarter to several times, while the summed error fell.
"""

import copy
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import TokenType, TurnRole, decode, select, turn_roles
from fastcache.cache_format.unit_array import Rows
from fastcache.errors import InputError
from fastcache.stages.train.config import TrainConfig

Mask = npt.NDArray[np.bool_]
LARGEST_FACTOR = 1e30
"""The largest factor of the norm filter: norms are float32."""


def norm_factor(text: str) -> float:
    """10.0 for '10x-median'; raises `InputError` for anything else, and for factors that would drop half of the rows."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)x-median", text.strip())
    if not match or not 1 < float(match[1]) <= LARGEST_FACTOR:
        raise InputError(f"--norm-filter {text:.40}: expected a factor above 1 and x-median, for example 10x-median.")
    return float(match[1])


def _wanted(token_types: npt.NDArray[np.uint8], tokens_of: str) -> Mask:
    """Mask of a token set: a split or, of the assistant, the contents of its turns or its reasoning."""
    roles = {"assistant": TurnRole.ASSISTANT, "reasoning": TurnRole.REASONING}
    if tokens_of not in roles:
        return select(token_types, tokens_of)
    return select(token_types, "content") & (turn_roles(token_types) == roles[tokens_of])


@dataclass
class Selection:
    """The rows that are trained on."""

    n_rows: int
    mask: Mask | None = None
    """bool `[n_rows]`: kept by type; None: all."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows left out by type, by reason."""
    median_norm: float | None = None
    largest_norm: float | None = None
    """Rows above this norm are left out as they are read."""

    @property
    def n_kept(self) -> int:
        """Rows kept by type."""
        return self.n_rows - sum(self.dropped.values())

    def of_rows(self, start: int, stop: int) -> slice | Mask:
        """What is kept, by type, of the rows `start` to `stop` - 1."""
        return slice(None) if self.mask is None else self.mask[start:stop]

    def too_large(self, rows: Rows, dtype: str) -> Mask | None:
        """Mask `[n]` of the `rows` `[n, d_in]`, as stored, that are left out for their norm; None without a filter."""
        if self.largest_norm is None:
            return None
        return np.asarray(np.linalg.norm(decode(rows, dtype), axis=1) > self.largest_norm)

    def as_json(self, n_read: int, n_too_large: int) -> dict[str, Any]:
        """What stands in sae.json; `n_too_large` of the `n_read` rows were left out for their norm, over all passes."""
        counts = {"rows": self.n_rows, "kept_by_type": self.n_kept, "dropped_by_type": self.dropped}
        if self.largest_norm is None:
            return counts
        limits = {"median_norm": self.median_norm, "largest_norm": self.largest_norm}
        return {**counts, **limits, "rows_read": n_read, "dropped_by_norm": n_too_large}


def select_rows(cache: Cache, hook: str, config: TrainConfig) -> Selection:
    """The selection that `config` asks for; reads the types of all tokens where it needs them.

    Raises `InputError` for a filter that can't be understood, or where nothing is left.
    """
    selection = Selection(cache.n_tokens)
    if config.norm_filter is not None:
        factor = norm_factor(config.norm_filter)
        selection.median_norm = float(cache.manifest.statistics[hook]["all"]["norm_quantiles"]["0.5"])
        selection.largest_norm = factor * selection.median_norm
    if config.tokens_of == "all" and not config.skip_first_position:
        return selection
    wanted, first = [], []
    for part in cache.parts:
        types = copy.copy(part).tokens["token_types"]  # of a copy: with the part, all its token arrays would stay
        wanted.append(_wanted(types, config.tokens_of))
        first.append((types & TokenType.FIRST_POSITION != 0) & config.skip_first_position)
    is_wanted, is_first = np.concatenate(wanted), np.concatenate(first)
    selection.mask = is_wanted & ~is_first
    other, at_start = int((~is_wanted).sum()), int((is_wanted & is_first).sum())
    reasons = {f"not {config.tokens_of}": other, "first position": at_start}
    selection.dropped = {reason: count for reason, count in reasons.items() if count}
    if not selection.n_kept:
        raise InputError(f"{cache.path} has no rows with --tokens-of {config.tokens_of}. Choose other tokens.")
    return selection
