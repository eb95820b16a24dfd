"""The self-test of an engine when it starts: a few sequences, one of them cut in the middle, against transformers.

The parity check runs once for a cache and on its own sequences; this runs for every engine, on whatever machine a job
goes on. The expected values are computed once and handed to all workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from fastcache.errors import MismatchError
from fastcache.llm.backend import Backend, Residuals, TokenIds
from fastcache.llm.loading import ModelSource, load_config
from fastcache.llm.parity import RELATIVE_LIMITS, relative_difference
from fastcache.llm.transformers_backend import TransformersBackend

LENGTHS = (150, 1, 40)
FIRST_PIECE = 60
"""Tokens of the first sequence that still have room in the batch of the sequences before it."""


@dataclass(frozen=True)
class SelfTest:
    """Sequences of random tokens and their residuals."""

    sequences: list[TokenIds]
    expected: list[Residuals]
    n_vocabulary: int
    max_length: int

    @classmethod
    def of(cls, source: ModelSource, hook_points: Sequence[str], max_length: int) -> Self:
        """Run the model, cut after its deepest hook point, by transformers in float32 on the CPU, one at a time."""
        n_vocabulary = load_config(source).vocab_size
        rng = np.random.default_rng(0)
        sequences = [_random(rng, n_vocabulary, min(length, max_length)) for length in LENGTHS]
        reference = TransformersBackend(source, hook_points, "float32", "cpu", pack_tokens=1)
        return cls(sequences, list(reference.residuals(sequences)), n_vocabulary, max_length)

    def check(self, backend: Backend, model_dtype: str, batch_tokens: int) -> None:
        """Raise `MismatchError` if the backend gives other values.

        Other sequences go first and fill a batch but for `FIRST_PIECE` tokens, so that the next one is cut there.
        """
        before = fillers(self.n_vocabulary, max(1, batch_tokens - FIRST_PIECE), self.max_length)
        found = list(backend.residuals([*before, *self.sequences]))[len(before) :]
        for token_ids, residuals, expected in zip(self.sequences, found, self.expected, strict=True):
            for hook, values in expected.items():
                relative = relative_difference(residuals[hook], values)
                if not relative <= RELATIVE_LIMITS[model_dtype]:
                    raise MismatchError(
                        f"Self-test: a sequence of {len(token_ids)} tokens differs from transformers by {relative:.2e} "
                        f"(relative L2) at {hook}; the limit for {model_dtype} is {RELATIVE_LIMITS[model_dtype]:.0e}. "
                        "Nothing was written. Use --backend transformers, or --model-dtype float32."
                    )


def fillers(n_vocabulary: int, n_tokens: int, max_length: int) -> list[TokenIds]:
    """Sequences of random tokens, `n_tokens` in all."""
    rng = np.random.default_rng(1)
    whole, rest = divmod(n_tokens, max_length)
    return [_random(rng, n_vocabulary, length) for length in [max_length] * whole + [rest] * (rest > 0)]


def _random(rng: np.random.Generator, n_vocabulary: int, length: int) -> TokenIds:
    return rng.integers(0, n_vocabulary, length).astype(np.int32)
