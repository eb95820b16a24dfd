"""Passes over `[n, d_sae]` and over parameters on a GPU: what `dense_kernels` and `adam_kernels` are on a CPU.

A program has the columns of one tile and the rows of one group. Sums over the batch are made within a group, in
`[n_groups, columns]`, and added up afterwards, always in the same order. Arithmetic is in float32, whatever the arrays hold.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(row, n, column, d):
    """Places of a tile in a `[n, d]` array, and which of them are inside it."""
    return row[:, None].to(tl.int64) * d + column[None, :], (row < n)[:, None] & (column < d)[None, :]


@triton.jit
def relu_forward(z, sums, counts, n, d, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """z becomes ReLU(z); by group, the sums of the latents and how often they are active."""
    group = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total, active = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for first in range(group * size, group * size + size, ROWS):
        place, inside = _tile(first + tl.arange(0, ROWS), n, column, d)
        value = tl.load(z + place, inside, 0.0).to(tl.float32)
        kept = tl.where(value > 0, value, 0.0)
        tl.store(z + place, kept, inside)
        total += tl.sum(kept, 0)
        active += tl.sum((value > 0).to(tl.float32), 0)
    tl.store(sums + group * d + column, total, column < d)
    tl.store(counts + group * d + column, active, column < d)


@triton.jit
def relu_backward(grad, acts, sums, n, d, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The gradient is kept where the latent is active; by group, its sums."""
    group = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(group * size, group * size + size, ROWS):
        place, inside = _tile(first + tl.arange(0, ROWS), n, column, d)
        act = tl.load(acts + place, inside, 0.0)
        kept = tl.where(act > 0, tl.load(grad + place, inside, 0.0).to(tl.float32), 0.0)
        tl.store(grad + place, kept, inside)
        total += tl.sum(kept, 0)
    tl.store(sums + group * d + column, total, column < d)


@triton.jit
def jump_forward(
    z, theta, half, counts, row_counts, row_entries, n, d, size,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """z becomes z H(z - theta), with -0.0 for what is inactive and near.

    Counts the active ones by group, and by tile and row, and those active or near by tile and row.
    """
    tile, group = tl.program_id(0), tl.program_id(1)
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    threshold = tl.load(theta + column, column < d, float("inf")).to(tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in range(group * size, group * size + size, ROWS):
        row = first + tl.arange(0, ROWS)
        place, inside = _tile(row, n, column, d)
        value = tl.load(z + place, inside, 0.0).to(tl.float32)
        active = (value > threshold[None, :]) & inside
        near = (value > threshold[None, :] - half) & inside
        tl.store(z + place, tl.where(active, value, tl.where(near, -0.0, 0.0)), inside)
        total += tl.sum(active.to(tl.float32), 0)
        tl.store(row_counts + tile * n + row, tl.sum(active.to(tl.float32), 1), row < n)
        tl.store(row_entries + tile * n + row, tl.sum(near.to(tl.float32), 1), row < n)
    tl.store(counts + group * d + column, total, column < d)


@triton.jit
def jump_backward(
    grad, acts, theta, half, per_width, penalty, sums, theta_sums,
    n, d, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of z in the place of that of the latents; by group, its sums and the thresholds' gradient.

    `penalty` `[n]` is the derivative of the sparsity term by the L0 of each row.
    """
    group = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    threshold = tl.load(theta + column, column < d, 0.0).to(tl.float32)
    total, of_theta = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for first in range(group * size, group * size + size, ROWS):
        row = first + tl.arange(0, ROWS)
        place, inside = _tile(row, n, column, d)
        slope = tl.load(grad + place, inside, 0.0).to(tl.float32)
        act = tl.load(acts + place, inside, 0.0).to(tl.float32)
        of_row = tl.load(penalty + row, row < n, 0.0).to(tl.float32)
        active = act > 0
        is_minus_zero = act.to(tl.int32, bitcast=True) == -2147483648
        near = tl.where(active, act - threshold[None, :] < half, is_minus_zero)
        kept = tl.where(active, slope, 0.0)
        tl.store(grad + place, kept, inside)
        total += tl.sum(kept, 0)
        through = (threshold[None, :] * slope + of_row[:, None]) * per_width
        of_theta -= tl.sum(tl.where(near & inside, through, 0.0), 0)
    tl.store(sums + group * d + column, total, column < d)
    tl.store(theta_sums + group * d + column, of_theta, column < d)


@triton.jit
def residual(
    recon,
    x,
    scale,
    squares,
    sums,
    n,
    d,
    size,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """recon becomes scale (recon - x); squared errors by group and column; by group, the sums of the scaled differences."""
    group = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    square, total = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for first in range(group * size, group * size + size, ROWS):
        place, inside = _tile(first + tl.arange(0, ROWS), n, column, d)
        difference = tl.load(recon + place, inside, 0.0).to(tl.float32) - tl.load(x + place, inside, 0.0).to(tl.float32)
        tl.store(recon + place, difference * scale, inside)
        square += tl.sum(difference * difference, 0)
        total += tl.sum(difference * scale, 0)
    tl.store(squares + group * d + column, square, column < d)
    tl.store(sums + group * d + column, total, column < d)


@triton.jit
def adam(
    weights, grads, mean, square, clip, rest1, rest2, rate, correction, eps,
    n_values, d, UNIT_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A step of Adam on one row of at most `COLUMNS` numbers; see `adam_kernels.adam`. `clip` holds the gradients' factor."""
    column = tl.arange(0, COLUMNS)
    place = tl.program_id(0).to(tl.int64) * d + column
    inside = (column < d) & (place < n_values)
    weight, g = tl.load(weights + place, inside, 0.0), tl.load(grads + place, inside, 0.0)
    if UNIT_ROWS:
        g -= tl.sum(g * weight, 0) * weight
    g *= tl.load(clip)
    m, v = tl.load(mean + place, inside, 0.0), tl.load(square + place, inside, 0.0)
    m += rest1 * (g - m)
    v += rest2 * (g * g - v)
    weight -= rate * m / (tl.sqrt(v) / correction + eps)
    if UNIT_ROWS:
        weight /= tl.sqrt(tl.sum(weight * weight, 0))
    tl.store(mean + place, m, inside)
    tl.store(square + place, v, inside)
    tl.store(weights + place, weight, inside)
