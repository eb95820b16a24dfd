"""What a trained SAE is worth on rows that it was trained on: the figures that `train` ends with.

Those of the log are of training batches, in training mode, and before the last step: BatchTopK picks latents by batch there,
and the SAE that is saved by a threshold.
"""

from typing import Any

import torch
from torch import Tensor

from fastcache.sae.architectures import Sae
from fastcache.sae.spread import NEGLIGIBLE

ROWS_AT_A_TIME = 1024


@torch.no_grad()
def saved_figures(sae: Sae, sample: Tensor) -> dict[str, Any]:
    """L0, MSE and FVU of `sae`, as it is saved, on `sample` `[n, d_in]` of unscaled activations.

    mse = sum |x - recon|^2 / (n d_in), in squared units of the activations; fvu = sum |x - recon|^2 / sum |x - mean|^2,
    None where all rows are equal but for rounding. Sums are made in float64. `saved_sae_rows` is n.
    """
    squared_error, spread, power, n_active = 0.0, 0.0, 0.0, 0
    mean = sample.mean(0, dtype=torch.double)
    for x in sample.split(ROWS_AT_A_TIME):
        acts = sae.encode(x)
        n_active += int((acts > 0).sum())
        squared_error += float((sae.decode(acts) - x).double().square().sum())
        spread += float((x.double() - mean).square().sum())
        power += float(x.double().square().sum())
    n = len(sample)
    return {
        "saved_sae_rows": n,
        "l0": n_active / n,
        "mse": squared_error / (n * sae.d_in),
        "fvu": squared_error / spread if spread > NEGLIGIBLE * power else None,
    }
