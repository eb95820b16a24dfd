"""Initialisation (docs/method.md): Kaiming uniform weights, unit decoder rows, b_dec the geometric median."""

import torch
from torch import Tensor

from fastcache.sae.architectures import JumpReluSae, Sae

MEDIAN_EPS = 1e-6
MEDIAN_FTOL = 1e-20
MEDIAN_MAX_STEPS = 100


def geometric_median(points: Tensor, max_steps: int = MEDIAN_MAX_STEPS) -> Tensor:
    """The point `[d]` with the least summed distance to `points` `[n, d]`, by Weiszfeld's iteration.

    Begins at the mean with weights 1; each step divides the weights by max(distance, eps) and takes the weighted
    mean; stops when the weighted objective changes by less than `MEDIAN_FTOL` of itself.
    """
    points = points.double()
    median, weights = points.mean(0), points.new_ones(len(points))
    objective = _weighted_distance(points, median, weights)
    for _ in range(max_steps):
        new_weights = weights / (points - median).norm(dim=1).clamp(min=MEDIAN_EPS)
        median = (new_weights[:, None] * points).sum(0) / new_weights.sum()
        previous, objective = objective, _weighted_distance(points, median, weights)
        if abs(previous - objective) <= MEDIAN_FTOL * objective:
            break
    return median.float()


def _weighted_distance(points: Tensor, median: Tensor, weights: Tensor) -> float:
    return float((weights * (points - median).norm(dim=1)).sum() / weights.sum())


@torch.no_grad()
def initialise(sae: Sae, sample: Tensor, generator: torch.Generator) -> None:
    """Fill the parameters of a new SAE; `sample` `[n, d_in]` holds activations for the geometric median.

    Making the decoder rows unit vectors folds their norms into the encoder and the thresholds, so that the SAE's
    function stays what it was.
    """
    torch.nn.init.kaiming_uniform_(sae.W_enc, generator=generator)
    torch.nn.init.kaiming_uniform_(sae.W_dec, generator=generator)
    norms = sae.W_dec.norm(dim=1)
    sae.W_enc.mul_(norms)
    sae.b_enc.zero_()
    sae.W_dec.div_(norms[:, None])
    if isinstance(sae, JumpReluSae):
        sae.log_threshold.add_(norms.log())
    sae.b_dec.copy_(geometric_median(sample))
