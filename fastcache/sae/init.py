"""Initialisation (docs/train.md): unit decoder rows, b_dec the geometric median; thresholds from a sample."""

import torch
from torch import Tensor

from fastcache.sae.architectures import GatedSae, JumpReluSae, Sae

MEDIAN_EPS = 1e-6
MEDIAN_FTOL = 1e-20
MEDIAN_MAX_STEPS = 100
THRESHOLD_ROWS = 4096
THRESHOLD_LATENTS = 1024
"""Latents whose pre-activations are held at a time."""


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
def initialise(sae: Sae, median: Tensor, generator: torch.Generator, tied: bool = False) -> None:
    """Fill the parameters of a new SAE; b_dec becomes `median` `[d_in]`, the geometric median of the activations.

    Weights are Kaiming uniform and decoder rows are then scaled to norm 1, as in the FAST paper's appendix A. For JumpReLU
    it multiplies encoder and thresholds by the norms that the rows had, so that the SAE's function stays what it was; the
    encoders of the others stay as they are. `tied`: the encoder is the transpose of the decoder with unit rows (Gao et al.
    2024, appendix A.1), and its biases are such that it sees x - b_dec.
    """
    torch.nn.init.kaiming_uniform_(sae.W_enc, generator=generator)
    torch.nn.init.kaiming_uniform_(sae.W_dec, generator=generator)
    norms = sae.W_dec.norm(dim=1)
    for name in sae.latent_parameters:
        if name.startswith("b_"):
            getattr(sae, name).zero_()
    sae.W_dec.div_(norms[:, None])
    sae.b_dec.copy_(median)
    if tied:
        sae.W_enc.copy_(sae.W_dec.T)
        for name in ("b_gate", "b_mag") if isinstance(sae, GatedSae) else ("b_enc",):
            getattr(sae, name).copy_(-(sae.b_dec @ sae.W_enc))
    elif isinstance(sae, JumpReluSae):
        sae.W_enc.mul_(norms)
        sae.set_threshold(sae.theta * norms)


@torch.no_grad()
def thresholds_for(sae: Sae, sample: Tensor, l0: float) -> Tensor:
    """Thresholds `[d_sae]`, at least 0, with which each latent is active on the share l0 / d_sae of `sample` `[n, d_in]`."""
    rows = sample[torch.linspace(0, len(sample) - 1, min(THRESHOLD_ROWS, len(sample))).long()]
    share = 1 - min(1.0, l0 / sae.d_sae)
    found = []
    for start in range(0, sae.d_sae, THRESHOLD_LATENTS):
        some = slice(start, start + THRESHOLD_LATENTS)
        found.append(_quantile((rows @ sae.W_enc[:, some] + sae.b_enc[some]).T, share))
    return torch.cat(found).clamp(min=0)


def _quantile(values: Tensor, share: float) -> Tensor:
    """torch's `quantile` of each row of `values` `[m, n]`, by selection: torch sorts, which takes ten times as long."""
    place = share * (values.shape[1] - 1)
    below = int(place)
    low, high = (values.kthvalue(1 + min(k, values.shape[1] - 1)).values for k in (below, below + 1))
    return low.lerp(high, place - below)
