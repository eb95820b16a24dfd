"""What all SAEs share: parameters, decoding, and the interface of a training step."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class StepFigures(NamedTuple):
    """What one training step measured; scalars are means over the batch, still on the device."""

    loss: Tensor
    squared_error: Tensor
    """Summed over d_in."""
    sparsity: Tensor
    """The sparsity term before its coefficient: L1 or L0."""
    l0: Tensor
    fired: Tensor
    """bool `[d_sae]`: whether each latent was active in the batch."""


class Sae(nn.Module, ABC):
    """A sparse autoencoder: x `[n, d_in]` -> latent_acts `[n, d_sae]` -> recon `[n, d_in]`.

    Gradients are in closed form: `loss_and_grads` fills `.grad` of every parameter, without autograd.
    """

    architecture: str
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, d_in: int, d_sae: int) -> None:
        """All parameters are zero until `fastcache.sae.init.initialise` or a checkpoint fills them."""
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae
        shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def pre_acts(self, x: Tensor) -> Tensor:
        """W_enc x + b_enc, `[n, d_sae]`."""
        return torch.addmm(self.b_enc, x, self.W_enc)

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Latent activations `[n, d_sae]` of x `[n, d_in]`."""

    def decode(self, latent_acts: Tensor) -> Tensor:
        """Reconstruction `[n, d_in]`."""
        return torch.addmm(self.b_dec, latent_acts, self.W_dec)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction `[n, d_in]` of x `[n, d_in]`."""
        return self.decode(self.encode(x))

    @abstractmethod
    def loss_and_grads(self, x: Tensor, sparsity_coefficient: float) -> StepFigures:
        """One training step's forward and backward pass on a batch x `[n, d_in]`; fills the gradients."""

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Scale the decoder rows to unit L2 norm."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))

    @torch.no_grad()
    def remove_parallel_decoder_gradient(self) -> None:
        """Keep of the decoder's gradient what is orthogonal to its rows: the rows' norms are fixed."""
        if self.W_dec.grad is not None:
            self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec

    def _decoder_grads(self, latent_acts: Tensor, error: Tensor) -> Tensor:
        """Fill the decoder's gradients from error = recon - x; returns the gradient of latent_acts."""
        grad_recon = error * (2 / len(error))
        self.W_dec.grad = latent_acts.T @ grad_recon
        self.b_dec.grad = grad_recon.sum(0)
        return grad_recon @ self.W_dec.T

    def _encoder_grads(self, x: Tensor, grad_pre_acts: Tensor) -> None:
        self.W_enc.grad = x.T @ grad_pre_acts
        self.b_enc.grad = grad_pre_acts.sum(0)
