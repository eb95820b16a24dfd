"""What a latent is by its decoder row alone: latents that are like it, and tokens that it promotes or suppresses."""

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS = 1024
"""Of the decoder that are compared with all others at a time."""

Ranked = list[list[tuple[int, float]]]
"""For each latent, index and value of what was found, the strongest first."""


def nearest_latents(W_dec: Tensor, count: int) -> Ranked:
    """For each row of W_dec `[d_sae, d_in]` the `count` others with the highest cosine."""
    unit = W_dec / W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12)
    found: Ranked = []
    for first, rows in _chunks(unit):
        cosine = rows @ unit.T
        own = torch.arange(len(rows), device=rows.device)
        cosine[own, first + own] = -torch.inf
        found += _ranked(cosine, min(count, len(unit) - 1))
    return found


def promoted_tokens(W_dec: Tensor, unembedding: Tensor, count: int) -> tuple[Ranked, Ranked]:
    """The `count` tokens whose logits each row of W_dec raises most, and lowers most; `unembedding` is `[vocabulary, d_in]`.

    Logits are W_dec @ unembedding^T (the logit lens, nostalgebraist 2020), without the final norm.
    """
    promoted: Ranked = []
    suppressed: Ranked = []
    for _, rows in _chunks(W_dec):
        logits = rows @ unembedding.T
        promoted += _ranked(logits, count)
        suppressed += [[(token, -value) for token, value in each] for each in _ranked(-logits, count)]
    return promoted, suppressed


def _chunks(rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(rows), ROWS):
        yield first, rows[first : first + ROWS]


def _ranked(values: Tensor, count: int) -> Ranked:
    highest, where = values.topk(count, dim=1)
    return [list(zip(*pair, strict=True)) for pair in zip(where.tolist(), highest.tolist(), strict=True)]
