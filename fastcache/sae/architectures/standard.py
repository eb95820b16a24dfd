"""The standard SAE (Bricken et al. 2023; method.md calls it so too).

f = ReLU(W_enc x + b_enc),  xhat = W_dec f + b_dec
loss = ||x - xhat||^2 + lambda ||f||_1, a mean over the batch
"""

import torch
from torch import Tensor

from fastcache.sae.architectures.base import Sae, StepFigures


class StandardSae(Sae):
    """ReLU and an L1 penalty."""

    architecture = "standard"

    def encode(self, x: Tensor) -> Tensor:
        """See `Sae.encode`."""
        return self.pre_acts(x).relu_()

    @torch.no_grad()
    def loss_and_grads(self, x: Tensor, sparsity_coefficient: float) -> StepFigures:
        """See `Sae.loss_and_grads`. d loss / d f = 2 (xhat - x) W_dec^T + lambda, where f > 0."""
        latent_acts = self.encode(x)
        active = (latent_acts > 0).to(x.dtype)  # as numbers: torch is slow at arithmetic with booleans
        error = self.decode(latent_acts) - x
        squared_error = error.square().sum(1).mean()
        l1 = latent_acts.sum(1).mean()
        grad = self._decoder_grads(latent_acts, error)
        grad += sparsity_coefficient / len(x)
        grad *= active
        self._encoder_grads(x, grad)
        counts = active.sum(0)
        loss = squared_error + sparsity_coefficient * l1
        return StepFigures(loss, squared_error, l1, counts.sum() / len(x), counts > 0)
