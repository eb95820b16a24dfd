"""The training step of an SAE with one encoder: five products, or one product and the active latents alone."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from fastcache.sae.architectures import BatchTopKSae, JumpReluSae, Sae, StandardSae, StepFigures, StepInputs, TopKSae
from fastcache.sae.architectures.base import l1_weights
from fastcache.sae.architectures.single_path import SinglePathSae, revive_dead
from fastcache.sae.fast import gpu
from fastcache.sae.fast.buffers import Buffers
from fastcache.sae.fast.dense import CompiledOps, Forward, TorchOps
from fastcache.sae.fast.products import PLAIN, Route
from fastcache.sae.fast.sparse import Entries, Gradients, wins
from fastcache.sae.fast.threads import compiles


class Passes(NamedTuple):
    """What a batch came to."""

    squared_error: Tensor
    """Summed over everything."""
    counts: Tensor
    """How often each latent was active, `[d_sae]`."""
    sparsity: Tensor
    """The sparsity term, a mean over the batch."""
    error: Tensor
    """2/n (recon - x) `[n, d_in]`."""
    n_entries: Tensor
    """Latents that were active or near their thresholds, in all."""


class FastStep(ABC):
    """Does what the `loss_and_grads` of its SAE does. Gradients are in memory that the next step uses again.

    The first call turns W_enc around in memory: rows of one latent are what the sparse passes and Adam go along.
    """

    def __init__(self, sae: Sae, route: Route = PLAIN) -> None:
        self._device = sae.b_dec.device
        self._buffers = Buffers(self._device)
        self._compiles = compiles and self._device.type == "cpu"
        self.route, self.sparse = route, self._compiles
        """`sparse`: whether the next step is to be. It follows from the steps before: keep it for a resumed run. The first
        one is, if there is room for its entries."""
        self._ops: CompiledOps | gpu.TritonOps | TorchOps
        self._by_triton = gpu.trouble(self._device) is None
        self._sae = sae

    @torch.no_grad()
    def __call__(self, x: Tensor, inputs: StepInputs) -> StepFigures:
        """See `Sae.loss_and_grads`."""
        if self._sae.W_enc.is_contiguous():
            self._sae.W_enc.data = self._sae.W_enc.data.T.contiguous().T
        compiled = self._compiles and self.route.dtype == torch.float32
        others = gpu.TritonOps if self._by_triton else TorchOps
        self._ops = CompiledOps(self._buffers) if compiled else others(self._buffers)
        with self.route.active(self._device):
            return self._step(x.contiguous(), inputs)

    def _step(self, x: Tensor, inputs: StepInputs) -> StepFigures:
        sae, n, dtype = self._sae, len(x), self.route.dtype if x.dtype == torch.float32 else x.dtype
        narrow = x.to(dtype)
        z = self._buffers.get("acts", n, sae.d_sae, dtype=dtype)
        torch.addmm(sae.b_enc.to(dtype), narrow, sae.W_enc.to(dtype), out=z)
        z_dead = z[:, inputs.dead].to(x.dtype) if inputs.revives else None
        z = self._select(z)
        entries = self._entries(z.to(x.dtype)) if self.sparse else None
        coefficient = inputs.coefficient
        found = self._sparse(x, entries, coefficient) if entries else self._dense(z, narrow, coefficient)
        if self._compiles:
            share = float(found.n_entries) / (n * sae.d_sae)
            self.sparse = wins(share, self.sparse, fast_products=self.route is not PLAIN)
        aux = x.new_zeros(()) if z_dead is None else self._revive_dead(z_dead, x, found.error, inputs)
        squared_error = found.squared_error / n
        loss = squared_error + coefficient * found.sparsity + aux
        return StepFigures(loss, squared_error, found.sparsity, found.counts.sum() / n, found.counts > 0, aux)

    def _select(self, z: Tensor) -> Tensor:
        """z, with what isn't among the largest set to 0 for kinds that go by rank."""
        return z

    # Five products

    def _dense(self, z: Tensor, x: Tensor, coefficient: float) -> Passes:
        """Overwrites z."""
        sae = self._sae
        forward = self._forward(z)
        error = self._buffers.get("errors", *x.shape, dtype=x.dtype)
        torch.addmm(sae.b_dec.to(x.dtype), z, sae.W_dec.to(x.dtype), out=error)
        squared_error, sae.b_dec.grad = self._ops.residual(error, x, 2 / len(x))
        sae.W_dec.grad = self._weight_grad("grad_dec", z, error, sae.W_dec.dtype)
        grad = self._buffers.get("grad", *z.shape, dtype=z.dtype)
        sparsity, sae.b_enc.grad = self._backward(z, error, grad, forward, coefficient)
        sae.W_enc.grad = self._weight_grad("grad_enc", grad, x, sae.W_enc.dtype).T
        return Passes(squared_error, forward.counts, sparsity, error, forward.n_entries)

    def _weight_grad(self, name: str, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
        """left^T right `[d_sae, d_in]`."""
        shape = left.shape[1], right.shape[1]
        product = self._buffers.get(f"{name} {left.dtype}", *shape, dtype=left.dtype)
        torch.mm(left.T, right, out=product)
        return product if product.dtype == dtype else self._buffers.get(name, *shape, dtype=dtype).copy_(product)

    @abstractmethod
    def _forward(self, z: Tensor) -> Forward:
        """Turn z into the latent activations."""

    @abstractmethod
    def _backward(
        self, acts: Tensor, error: Tensor, grad: Tensor, forward: Forward, coefficient: float
    ) -> tuple[Tensor, Tensor]:
        """Fill `grad` with the gradient of z; `error` is 2/n (recon - x). Returns the sparsity term and the sums of `grad`."""

    # One product

    def _entries(self, z: Tensor) -> Entries | None:
        """What of z is active or near; None if it is too much."""
        entries = Entries(self._buffers, len(z), self._sae.d_sae, z.dtype)
        return entries if entries.extract(z, *self._band()) else None

    def _sparse(self, x: Tensor, entries: Entries, coefficient: float) -> Passes:
        sae = self._sae
        found, sparsity = self._sparse_backward(x, entries, coefficient)
        sae.W_enc.grad, sae.b_enc.grad, sae.b_dec.grad = found.W_enc.T, found.b_enc, found.b_dec
        return Passes(found.squared_error, found.counts.to(x.dtype), sparsity, found.error, found.n_entries)

    @abstractmethod
    def _band(self) -> tuple[Tensor, Tensor]:
        """Pre-activations `[d_sae]` above which a gradient passes, and above which a latent is active."""

    @abstractmethod
    def _sparse_backward(self, x: Tensor, entries: Entries, coefficient: float) -> tuple[Gradients, Tensor]:
        """All gradients, and the sparsity term. Fills those of W_dec, and of parameters that only this kind has."""

    def _revive_dead(self, z_dead: Tensor, x: Tensor, error: Tensor, inputs: StepInputs) -> Tensor:
        """The auxiliary loss; its gradients are added to the encoder's, which are complete."""
        sae, dead = self._sae, inputs.dead
        assert dead is not None and sae.W_enc.grad is not None and sae.b_enc.grad is not None  # noqa: S101, PT018
        aux, grad = revive_dead(sae, z_dead, error.to(x.dtype) * (len(x) / 2), dead, inputs.aux_coefficient)
        sae.W_enc.grad.T.index_add_(0, dead, grad.T @ x)
        sae.b_enc.grad.index_add_(0, dead, grad.sum(0))
        return aux


class FastStandard(FastStep):
    """See `StandardSae`; the gradient of its L1 term is the bias of a product."""

    _sae: StandardSae

    def _forward(self, z: Tensor) -> Forward:
        return self._ops.relu(z)

    def _backward(
        self, acts: Tensor, error: Tensor, grad: Tensor, forward: Forward, coefficient: float
    ) -> tuple[Tensor, Tensor]:
        sae, n = self._sae, len(acts)
        weights = l1_weights(sae.W_dec, sae.norm_weighted)
        torch.addmm((weights * (coefficient / n)).to(grad.dtype), error, sae.W_dec.T.to(grad.dtype), out=grad)
        return sae.l1(forward.sums, weights, n, coefficient), self._ops.relu_backward(grad, acts)

    def _band(self) -> tuple[Tensor, Tensor]:
        zero = torch.zeros_like(self._sae.b_enc)
        return zero, zero

    def _sparse_backward(self, x: Tensor, entries: Entries, coefficient: float) -> tuple[Gradients, Tensor]:
        sae, n = self._sae, len(x)
        weights = l1_weights(sae.W_dec, sae.norm_weighted)
        found = entries.backward(x, sae.W_dec, sae.b_dec, weights * (coefficient / n))
        sae.W_dec.grad = found.W_dec
        return found, sae.l1(found.more, weights, n, coefficient)


class FastJumpRelu(FastStep):
    """See `JumpReluSae`."""

    _sae: JumpReluSae

    def _forward(self, z: Tensor) -> Forward:
        return self._ops.jump(z, self._sae.theta, self._sae.bandwidth)

    def _backward(
        self, acts: Tensor, error: Tensor, grad: Tensor, forward: Forward, coefficient: float
    ) -> tuple[Tensor, Tensor]:
        sae = self._sae
        torch.mm(error, sae.W_dec.T.to(grad.dtype), out=grad)
        sparsity, slope = sae.l0_penalty(forward.row_counts, coefficient)
        sums, theta_grad = self._ops.jump_backward(grad, acts, sae.theta, sae.bandwidth, slope)
        sae.fill_threshold_grad(theta_grad)
        return sparsity, sums

    def _band(self) -> tuple[Tensor, Tensor]:
        theta = self._sae.theta
        return theta - self._sae.bandwidth / 2, theta

    def _sparse_backward(self, x: Tensor, entries: Entries, coefficient: float) -> tuple[Gradients, Tensor]:
        sae = self._sae
        sparsity, slope = sae.l0_penalty(entries.row_counts, coefficient)
        found = entries.backward(x, sae.W_dec, sae.b_dec, slope, (sae.theta, sae.bandwidth))
        sae.W_dec.grad = found.W_dec
        sae.fill_threshold_grad(found.more)
        return found, sparsity


class FastTopK(FastStep):
    """See `TopKSae` and `BatchTopKSae`: what they keep is active, and there is no penalty."""

    _sae: SinglePathSae

    def _select(self, z: Tensor) -> Tensor:
        return z.copy_(self._sae.training_acts(z))

    def _forward(self, z: Tensor) -> Forward:
        return self._ops.relu(z)

    def _backward(
        self, acts: Tensor, error: Tensor, grad: Tensor, forward: Forward, coefficient: float
    ) -> tuple[Tensor, Tensor]:
        torch.mm(error, self._sae.W_dec.T.to(grad.dtype), out=grad)
        return acts.new_zeros((), dtype=self._sae.W_dec.dtype), self._ops.relu_backward(grad, acts)

    def _band(self) -> tuple[Tensor, Tensor]:
        zero = torch.zeros_like(self._sae.b_enc)
        return zero, zero

    def _sparse_backward(self, x: Tensor, entries: Entries, coefficient: float) -> tuple[Gradients, Tensor]:
        sae = self._sae
        found = entries.backward(x, sae.W_dec, sae.b_dec, torch.zeros_like(sae.b_enc))
        sae.W_dec.grad = found.W_dec
        return found, x.new_zeros(())


def fast_step(sae: Sae) -> FastStep | None:
    """The fast step of `sae`, or None where its kind has none."""
    if type(sae) in (TopKSae, BatchTopKSae):  # not those derived from them: theirs are other reconstructions
        return FastTopK(sae)
    if isinstance(sae, StandardSae):
        return FastStandard(sae)
    return FastJumpRelu(sae) if isinstance(sae, JumpReluSae) else None
