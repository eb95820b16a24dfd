"""The JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435).

    z = W_enc x + b_enc,  f = z H(z - theta),  xhat = W_dec f + b_dec
    loss = ||x - xhat||^2 + lambda S, a mean over the batch

S = ||f||_0, or with a target T for L0 the quadratic penalty S = (2 / T) (||f||_0 - T)^2 of Gemma Scope 2.
The jump's gradient is estimated through a rectangle kernel of bandwidth bw (rect(u) = 1 for |u| < 1/2):

    d f / d z = 1[z > theta],  d f / d theta = -(theta / bw) rect((z - theta) / bw)
    d ||f||_0 / d theta = -(1 / bw) rect((z - theta) / bw)

theta is trained directly and kept at 0 or more, or as the FAST paper did through log theta, which Adam hardly moves.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastcache.sae.architectures.base import Sae
from fastcache.sae.architectures.single_path import SinglePathSae

INITIAL_THRESHOLD = 0.001
BANDWIDTH = 0.001
SMALLEST_THRESHOLD = 1e-12
"""0 has no logarithm."""


class JumpReluSae(SinglePathSae):
    """A threshold for each latent and an L0 penalty."""

    architecture = "jumprelu"
    latent_parameters: ClassVar[tuple[str, ...]] = ("b_enc", "threshold")
    in_units_of_x: ClassVar[tuple[str, ...]] = ("b_dec", "b_enc", "threshold")
    threshold: nn.Parameter

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        bandwidth: float = BANDWIDTH,
        initial_threshold: float = INITIAL_THRESHOLD,
        target_l0: float | None = None,
    ) -> None:
        """See `Sae`; `bandwidth` and `target_l0` are used in training only."""
        super().__init__(d_in, d_sae)
        self.bandwidth, self.target_l0 = bandwidth, target_l0
        self.set_threshold(torch.full((d_sae,), initial_threshold))

    @property
    def theta(self) -> Tensor:
        """theta `[d_sae]`."""
        return self.threshold

    @torch.no_grad()
    def set_threshold(self, theta: Tensor) -> None:
        """Make theta `[d_sae]` the thresholds."""
        self.threshold.copy_(theta)

    def activate(self, z: Tensor) -> Tensor:
        """See `Sae.activate`."""
        return z.mul_(z > self.theta)

    def training_acts(self, z: Tensor) -> Tensor:
        """See `SinglePathSae.training_acts`."""
        return z * (z > self.theta).to(z.dtype)

    def backward_acts(self, z: Tensor, latent_acts: Tensor, grad: Tensor, coefficient: float) -> Tensor:
        """See `SinglePathSae.backward_acts` and the equations above; fills the gradient of the thresholds."""
        theta = self.theta
        active = (z > theta).to(z.dtype)
        near = ((z - theta).abs() < self.bandwidth / 2).to(z.dtype)
        through_acts = (grad * near).sum(0) * -(theta / self.bandwidth)
        sparsity, slope = self.l0_penalty(active.sum(1), coefficient)
        through_l0 = (slope @ near) * (-1 / self.bandwidth)
        self.fill_threshold_grad(through_acts + through_l0)
        grad *= active
        return sparsity

    def l0_penalty(self, l0: Tensor, coefficient: float) -> tuple[Tensor, Tensor]:
        """The sparsity term of rows with L0 `l0` `[n]`; and its derivative by each row's, `[n]`, with coefficient."""
        each = coefficient / len(l0)
        if self.target_l0 is None:
            return l0.mean(), torch.full_like(l0, each)
        excess = l0 - self.target_l0
        return (2 / self.target_l0) * excess.square().mean(), excess * (each * 4 / self.target_l0)

    def fill_threshold_grad(self, grad_theta: Tensor) -> None:
        """Take the gradient of theta `[d_sae]`."""
        self.threshold.grad = grad_theta

    @torch.no_grad()
    def after_step(self) -> None:
        """Below zero a threshold would let negative activations through."""
        self.threshold.clamp_(min=0)


class LogJumpReluSae(JumpReluSae):
    """The same, trained through log theta. `folded`, which is what is saved, gives a `JumpReluSae`."""

    latent_parameters = ("b_enc", "log_threshold")
    in_units_of_x = ("b_dec", "b_enc")
    log_threshold: nn.Parameter

    @property
    def theta(self) -> Tensor:
        """theta `[d_sae]`."""
        return self.log_threshold.exp()

    @torch.no_grad()
    def set_threshold(self, theta: Tensor) -> None:
        """Make theta `[d_sae]` the thresholds."""
        self.log_threshold.copy_(theta.clamp(min=SMALLEST_THRESHOLD).log())

    def fill_threshold_grad(self, grad_theta: Tensor) -> None:
        """See `JumpReluSae.fill_threshold_grad`."""
        self.log_threshold.grad = grad_theta * self.theta

    def after_step(self) -> None:
        """exp is positive."""

    @torch.no_grad()
    def folded(self, scale: float) -> Sae:
        """See `Sae.folded`."""
        sae = JumpReluSae(self.d_in, self.d_sae, self.bandwidth, target_l0=self.target_l0).to(self.b_dec)
        for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
            getattr(sae, name).copy_(getattr(self, name))
        sae.set_threshold(self.theta)
        return sae.folded(scale) if not math.isclose(scale, 1.0, rel_tol=0) else sae
