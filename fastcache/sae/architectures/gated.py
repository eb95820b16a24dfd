"""The Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014).

    pi = W_enc x,  f = H(pi + b_gate) ReLU(exp(r_mag) pi + b_mag),  xhat = W_dec f + b_dec
    g = ReLU(pi + b_gate)
    loss = ||x - xhat||^2 + lambda ||g||_1 + ||x - (W_dec g + b_dec)||^2, a mean over the batch

The last term trains the gate, and holds W_dec and b_dec fixed, as in the paper and in dictionary_learning; SAELens trains them
too. The L1 term is weighted by decoder norms where these are free.
"""

import torch
from torch import Tensor, nn

from fastcache.sae.architectures.base import Sae, StepFigures, StepInputs, add_norm_grad, l1_weights


class GatedSae(Sae):
    """Which latents are active is learnt apart from how strongly."""

    architecture = "gated"
    latent_parameters = ("b_gate", "b_mag", "r_mag")
    in_units_of_x = ("b_dec", "b_gate", "b_mag")
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def __init__(self, d_in: int, d_sae: int, norm_weighted: bool = False) -> None:
        """See `StandardSae`."""
        super().__init__(d_in, d_sae)
        self.norm_weighted = norm_weighted

    def pre_acts(self, x: Tensor) -> Tensor:
        """W_enc x, `[n, d_sae]`."""
        return x @ self.W_enc

    def activate(self, z: Tensor) -> Tensor:
        """See `Sae.activate`."""
        return torch.addcmul(self.b_mag, z, self.r_mag.exp()).relu_().mul_(z > -self.b_gate)

    @torch.no_grad()
    def loss_and_grads(self, x: Tensor, inputs: StepInputs) -> StepFigures:
        """See `Sae.loss_and_grads` and the equations above. There is no auxiliary loss for dead latents."""
        z = self.pre_acts(x)
        gate = (z + self.b_gate).relu_()
        latent_acts = self.activate(z)
        counts = (latent_acts > 0).to(x.dtype).sum(0)
        squared_error, _, _, grad_acts = self.reconstruct(x, latent_acts)
        gate_error = self.decode(gate) - x
        weights, each = l1_weights(self.W_dec, self.norm_weighted), inputs.coefficient / len(x)
        gate_sums = gate.sum(0)
        l1 = gate_sums @ weights / len(x)
        if self.norm_weighted:
            add_norm_grad(self.W_dec, gate_sums * each)
        grad_gate = torch.addmm(weights * each, gate_error * (2 / len(x)), self.W_dec.T)
        grad_gate *= (gate > 0).to(x.dtype)
        self.b_gate.grad = grad_gate.sum(0)
        grad_acts *= (latent_acts > 0).to(x.dtype)
        self.b_mag.grad = grad_acts.sum(0)
        scale = self.r_mag.exp()
        self.r_mag.grad = (grad_acts * z).sum(0) * scale
        self.W_enc.grad = x.T @ grad_gate.addcmul_(grad_acts, scale)
        loss = squared_error + inputs.coefficient * l1 + gate_error.square().sum(1).mean()
        return StepFigures(loss, squared_error, l1, counts.sum() / len(x), counts > 0, z.new_zeros(()))
