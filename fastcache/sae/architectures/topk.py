"""The TopK SAE (Gao et al. 2024, arXiv 2406.04093).

f = ReLU(TopK(W_enc x + b_enc)): of each token the k largest pre-activations
loss = ||x - xhat||^2, a mean over the batch
"""

from typing import Any

from torch import Tensor

from fastcache.errors import quoted
from fastcache.sae.architectures.single_path import SinglePathSae


def checked_k(k: int, d_sae: int) -> int:
    """`k`, if it is a number of latents; raises `ValueError` otherwise."""
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= d_sae:
        raise ValueError(f"k should be a number from 1 to {d_sae}, found {quoted(k)}")
    return k


class TopKSae(SinglePathSae):
    """k active latents for each token; no penalty."""

    architecture = "topk"

    def __init__(self, d_in: int, d_sae: int, k: int) -> None:
        """See `Sae`."""
        k = checked_k(k, d_sae)
        super().__init__(d_in, d_sae)
        self.k = k

    @property
    def options(self) -> dict[str, Any]:
        """See `Sae.options`."""
        return {"k": self.k}

    def activate(self, z: Tensor) -> Tensor:
        """See `Sae.activate`. Which of equal pre-activations is taken is up to torch."""
        values, places = z.topk(self.k, dim=1, sorted=False)
        return z.zero_().scatter_(1, places, values.relu_())

    def backward_acts(self, z: Tensor, latent_acts: Tensor, grad: Tensor, coefficient: float) -> Tensor:
        """See `SinglePathSae.backward_acts`: the gradient passes where a latent is active."""
        grad *= (latent_acts > 0).to(grad.dtype)
        return z.new_zeros(())
