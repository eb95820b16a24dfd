"""All of a step but the encoder's product, on the active latents alone. Exact: the others' gradients are zero."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcache.sae.fast import sparse_kernels as kernels
from fastcache.sae.fast.buffers import Buffers
from fastcache.sae.fast.dense import arrays, groups
from fastcache.sae.fast.threads import spread

ON, OFF = 0.06, 0.075
"""Shares of entries among all latents: below the one it is used from the next step on, above the other it isn't.

They break even at 7 % (d_in 896) to 12 % (256) where products run as torch's own do (docs/benchmarks/train.md).
"""

OF_FAST_PRODUCTS = 0.6
"""What is left of both where a faster way to multiply was found: dense steps are quicker there."""

CAPACITY = 0.1
"""Share of entries that there is room for. A step with more is done densely."""


def wins(share: float, used: bool, fast_products: bool) -> bool:
    """Whether the next step should be sparse, after one with this share of entries. A pure function: resumed runs agree."""
    return share < (OFF if used else ON) * (OF_FAST_PRODUCTS if fast_products else 1.0)


class Gradients(NamedTuple):
    """What `backward` found; W_enc's is `[d_sae, d_in]`."""

    squared_error: Tensor
    """Summed over everything."""
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    counts: Tensor
    """How often each latent was active."""
    more: Tensor
    """The gradient of theta, or for ReLU the sums of each latent's activations."""
    error: Tensor
    """2/n (recon - x) `[n, d_in]`."""
    n_entries: Tensor


class Entries:
    """The entries of one batch; see `sparse_kernels`."""

    def __init__(self, buffers: Buffers, n: int, d_sae: int, dtype: torch.dtype) -> None:
        self._buffers, self._dtype, self._n, self._d_sae = buffers, dtype, n, d_sae
        self._size, self._n_groups = groups(n)
        self._capacity = max(self._size, int(CAPACITY * d_sae * self._size))

    def _integers(self, name: str, *shape: int) -> Tensor:
        return self._buffers.get(name, *shape, dtype=torch.int32)

    def _numbers(self, name: str, *shape: int) -> Tensor:
        return self._buffers.get(name, *shape, dtype=self._dtype)

    def extract(self, z: Tensor, low: Tensor, theta: Tensor) -> bool:
        """Find what of z `[n, d_sae]` is above `low` `[d_sae]`; returns whether there was room for it. Leaves z as it is."""
        self._ends = self._integers("ends", self._n)
        self._latents = self._integers("latents", self._n_groups * self._capacity)
        self._values = self._numbers("values", self._n_groups * self._capacity)
        self._places = self._integers("places", self._n_groups, self._d_sae)
        self.row_counts = self._numbers("row_counts", self._n)
        full = self._buffers.get("full", self._n_groups, dtype=torch.bool)
        given = self._size, self._capacity, z, low, theta, self._ends, self._latents, self._values, self._places
        spread(kernels.extract, self._n_groups, *arrays(*given, self.row_counts, full))
        return not full.any()

    def backward(
        self, x: Tensor, W_dec: Tensor, b_dec: Tensor, penalty: Tensor, jump: tuple[Tensor, float] | None = None
    ) -> Gradients:
        """Decode the entries, compare with x `[n, d_in]`, and find all gradients.

        `jump` is theta and the bandwidth, and then `penalty` as in `CompiledOps.jump_backward`; otherwise `penalty` `[d_sae]`
        is added to the gradient of every active latent. The tensors of the result are used again by the next step.
        """
        errors, squares = self._numbers("errors", *x.shape), self._numbers("squares", self._n)
        by_latent = self._sort_and_decode(x, W_dec, b_dec, errors, squares)
        n, d = self._d_sae, x.shape[1]
        grad_dec, grad_enc = self._numbers("grad_dec", n, d), self._numbers("grad_enc", n, d)
        more, sums = self._numbers("more", n), self._numbers("grad_sums", n)
        counts = self._integers("active_counts", self._d_sae)
        found = arrays(grad_dec, grad_enc, more, sums, counts)
        if jump is None:
            spread(kernels.relu_columns, self._d_sae, *by_latent, *arrays(errors, x, penalty), *found)
        else:
            theta, bandwidth = jump
            number = theta.numpy().dtype.type
            given = *arrays(errors, x, theta), number(bandwidth / 2), number(1 / bandwidth), penalty.numpy()
            spread(kernels.jump_columns, self._d_sae, *by_latent, *given, *found)
        return Gradients(squares.sum(), grad_enc, sums, grad_dec, errors.sum(0), counts, more, errors, self.n_entries)

    def _sort_and_decode(self, x: Tensor, W_dec: Tensor, b_dec: Tensor, errors: Tensor, squares: Tensor) -> list[Any]:
        starts = self._integers("starts", self._d_sae + 1)
        kernels.offsets(*arrays(self._places, starts))
        self.n_entries = starts[-1]
        n = int(self.n_entries)
        rows = self._integers("by_latent_rows", n)
        values, grads = (
            self._numbers("by_latent_values", n),
            self._numbers("by_latent_grads", n),
        )
        scale = x.numpy().dtype.type(2 / self._n)
        given = self._size, self._capacity, self._ends, self._latents, self._values, W_dec, b_dec, x, scale
        spread(kernels.decode, self._n_groups, *arrays(*given, self._places, errors, squares, rows, values, grads))
        return arrays(starts, rows, values, grads)
