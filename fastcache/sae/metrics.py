"""Held-out metrics of an SAE, by sets of tokens, accumulated in float64 over whole sequences.

MSE is the paper's equation 7: the mean over dialogues of the mean over a dialogue's tokens of the mean over d_in of
(x - xhat)^2. Beside it stands the pooled one, a plain mean over tokens. FVU is the pooled squared error over the squared
distance to the mean of the same tokens; explained variance is 1 - FVU.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcache.sae.architectures import Sae


@dataclass
class Metrics:
    """Sums over the tokens seen so far, for `s` sets of tokens."""

    splits: tuple[str, ...]
    d_in: int
    d_sae: int
    device: str = "cpu"

    def __post_init__(self) -> None:
        s = len(self.splits)
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.double, device=self.device)  # noqa: E731
        self.n_tokens, self.squared_error, self.l0, self.x_squared = zeros(s), zeros(s), zeros(s), zeros(s)
        self.x_sum = zeros(s, self.d_in)
        self.n_dialogues, self.dialogue_mse = zeros(s), zeros(s)
        self.n_fired = torch.zeros(self.d_sae, dtype=torch.long, device=self.device)

    @torch.no_grad()
    def update(self, sae: Sae, x: Tensor, masks: Tensor, dialogues: Tensor) -> None:
        """Take in whole dialogues: x `[n, d_in]`, masks bool `[s, n]`, dialogue number of each token `[n]`, from 0."""
        latent_acts = sae.encode(x)
        active = latent_acts != 0
        self.n_fired += active.sum(0)
        error = (sae.decode(latent_acts) - x).double().square().sum(1)
        wide, mask = x.double(), masks.double()
        self.n_tokens += mask.sum(1)
        self.squared_error += mask @ error
        self.l0 += mask @ active.sum(1).double()
        self.x_squared += mask @ wide.square().sum(1)
        self.x_sum += mask @ wide
        per_dialogue = error.new_zeros(2, len(mask), int(dialogues.max()) + 1)
        per_dialogue[0].index_add_(1, dialogues, mask * error)
        per_dialogue[1].index_add_(1, dialogues, mask)
        sums, counts = per_dialogue
        self.n_dialogues += (counts > 0).sum(1)
        self.dialogue_mse += (sums / counts.clamp(min=1)).sum(1) / self.d_in

    def result(self) -> dict[str, Any]:
        """JSON-ready figures; a set without tokens has only its zero count."""
        splits: dict[str, Any] = {}
        for i, name in enumerate(self.splits):
            n = float(self.n_tokens[i])
            splits[name] = {"n_tokens": int(n)}
            if not n:
                continue
            mse = float(self.dialogue_mse[i] / self.n_dialogues[i])
            spread = float(self.x_squared[i] - self.x_sum[i].square().sum() / n)
            error = float(self.squared_error[i])
            splits[name] |= {
                "n_dialogues": int(self.n_dialogues[i]),
                "mse": mse,
                "log2_mse": math.log2(mse) if mse > 0 else None,
                "mse_pooled": error / n / self.d_in,
                "fvu": error / spread if spread > 0 else None,
                "l0": float(self.l0[i]) / n,
                "share_of_squared_error": error / float(self.squared_error[0]) if self.squared_error[0] else 0.0,
            }
        dead = int((self.n_fired == 0).sum())
        return {"d_sae": self.d_sae, "dead_latents": dead, "dead_share": dead / self.d_sae, "splits": splits}
