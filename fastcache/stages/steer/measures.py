"""Figures of a generation."""

from torch import Tensor

from fastcache.llm.backend import TokenIds
from fastcache.llm.splicing import kl_divergence

NGRAM = 4


def repetition(token_ids: TokenIds, n: int = NGRAM) -> float:
    """Share of n-grams of tokens that were there before (Welleck et al. 2020, seq-rep-n); 0 for fewer than n tokens."""
    grams = [tuple(token_ids[start : start + n].tolist()) for start in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def mean_kl(changed: Tensor, plain: Tensor) -> float:
    """Mean KL divergence, in nats, of the plain next-token distribution from the changed one; log probabilities `[n, v]`."""
    return float(kl_divergence(changed, plain).mean()) if len(changed) else 0.0
