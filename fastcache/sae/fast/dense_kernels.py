"""Compiled passes over `[n, d_sae]`: what lies between the dense products of a step.

Rows come in groups. Sums over the batch are made within a group, in `[n_groups, d_sae]`, and added up afterwards.
A latent that is inactive, but within the band around its threshold that has a gradient, is kept as -0.0: no second array
is needed to tell it from one that is far below.
"""

from typing import Any

from fastcache.sae.fast.threads import compiled

Array = Any
"""A numpy array; mypy knows no dtypes that would help here."""


@compiled
def relu_forward(first: int, last: int, size: int, z: Array, sums: Array, counts: Array) -> None:
    """z becomes ReLU(z); by group, the sums of the latents and how often they are active."""
    zero, one = z.dtype.type(0), z.dtype.type(1)
    n, d_sae = z.shape
    for group in range(first, last):
        sums[group, :] = zero
        counts[group, :] = zero
        for row in range(group * size, min(n, group * size + size)):
            for j in range(d_sae):
                value = z[row, j]
                active = value > zero
                kept = value if active else zero
                z[row, j] = kept
                sums[group, j] += kept
                counts[group, j] += one if active else zero


@compiled
def relu_backward(first: int, last: int, size: int, grad: Array, acts: Array, sums: Array) -> None:
    """The gradient is kept where the latent is active; by group, its sums."""
    zero = grad.dtype.type(0)
    n, d_sae = grad.shape
    for group in range(first, last):
        sums[group, :] = zero
        for row in range(group * size, min(n, group * size + size)):
            for j in range(d_sae):
                kept = grad[row, j] if acts[row, j] > zero else zero
                grad[row, j] = kept
                sums[group, j] += kept


@compiled
def jump_forward(
    first: int, last: int, size: int, z: Array, theta: Array, half: float, counts: Array, row_counts: Array,
    row_entries: Array,
) -> None:  # fmt: skip
    """z becomes z H(z - theta), with -0.0 for what is inactive and near.

    Counts the active ones by group and by row, and those active or near by row.
    """
    zero, one, minus_zero = z.dtype.type(0), z.dtype.type(1), z.dtype.type(-0.0)
    n, d_sae = z.shape
    for group in range(first, last):
        counts[group, :] = zero
        for row in range(group * size, min(n, group * size + size)):
            in_row, entries = zero, zero
            for j in range(d_sae):
                value = z[row, j]
                active = value > theta[j]
                near = value > theta[j] - half
                inactive = minus_zero if near else zero
                z[row, j] = value if active else inactive
                counts[group, j] += one if active else zero
                in_row += one if active else zero
                entries += one if near else zero
            row_counts[row] = in_row
            row_entries[row] = entries


@compiled
def jump_backward(
    first: int, last: int, size: int, grad: Array, acts: Array, bits: Array, minus_zero: int, theta: Array, half: float,
    per_width: float, penalty: Array, sums: Array, theta_sums: Array,
) -> None:  # fmt: skip
    """The gradient of z in the place of that of the latents; by group, its sums and the thresholds' gradient.

    `bits` are those of `acts` as integers. `penalty` `[n]` is the derivative of the sparsity term by the L0 of each row.
    """
    zero = grad.dtype.type(0)
    n, d_sae = grad.shape
    for group in range(first, last):
        sums[group, :] = zero
        theta_sums[group, :] = zero
        for row in range(group * size, min(n, group * size + size)):
            of_row = penalty[row]
            for j in range(d_sae):
                slope, act = grad[row, j], acts[row, j]
                active = act > zero
                near = bits[row, j] == minus_zero
                if active:
                    near = act - theta[j] < half
                through = (theta[j] * slope + of_row) * per_width  # found for all: the loop has no branch then
                kept = slope if active else zero
                grad[row, j] = kept
                sums[group, j] += kept
                theta_sums[group, j] -= through if near else zero


@compiled
def residual(
    first: int, last: int, size: int, recon: Array, x: Array, scale: float, squares: Array, sums: Array
) -> None:
    """recon becomes scale (recon - x); squared errors by row; by group, the sums of the scaled differences."""
    zero = recon.dtype.type(0)
    n, d_in = recon.shape
    for group in range(first, last):
        sums[group, :] = zero
        for row in range(group * size, min(n, group * size + size)):
            square = zero
            for k in range(d_in):
                difference = recon[row, k] - x[row, k]
                square += difference * difference
                recon[row, k] = difference * scale
                sums[group, k] += difference * scale
            squares[row] = square
