"""What lies between the dense products: the activation, its gradient and the residual, compiled or in torch operations.

Both kinds do the same and hold to the same interface; the compiled ones are for float32 and float64 on a CPU.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcache.sae.fast import dense_kernels as kernels
from fastcache.sae.fast.buffers import Buffers
from fastcache.sae.fast.threads import spread

MIN_GROUP, N_GROUPS = 16, 64
"""Rows are cut into at most `N_GROUPS` groups, by the size of the batch alone."""

BITS: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.float32: (torch.int32, np.int32(-(2**31))),
    torch.float64: (torch.int64, np.int64(-(2**63))),
}
"""Integers of the same width, and the one that -0.0 is."""


class Forward(NamedTuple):
    """What an activation counted."""

    counts: Tensor
    """How often each latent was active, `[d_sae]`."""
    sums: Tensor
    """Of each latent's activations, `[d_sae]`; empty for JumpReLU."""
    row_counts: Tensor
    """Active latents of each row, `[n]`; empty for ReLU."""
    n_entries: Tensor
    """Latents that were active or near their thresholds, in all."""


def groups(n: int) -> tuple[int, int]:
    """Rows in a group, and number of groups, for a batch of n."""
    size = max(MIN_GROUP, -(-n // N_GROUPS))
    return size, -(-n // size)


def arrays(*values: Any) -> list[Any]:
    """Tensors as numpy arrays over the same memory; all else as it is."""
    return [value.numpy() if isinstance(value, Tensor) else value for value in values]


class CompiledOps:
    """Passes in loops of their own."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers

    def _partial(self, name: str, n_groups: int, like: Tensor) -> Tensor:
        return self._buffers.get(name, n_groups, like.shape[1], dtype=like.dtype)

    def relu(self, z: Tensor) -> Forward:
        """z becomes ReLU(z)."""
        size, n = groups(len(z))
        sums, counts = self._partial("sums", n, z), self._partial("counts", n, z)
        spread(kernels.relu_forward, n, *arrays(size, z, sums, counts))
        per_latent = counts.sum(0)
        return Forward(per_latent, sums.sum(0), z[:0], per_latent.sum())

    def relu_backward(self, grad: Tensor, acts: Tensor) -> Tensor:
        """`grad` becomes that of z; returns its sums `[d_sae]`."""
        size, n = groups(len(grad))
        sums = self._partial("sums", n, grad)
        spread(kernels.relu_backward, n, *arrays(size, grad, acts, sums))
        return sums.sum(0)

    def jump(self, z: Tensor, theta: Tensor, bandwidth: float) -> Forward:
        """z becomes z H(z - theta), with -0.0 for what is inactive and near the threshold."""
        size, n = groups(len(z))
        counts, row_counts = self._partial("counts", n, z), self._buffers.get("row_counts", len(z), dtype=z.dtype)
        entries, half = self._buffers.get("row_entries", len(z), dtype=z.dtype), theta.numpy().dtype.type(bandwidth / 2)
        spread(kernels.jump_forward, n, *arrays(size, z, theta, half, counts, row_counts, entries))
        return Forward(counts.sum(0), z[:0], row_counts, entries.sum())

    def jump_backward(
        self, grad: Tensor, acts: Tensor, theta: Tensor, bandwidth: float, penalty: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`grad` becomes that of z; returns its sums and the gradient of theta, both `[d_sae]`.

        `penalty` `[n]`: derivative of the sparsity term, with its coefficient, by the L0 of each row.
        """
        size, n = groups(len(grad))
        sums, theta_sums = self._partial("sums", n, grad), self._partial("counts", n, grad)
        integer, minus_zero = BITS[acts.dtype]
        number = theta.numpy().dtype.type
        found = arrays(size, grad, acts, acts.view(integer), minus_zero, theta, number(bandwidth / 2))
        spread(kernels.jump_backward, n, *found, number(1 / bandwidth), *arrays(penalty, sums, theta_sums))
        return sums.sum(0), theta_sums.sum(0)

    def residual(self, recon: Tensor, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """recon becomes scale (recon - x); returns the squared error, all summed, and the sums `[d_in]` of the new recon."""
        size, n = groups(len(x))
        sums, squares = self._partial("error_sums", n, x), self._buffers.get("squares", len(x), dtype=x.dtype)
        spread(kernels.residual, n, *arrays(size, recon, x, x.numpy().dtype.type(scale), squares, sums))
        return squares.sum(), sums.sum(0)


class TorchOps:
    """The same in torch operations, on any device and in bfloat16 too; sums are made in float32 or better."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._near = torch.empty(0)

    def _scratch(self, like: Tensor) -> Tensor:
        return self._buffers.get("scratch", *like.shape, dtype=like.dtype)

    def relu(self, z: Tensor) -> Forward:
        """See `CompiledOps.relu`."""
        z.relu_()
        active = torch.gt(z, 0, out=self._scratch(z))  # as numbers: torch is slow at sums of booleans
        counts = _sum(active, 0)
        return Forward(counts, _sum(z, 0), z[:0], counts.sum())

    def relu_backward(self, grad: Tensor, acts: Tensor) -> Tensor:
        """See `CompiledOps.relu_backward`."""
        torch.ops.aten.threshold_backward.grad_input(grad, acts, 0, grad_input=grad)
        return _sum(grad, 0)

    def jump(self, z: Tensor, theta: Tensor, bandwidth: float) -> Forward:
        """See `CompiledOps.jump`; the band is remembered, not written into z."""
        scratch = self._scratch(z)
        self._near = torch.sub(z, theta.to(z.dtype), out=scratch).abs_().lt(bandwidth / 2)
        active = torch.gt(z, theta, out=scratch)
        counts, row_counts = _sum(active, 0), _sum(active, 1)
        z.mul_(active)
        return Forward(counts, z[:0], row_counts, counts.sum())

    def jump_backward(
        self, grad: Tensor, acts: Tensor, theta: Tensor, bandwidth: float, penalty: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `CompiledOps.jump_backward`."""
        near = self._scratch(grad).copy_(self._near)
        through_l0 = penalty.to(near.dtype) @ near
        through_acts = _sum(near.mul_(grad), 0)
        torch.ops.aten.threshold_backward.grad_input(grad, acts, 0, grad_input=grad)
        return _sum(grad, 0), (through_acts * theta + through_l0) * (-1 / bandwidth)

    def residual(self, recon: Tensor, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See `CompiledOps.residual`."""
        recon.sub_(x)
        squares = _sum(recon.square(), None)
        recon.mul_(scale)
        return squares, _sum(recon, 0)


def _sum(values: Tensor, dim: int | None) -> Tensor:
    return values.sum(dim, dtype=torch.promote_types(values.dtype, torch.float32))
