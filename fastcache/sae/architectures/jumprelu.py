"""The JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435), as the FAST paper trained it: through log theta.

    z = W_enc x + b_enc,  f = z H(z - theta),  xhat = W_dec f + b_dec
    loss = ||x - xhat||^2 + lambda ||f||_0, a mean over the batch

The jump's gradient is estimated through a rectangle kernel of bandwidth bw (rect(u) = 1 for |u| < 1/2):

    d f / d z = 1[z > theta],  d f / d theta = -(theta / bw) rect((z - theta) / bw)
    d ||f||_0 / d theta = -(1 / bw) rect((z - theta) / bw)
"""

import math

import torch
from torch import Tensor, nn

from fastcache.sae.architectures.base import Sae, StepFigures

INITIAL_THRESHOLD = 0.001
BANDWIDTH = 0.001


class JumpReluSae(Sae):
    """A threshold for each latent and an L0 penalty."""

    architecture = "jumprelu"
    log_threshold: nn.Parameter

    def __init__(
        self, d_in: int, d_sae: int, bandwidth: float = BANDWIDTH, initial_threshold: float = INITIAL_THRESHOLD
    ) -> None:
        """See `Sae`; `bandwidth` is used in training only."""
        super().__init__(d_in, d_sae)
        self.bandwidth = bandwidth
        self.log_threshold = nn.Parameter(torch.full((d_sae,), math.log(initial_threshold)), requires_grad=False)

    @property
    def threshold(self) -> Tensor:
        """theta `[d_sae]`."""
        return self.log_threshold.exp()

    def encode(self, x: Tensor) -> Tensor:
        """See `Sae.encode`."""
        z = self.pre_acts(x)
        return z * (z > self.threshold)

    @torch.no_grad()
    def loss_and_grads(self, x: Tensor, sparsity_coefficient: float) -> StepFigures:
        """See `Sae.loss_and_grads` and the equations above."""
        z, theta = self.pre_acts(x), self.threshold
        active = (z > theta).to(x.dtype)  # as numbers: torch is slow at arithmetic with booleans
        latent_acts = z * active
        error = self.decode(latent_acts) - x
        squared_error = error.square().sum(1).mean()
        counts = active.sum(0)
        l0 = counts.sum() / len(x)
        grad_acts = self._decoder_grads(latent_acts, error)
        near = ((z - theta).abs() < self.bandwidth / 2).to(z.dtype)
        through_acts = (grad_acts * near).sum(0) * -(theta / self.bandwidth)
        through_l0 = near.sum(0) * (-sparsity_coefficient / (self.bandwidth * len(x)))
        self.log_threshold.grad = (through_acts + through_l0) * theta
        self._encoder_grads(x, grad_acts.mul_(active))
        loss = squared_error + sparsity_coefficient * l0
        return StepFigures(loss, squared_error, l0, l0, counts > 0)
