"""The Matryoshka BatchTopK SAE (Bussmann et al. 2025, arXiv 2503.17547): prefixes of the latents are SAEs themselves.

f as in BatchTopK;  xhat_m = W_dec[:m] f[:m] + b_dec for each width m, the last of which is d_sae
loss = sum_m ||x - xhat_m||^2, a mean over the batch. SAELens sums too; dictionary_learning averages.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastcache.errors import quoted
from fastcache.sae.architectures.base import Reconstruction
from fastcache.sae.architectures.batchtopk import BatchTopKSae


class MatryoshkaSae(BatchTopKSae):
    """BatchTopK with nested reconstructions."""

    architecture = "matryoshka"

    def __init__(self, d_in: int, d_sae: int, k: int, widths: Sequence[int] = ()) -> None:
        """See `Sae`; `widths` rise, and d_sae is added where it isn't the last. Raises `ValueError` for others."""
        super().__init__(d_in, d_sae, k)
        are_numbers = all(isinstance(width, int) and not isinstance(width, bool) for width in widths)
        if not are_numbers or not all(low < high for low, high in pairwise((0, *widths, d_sae + 1))):
            raise ValueError(f"widths should be rising numbers from 1 to {d_sae}, found {quoted(list(widths))}")
        self.widths = tuple(widths) if widths and widths[-1] == d_sae else (*widths, d_sae)

    @property
    def options(self) -> dict[str, Any]:
        """See `Sae.options`."""
        return {"k": self.k, "widths": list(self.widths)}

    def reconstruct(self, x: Tensor, latent_acts: Tensor) -> Reconstruction:
        """See `Sae.reconstruct`. A latent's gradient comes from all prefixes that it is in: as many products as one SAE's."""
        blocks = list(pairwise((0, *self.widths)))
        recon: Tensor = self.b_dec
        errors = []
        for start, stop in blocks:
            recon = recon + latent_acts[:, start:stop] @ self.W_dec[start:stop]
            errors.append(recon - x)
        squared_errors = [error.square().sum(1).mean() for error in errors]
        self.W_dec.grad, grad = torch.empty_like(self.W_dec), torch.empty_like(latent_acts)
        grad_recon = torch.zeros_like(x)
        for (start, stop), error in zip(reversed(blocks), reversed(errors), strict=True):
            grad_recon += error * (2 / len(x))
            self.W_dec.grad[start:stop] = latent_acts[:, start:stop].T @ grad_recon
            grad[:, start:stop] = grad_recon @ self.W_dec[start:stop].T
        self.b_dec.grad = grad_recon.sum(0)
        return Reconstruction(torch.stack(squared_errors).sum(), squared_errors[-1], errors[-1], grad)
