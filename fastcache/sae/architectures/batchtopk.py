"""The BatchTopK SAE (Bussmann et al. 2024, arXiv 2412.06410).

In training, f = the k n largest of ReLU(W_enc x + b_enc) over a batch of n tokens: k a token on average.
loss = ||x - xhat||^2, a mean over the batch
For encoding, f = z H(z - theta): a JumpReLU with one threshold, which doesn't depend on the batch. The paper takes the mean
over batches of the smallest activation that was kept. Here theta is found once, with the final weights, so that L0 is k on a
sample of the training rows (`calibrate`): a running mean lags behind the weights, most of all in a short run.
"""

from typing import Any

import torch
from torch import Tensor

from fastcache.sae.architectures.single_path import SinglePathSae
from fastcache.sae.architectures.topk import checked_k

CALIBRATION_ROWS = 1024
"""Rows whose pre-activations are held at a time."""


class BatchTopKSae(SinglePathSae):
    """k active latents a token on average; no penalty."""

    architecture = "batchtopk"
    in_units_of_x = ("b_dec", "b_enc", "threshold")
    threshold: Tensor

    def __init__(self, d_in: int, d_sae: int, k: int) -> None:
        """See `Sae`."""
        k = checked_k(k, d_sae)
        super().__init__(d_in, d_sae)
        self.k = k
        self.register_buffer("threshold", torch.zeros((), dtype=torch.double))

    @classmethod
    def layout(cls, d_in: int, d_sae: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """See `Sae.layout`."""
        return {**super().layout(d_in, d_sae), "threshold": ("F64", ())}

    @property
    def options(self) -> dict[str, Any]:
        """See `Sae.options`."""
        return {"k": self.k}

    def activate(self, z: Tensor) -> Tensor:
        """See `Sae.activate`."""
        return z.relu_().mul_(z > self.threshold)

    @torch.no_grad()
    def calibrate(self, sample: Tensor) -> None:
        """See `Sae.calibrate`: k latents a token on average; all positive ones where there are fewer."""
        n_wanted = self.k * len(sample)
        largest = sample.new_empty(0)
        for rows in sample.split(CALIBRATION_ROWS):
            positive = self.pre_acts(rows).flatten()
            largest = torch.cat([largest, positive[positive > 0]])
            if len(largest) > n_wanted + 1:  # one more, for the threshold lies between the two
                largest = largest.topk(n_wanted + 1, sorted=False).values
        if len(largest) > n_wanted:
            last_two = largest.topk(2, largest=False).values.double()
            self.threshold.copy_(last_two.mean())
        else:
            self.threshold.zero_()

    def training_acts(self, z: Tensor) -> Tensor:
        """See `SinglePathSae.training_acts`."""
        acts = z.relu().flatten()
        values, places = acts.topk(self.k * len(z), sorted=False)
        return acts.zero_().scatter_(0, places, values).view_as(z)

    def backward_acts(self, z: Tensor, latent_acts: Tensor, grad: Tensor, coefficient: float) -> Tensor:
        """See `SinglePathSae.backward_acts`: the gradient passes where a latent is active."""
        grad *= (latent_acts > 0).to(grad.dtype)
        return z.new_zeros(())
