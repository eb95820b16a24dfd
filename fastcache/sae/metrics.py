"""Held-out metrics of an SAE, by sets of tokens, accumulated in float64 over whole dialogues.

MSE is the paper's equation 7: the mean over dialogues of the mean over a dialogue's tokens of the mean over d_in of
(x - xhat)^2. Beside it stands the pooled one, a plain mean over tokens. FVU is the pooled squared error over the squared
distance to the mean of the same tokens (`spread.py`); explained variance is 1 - FVU. Cosine and relative norm |xhat| / |x| are
means over tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastcache.sae.architectures import Sae
from fastcache.sae.bootstrap import Sums, resampled, with_intervals
from fastcache.sae.spread import Spread, unexplained

COLUMNS = ("n_tokens", "squared_error", "x_squared", "cosine", "relative_norm", "l0", "mse", "n_dialogues", "spread")
"""Sums over the tokens of a dialogue in a set. Then the mean squared error of the dialogue, 1 if it has tokens of the set,
and the summed squared distance of its tokens to the mean of the set."""
L0_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
WINDOWS = (10_000, 100_000, 1_000_000, 10_000_000)
"""Tokens among which a latent that never fires counts as dead; the number of all tokens is always one more."""
DENSITY_EDGES = tuple(round(-8 + 0.25 * i, 2) for i in range(33))
"""log10 of the share of tokens on which a latent is active."""


@dataclass
class Metrics:
    """Sums over the tokens seen so far, for `s` sets of tokens."""

    splits: tuple[str, ...]
    """The first one is that of all tokens."""
    d_in: int
    d_sae: int
    device: str = "cpu"
    spread: Spread | None = None
    """Shared with other SAEs on the same tokens, and updated by whoever shares it; None: its own."""

    def __post_init__(self) -> None:
        self._spread = self.spread or Spread(len(self.splits), self.d_in, self.device)
        self._dialogues: list[Sums] = []
        """`[dialogues, s, columns]` of each batch; see `COLUMNS`, without the last."""
        self._l0_counts = np.zeros((len(self.splits), self.d_sae + 1), np.int64)
        self._n_tokens = 0
        self._n_fired = torch.zeros(self.d_sae, dtype=torch.long, device=self.device)
        self._first_fired = torch.full((self.d_sae,), torch.iinfo(torch.long).max, device=self.device)

    @torch.no_grad()
    def update(self, sae: Sae, x: Tensor, masks: Tensor, dialogues: Tensor) -> None:
        """Take in whole dialogues: x `[n, d_in]`, masks bool `[s, n]`, dialogue number of each token `[n]`, rising from 0."""
        if self.spread is None:
            self._spread.update(x, masks, dialogues)
        latent_acts = sae.encode(x)
        active = (latent_acts != 0).float()  # as numbers: torch is slow at sums of booleans
        recon, wide = sae.decode(latent_acts).double(), x.double()
        l0 = active.sum(1).long()
        self._count_latents(active)
        mask = masks.double()
        by_token = torch.stack([torch.ones(len(x), dtype=torch.double, device=x.device), *_figures(recon, wide), l0], 1)
        sums = by_token.new_zeros(int(dialogues.max()) + 1, len(mask), by_token.shape[1])
        sums.index_add_(0, dialogues, mask.T[:, :, None] * by_token[:, None, :])
        mse = sums[..., 1] / sums[..., 0].clamp(min=1) / self.d_in
        self._dialogues.append(torch.cat([sums, torch.stack([mse, sums[..., 0] > 0], 2)], 2).cpu().numpy())
        for i, chosen in enumerate(masks):
            self._l0_counts[i] += np.bincount(l0[chosen].cpu().numpy(), minlength=self.d_sae + 1)

    def _count_latents(self, active: Tensor) -> None:
        fired = active.sum(0).long()
        fresh = ((self._n_fired == 0) & (fired > 0)).nonzero()[:, 0]
        self._first_fired[fresh] = active[:, fresh].argmax(0) + self._n_tokens
        self._n_fired += fired
        self._n_tokens += len(active)

    def result(self) -> dict[str, Any]:
        """JSON-ready figures; a set without tokens has only its zero count.

        Intervals are of 95 %, over dialogues (`bootstrap`); in that of FVU the mean of the tokens is held.
        """
        by_dialogue = np.concatenate([np.concatenate(self._dialogues), self._spread.by_dialogue()[..., None]], 2)
        totals, samples = by_dialogue.sum(0), resampled(by_dialogue)
        splits = {name: self._split(i, totals, samples) for i, name in enumerate(self.splits)}
        dead = int((self._n_fired == 0).sum())
        latents = {"d_sae": self.d_sae, "dead_latents": dead, "dead_share": dead / self.d_sae}
        return {**latents, "dead_by_window": self._dead_by_window(), "density": self._density(), "splits": splits}

    def _split(self, i: int, totals: Sums, samples: Sums) -> dict[str, Any]:
        n, error = totals[i, :2]
        if not n:
            return {"n_tokens": 0}
        figures, intervals = (figures_of(sums[..., i, :], self.d_in) for sums in (totals, samples))
        return {
            "n_tokens": int(n),
            "n_dialogues": int(totals[i, COLUMNS.index("n_dialogues")]),
            **with_intervals(figures, intervals),
            "share_of_squared_error": float(error / totals[0, 1]) if totals[0, 1] else 0.0,
            "l0_quantiles": _quantiles(self._l0_counts[i]),
        }

    def _dead_by_window(self) -> dict[str, int]:
        """Latents that stayed silent over the first so many tokens."""
        windows = [*(window for window in WINDOWS if window < self._n_tokens), self._n_tokens]
        return {str(window): int((self._first_fired >= window).sum()) for window in windows}

    def _density(self) -> dict[str, Any]:
        """How many latents are active on which share of the tokens; those that never are stand in no bin."""
        shares = self._n_fired.cpu().numpy() / max(self._n_tokens, 1)
        places = np.log10(shares[shares > 0]).clip(DENSITY_EDGES[0], DENSITY_EDGES[-1])
        return {"log10_edges": DENSITY_EDGES, "counts": np.histogram(places, DENSITY_EDGES)[0].tolist()}


def _figures(recon: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By token `[n]`: squared error, x^2, cosine, relative norm. The last two are 0 where a norm is."""
    power, of_recon = x.square().sum(1), recon.square().sum(1)
    norms = (power * of_recon).sqrt()
    cosine = torch.where(norms > 0, (recon * x).sum(1) / norms, 0.0)
    relative = torch.where(power > 0, (of_recon / power).sqrt(), 0.0)
    return (recon - x).square().sum(1), power, cosine, relative


def figures_of(totals: Sums, d_in: int) -> dict[str, Any]:
    """Figures from totals `[..., columns]`."""
    n, error, power, cosine, relative, l0, mse, n_dialogues, spread = np.moveaxis(totals, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mse, pooled = mse / n_dialogues, error / n / d_in
        figures = {"mse": mse, "log2_mse": np.log2(mse), "mse_pooled": pooled, "log2_mse_pooled": np.log2(pooled)}
        figures |= {"fvu": unexplained(error, spread, power), "l0": l0 / n}
        return figures | {"cosine": cosine / n, "relative_norm": relative / n}


def _quantiles(counts: npt.NDArray[np.int64]) -> dict[str, int]:
    """The smallest L0 that at least the share q of the tokens doesn't exceed."""
    cumulated = counts.cumsum()
    return {f"{q:g}": int(np.searchsorted(cumulated, q * cumulated[-1])) for q in L0_QUANTILES}
