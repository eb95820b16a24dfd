"""The standard SAE (Bricken et al. 2023), as docs/method.md calls it too.

f = ReLU(W_enc x + b_enc),  xhat = W_dec f + b_dec
loss = ||x - xhat||^2 + lambda ||f||_1, a mean over the batch; or lambda sum_i f_i ||d_i||, weighted by decoder norms
"""

from torch import Tensor

from fastcache.sae.architectures.base import add_norm_grad, l1_weights
from fastcache.sae.architectures.single_path import SinglePathSae


class StandardSae(SinglePathSae):
    """ReLU and an L1 penalty."""

    architecture = "standard"

    def __init__(self, d_in: int, d_sae: int, norm_weighted: bool = False) -> None:
        """See `Sae`; `norm_weighted`: each latent's penalty is weighted by its decoder row's norm."""
        super().__init__(d_in, d_sae)
        self.norm_weighted = norm_weighted

    def activate(self, z: Tensor) -> Tensor:
        """See `Sae.activate`."""
        return z.relu_()

    def backward_acts(self, z: Tensor, latent_acts: Tensor, grad: Tensor, coefficient: float) -> Tensor:
        """See `SinglePathSae.backward_acts`. d loss / d f = 2 (xhat - x) W_dec^T + lambda, where f > 0."""
        weights = l1_weights(self.W_dec, self.norm_weighted)
        grad += weights * (coefficient / len(z))
        grad *= (latent_acts > 0).to(grad.dtype)
        return self.l1(latent_acts.sum(0), weights, len(z), coefficient)

    def l1(self, sums: Tensor, weights: Tensor, n: int, coefficient: float) -> Tensor:
        """The L1 term from the sums `[d_sae]` of the latents over n rows; adds what its weights add to W_dec's gradient."""
        if self.norm_weighted:
            add_norm_grad(self.W_dec, sums * (coefficient / n))
        return sums @ weights / n
