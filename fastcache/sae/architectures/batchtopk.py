"""The BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410).

In training, f = the k n largest of ReLU(W_enc x + b_enc) over a batch of n tokens: k a token on average.
loss = ||x - xhat||^2, a mean over the batch
For encoding, f = z H(z - theta), theta the running mean of the smallest activation that a batch kept: a JumpReLU with one
threshold, which doesn't depend on the batch.
"""

from typing import Any

import torch
from torch import Tensor

from fastcache.sae.architectures.single_path import SinglePathSae
from fastcache.sae.architectures.topk import checked_k

THRESHOLD_RATE = 0.01
"""Share of a new batch in the running mean, as in SAELens."""


class BatchTopKSae(SinglePathSae):
    """k active latents a token on average; no penalty."""

    architecture = "batchtopk"
    in_units_of_x = ("b_dec", "b_enc", "threshold")
    threshold: Tensor

    def __init__(self, d_in: int, d_sae: int, k: int) -> None:
        """See `Sae`."""
        super().__init__(d_in, d_sae)
        self.k = checked_k(k, d_sae)
        # float64: small shares are added many thousand times. Negative: no batch has been seen.
        self.register_buffer("threshold", torch.full((), -1.0, dtype=torch.double))

    @property
    def options(self) -> dict[str, Any]:
        """See `Sae.options`."""
        return {"k": self.k}

    def activate(self, z: Tensor) -> Tensor:
        """See `Sae.activate`."""
        return z.relu_().mul_(z > self.threshold)

    def training_acts(self, z: Tensor) -> Tensor:
        """See `SinglePathSae.training_acts`; follows the threshold."""
        acts = z.relu().flatten()
        values, places = acts.topk(self.k * len(z), sorted=False)
        self._follow_threshold(values)
        return acts.zero_().scatter_(0, places, values).view_as(z)

    def _follow_threshold(self, kept: Tensor) -> None:
        smallest = kept.where(kept > 0, torch.inf).min().to(self.threshold.dtype)
        moved = torch.where(self.threshold < 0, smallest, self.threshold.lerp(smallest, THRESHOLD_RATE))
        self.threshold.copy_(torch.where(smallest.isfinite(), moved, self.threshold))

    def backward_acts(self, z: Tensor, latent_acts: Tensor, grad: Tensor, coefficient: float) -> Tensor:
        """See `SinglePathSae.backward_acts`: the gradient passes where a latent is active."""
        grad *= (latent_acts > 0).to(grad.dtype)
        return z.new_zeros(())
