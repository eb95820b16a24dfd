"""What all SAEs share: parameters, decoding, and a training step in closed form.

Gradients are in closed form. `single_path.py` has the step of those with one encoder, which is most of them.
"""

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class StepInputs(NamedTuple):
    """What a training step is told besides its batch."""

    coefficient: float = 0.0
    """Of the sparsity penalty."""
    aux_coefficient: float = 0.0
    """Of the auxiliary loss for dead latents."""
    dead: Tensor | None = None
    """int64 `[n_dead]`: the latents that the auxiliary loss is for."""

    @property
    def revives(self) -> bool:
        """Whether there is an auxiliary loss."""
        return self.dead is not None and len(self.dead) > 0 and self.aux_coefficient > 0


class Reconstruction(NamedTuple):
    """The forward half of a step, with the decoder's gradients already filled."""

    loss: Tensor
    """The reconstruction's part of the loss: the squared error, or for Matryoshka the sum over prefixes."""
    squared_error: Tensor
    """Of the whole SAE, summed over d_in, a mean over the batch."""
    error: Tensor
    """recon - x `[n, d_in]`."""
    grad_acts: Tensor
    """d loss / d latent_acts `[n, d_sae]`."""


class StepFigures(NamedTuple):
    """What one training step measured; scalars are means over the batch, still on the device."""

    loss: Tensor
    squared_error: Tensor
    """Summed over d_in."""
    sparsity: Tensor
    """The sparsity term before its coefficient: L1, L0, or the distance to a target L0."""
    l0: Tensor
    fired: Tensor
    """bool `[d_sae]`: whether each latent was active in the batch."""
    aux: Tensor
    """The auxiliary loss, with its coefficient; 0 where there is none."""


class Sae(nn.Module, ABC):
    """A sparse autoencoder: x `[n, d_in]` -> latent_acts `[n, d_sae]` -> recon `[n, d_in]`.

    Gradients are in closed form: `loss_and_grads` fills `.grad` of every parameter, without autograd. What an SAE learns
    is a parameter; what it keeps track of and needs for encoding (a threshold) is a buffer; both are in `state_dict`.
    """

    architecture: ClassVar[str]
    latent_parameters: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Names of the parameters `[d_sae]`."""
    in_units_of_x: ClassVar[tuple[str, ...]] = ("b_dec", "b_enc")
    """What has to be scaled with the activations."""
    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter

    def __init__(self, d_in: int, d_sae: int) -> None:
        """All parameters are zero until `fastcache.sae.init.initialise` or a checkpoint fills them."""
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae
        for name, shape in self.shapes(d_in, d_sae).items():
            setattr(self, name, nn.Parameter(torch.zeros(shape), requires_grad=False))

    @classmethod
    def shapes(cls, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, by name; all are float32."""
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        return shapes | dict.fromkeys(cls.latent_parameters, (d_sae,))

    @classmethod
    def layout(cls, d_in: int, d_sae: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype, as safetensors writes it, and shape of everything in `state_dict`, by name; nothing is allocated."""
        return {name: ("F32", shape) for name, shape in cls.shapes(d_in, d_sae).items()}

    @property
    def options(self) -> dict[str, Any]:
        """JSON-ready arguments, besides the shape, that a saved SAE of this kind is made again with."""
        return {}

    # Encoding and decoding

    def pre_acts(self, x: Tensor) -> Tensor:
        """W_enc x + b_enc, `[n, d_sae]`."""
        return torch.addmm(self.b_enc, x, self.W_enc)

    @abstractmethod
    def activate(self, z: Tensor) -> Tensor:
        """Latent activations `[n, d_sae]` of pre-activations z `[n, d_sae]`; may overwrite z."""

    def encode(self, x: Tensor) -> Tensor:
        """Latent activations `[n, d_sae]` of x `[n, d_in]`."""
        return self.activate(self.pre_acts(x))

    def decode(self, latent_acts: Tensor) -> Tensor:
        """Reconstruction `[n, d_in]`."""
        return torch.addmm(self.b_dec, latent_acts, self.W_dec)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction `[n, d_in]` of x `[n, d_in]`."""
        return self.decode(self.encode(x))

    # Training

    @abstractmethod
    def loss_and_grads(self, x: Tensor, inputs: StepInputs) -> StepFigures:
        """One training step's forward and backward pass on a batch x `[n, d_in]`; fills the gradients."""

    def reconstruct(self, x: Tensor, latent_acts: Tensor) -> Reconstruction:
        """Decode, compare with x, fill the decoder's gradients."""
        error = self.decode(latent_acts) - x
        squared_error = error.square().sum(1).mean()
        return Reconstruction(squared_error, squared_error, error, self._decoder_grads(latent_acts, error))

    def after_step(self) -> None:
        """What has to hold again after the optimiser has changed the parameters."""

    @torch.no_grad()
    def calibrate(self, sample: Tensor) -> None:
        """Set, once trained, what encoding needs and no gradient finds, on a sample `[n, d_in]` of the training rows."""

    @torch.no_grad()
    def folded(self, scale: float) -> "Sae":
        """A copy for activations as they are, of an SAE trained on `scale` times them.

        Biases and thresholds are divided by `scale`. This is exact, as scaling x, biases and thresholds alike scales
        latents and reconstruction by the same.
        """
        sae = copy.deepcopy(self)
        for name in self.in_units_of_x:
            getattr(sae, name).div_(scale)
        return sae

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


def l1_weights(W_dec: Tensor, by_norm: bool) -> Tensor:
    """Each latent's weight in the L1 term, `[d_sae]`: 1, or the norm of its decoder row.

    By the norm it doesn't pay to shrink latents and lengthen rows (Anthropic, "Update on how we train SAEs", April 2024).
    """
    return W_dec.norm(dim=1) if by_norm else W_dec.new_ones(len(W_dec))


def add_norm_grad(W_dec: nn.Parameter, slope: Tensor) -> None:
    """Add to the gradient of W_dec that of its rows' norms, times `slope` `[d_sae]`."""
    if W_dec.grad is not None:
        W_dec.grad.addcmul_(W_dec, (slope / W_dec.norm(dim=1).clamp(min=1e-12))[:, None])
