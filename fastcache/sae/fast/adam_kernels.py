"""Compiled passes over parameters: the norm of the gradients, and Adam with all that surrounds it."""

from math import sqrt
from typing import Any

from fastcache.sae.fast.threads import compiled

Array = Any


@compiled
def squared_norms(first: int, last: int, grads: Array, squares: Array) -> None:
    """Of each row of `grads`."""
    for i in range(first, last):
        square = grads.dtype.type(0)
        for k in range(grads.shape[1]):
            square += grads[i, k] * grads[i, k]
        squares[i] = square


@compiled
def adam(
    first: int, last: int, weights: Array, grads: Array, mean: Array, square: Array, scale: float, rest1: float,
    rest2: float, rate: float, correction: float, eps: float, unit_rows: bool,
) -> None:  # fmt: skip
    """A step of Adam (Kingma and Ba 2014) on rows, with gradients times `scale`.

    `rest1` is 1 - beta1, `rate` lr / (1 - beta1^t), `correction` sqrt(1 - beta2^t). `unit_rows`: of the gradient, what is
    orthogonal to the row is used, and the row is scaled back to unit norm.
    """
    zero, one = weights.dtype.type(0), weights.dtype.type(1)
    d = weights.shape[1]
    for i in range(first, last):
        weight, grad, m, v = weights[i], grads[i], mean[i], square[i]
        parallel = zero
        if unit_rows:
            for k in range(d):
                parallel += grad[k] * weight[k]
        norm = zero
        for k in range(d):
            g = scale * (grad[k] - parallel * weight[k])
            m[k] += rest1 * (g - m[k])
            v[k] += rest2 * (g * g - v[k])
            weight[k] -= rate * m[k] / (sqrt(v[k]) / correction + eps)
            norm += weight[k] * weight[k]
        if unit_rows:
            norm = one / sqrt(norm)
            for k in range(d):
                weight[k] *= norm
