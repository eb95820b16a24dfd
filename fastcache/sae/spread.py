"""How far tokens lie from their mean, by dialogue and set of tokens: the denominator of FVU.

FVU = sum |x - xhat|^2 / sum |x - mu|^2, mu the mean of the tokens. Of some of the dialogues, drawn again by the bootstrap, the
denominator with mu held fixed is the sum over these dialogues of

    sum |x - mu|^2 = sum |x|^2 - 2 mu . sum x + n |mu|^2

which needs the sum of x of every dialogue, for mu is known only at the end.
"""

import numpy as np
import torch
from torch import Tensor

from fastcache.sae.bootstrap import Sums

NEGLIGIBLE = 2.0**-18
"""A summed squared distance to the mean below this share of the summed |x|^2 is none: bfloat16 rounds to 2^-9 of a value."""


class Spread:
    """Sums over the tokens seen so far, for `s` sets of tokens. It depends on no SAE, so those of one layer can share it.

    Memory: 8 d_in bytes for each dialogue and set that has tokens.
    """

    def __init__(self, n_sets: int, d_in: int, device: str = "cpu") -> None:
        self._sum = torch.zeros(n_sets, d_in, dtype=torch.double, device=device)
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        """For each batch: counts and sums of |x|^2, both `[dialogues, s]`; for counts above 0 sums of x `[m, d_in]`."""

    @torch.no_grad()
    def update(self, x: Tensor, masks: Tensor, dialogues: Tensor) -> None:
        """Take in whole dialogues: x `[n, d_in]`, masks bool `[s, n]`, dialogue number of each token `[n]`, rising from 0."""
        wide, mask = x.double(), masks.double()
        lengths = torch.bincount(dialogues).tolist()
        sums = [part @ rows for part, rows in zip(mask.split(lengths, 1), wide.split(lengths), strict=True)]
        by_dialogue = torch.stack(sums)
        self._sum += by_dialogue.sum(0)
        columns = torch.stack([mask, mask * wide.square().sum(1)])
        counts, powers = columns.new_zeros(2, len(lengths), len(mask)).index_add_(1, dialogues, columns.transpose(1, 2))
        filled = counts > 0
        self._batches.append((counts.cpu(), powers.cpu(), by_dialogue[filled].cpu()))

    def mean(self, of_set: int = 0) -> Tensor:
        """The mean of the tokens of a set so far, `[d_in]`, float32 on the device; zeros where there are none."""
        return self._means()[of_set].float()

    def _means(self) -> Tensor:
        counts = self._sum.new_zeros(len(self._sum))
        for batch, _, _ in self._batches:
            counts += batch.sum(0).to(counts)
        return self._sum / counts.clamp(min=1)[:, None]

    def by_dialogue(self) -> Sums:
        """Summed squared distances `[dialogues, s]` of the tokens to the mean of all tokens of their set."""
        means = self._means().cpu()
        centre = means.square().sum(1)
        spreads = []
        for counts, powers, sums in self._batches:
            along = torch.zeros_like(counts)
            filled = counts > 0
            along[filled] = (sums * means[filled.nonzero()[:, 1]]).sum(1)
            spreads.append((powers - 2 * along + counts * centre).clamp(min=0))
        return torch.cat(spreads).numpy()


def unexplained(squared_error: Sums, spread: Sums, power: Sums) -> Sums:
    """FVU, squared error over spread; NaN where the spread is nothing but rounding beside `power`, the summed |x|^2."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > NEGLIGIBLE * power, squared_error / spread, np.nan)
