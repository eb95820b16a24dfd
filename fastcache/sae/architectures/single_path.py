"""The training step of an SAE with one encoder: z -> latent_acts -> recon.

Five matrix products, here and in `base.py`, and the pointwise work between them, which is what an architecture is.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from fastcache.sae.architectures.base import Sae, StepFigures, StepInputs


class SinglePathSae(Sae):
    """An SAE whose latent activations are a function of W_enc x + b_enc."""

    @torch.no_grad()
    def loss_and_grads(self, x: Tensor, inputs: StepInputs) -> StepFigures:
        """One training step's forward and backward pass on a batch x `[n, d_in]`; fills the gradients."""
        z = self.pre_acts(x)
        latent_acts = self.training_acts(z)
        counts = (latent_acts > 0).to(x.dtype).sum(0)  # as numbers: torch is slow at arithmetic with booleans
        loss, squared_error, error, grad = self.reconstruct(x, latent_acts)
        sparsity = self.backward_acts(z, latent_acts, grad, inputs.coefficient)
        aux = self._revive_dead(z, error, grad, inputs)
        self._encoder_grads(x, grad)
        loss = loss + inputs.coefficient * sparsity + aux
        return StepFigures(loss, squared_error, sparsity, counts.sum() / len(x), counts > 0, aux)

    def training_acts(self, z: Tensor) -> Tensor:
        """Latent activations `[n, d_sae]` in training, where they may differ from `activate`; leaves z as it is."""
        return self.activate(z.clone())

    @abstractmethod
    def backward_acts(self, z: Tensor, latent_acts: Tensor, grad: Tensor, coefficient: float) -> Tensor:
        """Turn `grad` `[n, d_sae]` from d loss / d latent_acts into d loss / d z, in place; returns the sparsity term.

        The penalty's gradients are added: to `grad`, and to those of the parameters that it depends on.
        """

    def _encoder_grads(self, x: Tensor, grad_pre_acts: Tensor) -> None:
        self.W_enc.grad = x.T @ grad_pre_acts
        self.b_enc.grad = grad_pre_acts.sum(0)

    def _revive_dead(self, z: Tensor, error: Tensor, grad: Tensor, inputs: StepInputs) -> Tensor:
        if inputs.dead is None or not inputs.revives:
            return z.new_zeros(())
        aux, grad_dead = revive_dead(self, z[:, inputs.dead], error, inputs.dead, inputs.aux_coefficient)
        grad.index_add_(1, inputs.dead, grad_dead)
        return aux


def revive_dead(sae: Sae, z_dead: Tensor, error: Tensor, dead: Tensor, aux_coefficient: float) -> tuple[Tensor, Tensor]:
    """The auxiliary loss AuxK: dead latents reconstruct what the living ones miss. Adds to the gradient of W_dec.

    aux_coefficient min(1, n_dead / k) ||e - W_dec^T top_k(z_dead)||^2, e = x - recon held fixed, k = d_in / 2: Gao et
    al. 2024 (arXiv 2406.04093), appendix A.2, with the factor of sparsify and SAELens for few dead latents. `dead`
    `[n_dead]` are the latents, `z_dead` `[n, n_dead]` their pre-activations, whose gradient is returned with the loss.
    """
    wanted = max(1, sae.d_in // 2)
    weight = aux_coefficient * min(1.0, len(dead) / wanted)
    values, places = z_dead.topk(min(wanted, len(dead)), sorted=False)
    acts = torch.zeros_like(z_dead).scatter_(1, places, values)
    rows = sae.W_dec[dead]
    miss = torch.addmm(error, acts, rows)
    grad_miss = miss * (2 * weight / len(miss))
    if sae.W_dec.grad is not None:
        sae.W_dec.grad.index_add_(0, dead, acts.T @ grad_miss)
    grad_acts = (grad_miss @ rows.T).gather(1, places)
    return weight * miss.square().sum(1).mean(), torch.zeros_like(acts).scatter_(1, places, grad_acts)
