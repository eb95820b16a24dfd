"""Compiled passes over the active latents alone: after the encoder's product a step needs nothing else.

Entries are the latents above `low`, the lower edge of the band that has a gradient. Those of a group of rows lie together,
in a stretch of `capacity` places of its own, so that groups can be filled side by side; then they are sorted by latent, by
counting, in the order of the rows. No two threads ever add to the same number: the result is the same in every run.
"""

from typing import Any

from fastcache.sae.fast.threads import compiled

Array = Any
BLOCK = 16
"""Pre-activations that are looked at together: most blocks hold nothing."""


@compiled
def extract(
    first: int, last: int, size: int, capacity: int, z: Array, low: Array, theta: Array, ends: Array, latents: Array,
    values: Array, counts: Array, row_counts: Array, full: Array,
) -> None:  # fmt: skip
    """Entries of each group: latent, and z where it is active, else 0. `ends[row]` is where the row's entries end.

    `counts` `[n_groups, d_sae]` are of entries, `row_counts` `[n]` of active ones. A group that doesn't fit is `full`.
    """
    zero, one = z.dtype.type(0), z.dtype.type(1)
    n, d_sae = z.shape
    for group in range(first, last):
        counts[group, :] = 0
        place, limit = group * capacity, (group + 1) * capacity
        full[group] = False
        for row in range(group * size, min(n, group * size + size)):
            in_row = zero
            for start in range(0, d_sae, BLOCK):
                stop = min(d_sae, start + BLOCK)
                found = 0
                for j in range(start, stop):
                    found += 1 if z[row, j] > low[j] else 0
                if found == 0:
                    continue
                if place + found > limit:
                    full[group] = True
                    break
                for j in range(start, stop):
                    value = z[row, j]
                    if value > low[j]:
                        active = value > theta[j]
                        latents[place] = j
                        values[place] = value if active else zero
                        in_row += one if active else zero
                        counts[group, j] += 1
                        place += 1
            ends[row] = place
            row_counts[row] = in_row


@compiled
def offsets(counts: Array, starts: Array) -> None:
    """`counts` `[n_groups, d_sae]` become the places at which each group's entries begin when sorted by latent.

    `starts` `[d_sae + 1]`: where each latent's entries begin.
    """
    n_groups, d_sae = counts.shape
    starts[:] = 0
    for group in range(n_groups):
        for j in range(d_sae):
            starts[j + 1] += counts[group, j]
    for j in range(d_sae):
        starts[j + 1] += starts[j]
    for j in range(d_sae):
        place = starts[j]
        for group in range(n_groups):
            count = counts[group, j]
            counts[group, j] = place
            place += count


@compiled
def decode(
    first: int, last: int, size: int, capacity: int, ends: Array, latents: Array, values: Array, W_dec: Array, b_dec: Array,
    x: Array, scale: float, places: Array, errors: Array, squares: Array, by_latent_row: Array, by_latent_value: Array,
    by_latent_grad: Array,
) -> None:  # fmt: skip
    """Of each row: errors = scale (recon - x), its squared error, and the gradient of each entry; sorts the entries."""
    zero = x.dtype.type(0)
    n, d_in = x.shape
    for group in range(first, last):
        begin = group * capacity
        for row in range(group * size, min(n, group * size + size)):
            end = ends[row]
            error = errors[row]
            for k in range(d_in):
                error[k] = b_dec[k] - x[row, k]
            for entry in range(begin, end):
                value, direction = values[entry], W_dec[latents[entry]]
                if value > zero:
                    for k in range(d_in):
                        error[k] += value * direction[k]
            square = zero
            for k in range(d_in):
                square += error[k] * error[k]
                error[k] *= scale
            squares[row] = square
            for entry in range(begin, end):
                latent = latents[entry]
                direction = W_dec[latent]
                grad = zero
                for k in range(d_in):
                    grad += error[k] * direction[k]
                place = places[group, latent]
                places[group, latent] = place + 1
                by_latent_row[place] = row
                by_latent_value[place] = values[entry]
                by_latent_grad[place] = grad
            begin = end


@compiled
def relu_columns(
    first: int, last: int, starts: Array, rows: Array, values: Array, grads: Array, errors: Array, x: Array, penalty: Array,
    grad_dec: Array, grad_enc: Array, sums: Array, grad_sums: Array, counts: Array,
) -> None:  # fmt: skip
    """Gradients of each latent's weights, from its entries. `penalty` `[d_sae]` is added to every entry's gradient."""
    zero = x.dtype.type(0)
    d_in = x.shape[1]
    for j in range(first, last):
        dec, enc = grad_dec[j], grad_enc[j]
        dec[:] = zero
        enc[:] = zero
        total, grad_total = zero, zero
        for entry in range(starts[j], starts[j + 1]):
            value, grad = values[entry], grads[entry] + penalty[j]
            error, activation = errors[rows[entry]], x[rows[entry]]
            for k in range(d_in):
                dec[k] += value * error[k]
                enc[k] += grad * activation[k]
            total += value
            grad_total += grad
        sums[j] = total
        grad_sums[j] = grad_total
        counts[j] = starts[j + 1] - starts[j]


@compiled
def jump_columns(
    first: int, last: int, starts: Array, rows: Array, values: Array, grads: Array, errors: Array, x: Array, theta: Array,
    half: float, per_width: float, penalty: Array, grad_dec: Array, grad_enc: Array, theta_grads: Array, grad_sums: Array,
    counts: Array,
) -> None:  # fmt: skip
    """The same for latents with thresholds; `penalty` `[n]` as in `dense_kernels.jump_backward`."""
    zero = x.dtype.type(0)
    d_in = x.shape[1]
    for j in range(first, last):
        dec, enc = grad_dec[j], grad_enc[j]
        dec[:] = zero
        enc[:] = zero
        theta_grad, grad_total, n_active = zero, zero, 0
        for entry in range(starts[j], starts[j + 1]):
            row, value, grad = rows[entry], values[entry], grads[entry]
            if value - theta[j] < half:  # the inactive ones are 0, and near
                theta_grad -= (theta[j] * grad + penalty[row]) * per_width
            if value > zero:
                error, activation = errors[row], x[row]
                for k in range(d_in):
                    dec[k] += value * error[k]
                    enc[k] += grad * activation[k]
                grad_total += grad
                n_active += 1
        theta_grads[j] = theta_grad
        grad_sums[j] = grad_total
        counts[j] = n_active
