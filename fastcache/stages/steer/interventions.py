"""What is done to the residual stream x `[n, d_in]` in the name of latents; all else in it stays what it was."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcache.llm.splicing import Replace
from fastcache.sae.architectures import Sae
from fastcache.sae.storage import load_sae


def add(sae: Sae, latents: Sequence[int], alpha: float) -> Replace:
    """x + alpha d_k, summed over the latents k; d_k is row k of W_dec (the FAST paper, section 5)."""
    shift = alpha * sae.W_dec[list(latents)].sum(0)
    return lambda x: x + shift


def clamp(sae: Sae, latents: Sequence[int], value: float) -> Replace:
    """x + (value - f_k(x)) d_k: what x would be, had the latents this activation. With 0 the latents are ablated."""
    chosen = list(latents)
    directions = sae.W_dec[chosen]

    def replace(x: Tensor) -> Tensor:
        return torch.addmm(x, value - sae.encode(x)[:, chosen], directions)

    return replace


def make(sae: Sae, mode: str, latents: Sequence[int], alpha: float) -> Replace:
    """The intervention of `--mode`."""
    if mode == "add":
        return add(sae, latents, alpha)
    return clamp(sae, latents, 0.0 if mode == "ablate" else alpha)


def make_in_worker(argument: dict[str, Any], device: str) -> Replace:
    """The same where only words and numbers arrive: `argument` has the SAE's folder as `sae`, mode, latents and alpha."""
    sae = _loaded(argument["sae"], device)
    return make(sae, argument["mode"], argument["latents"], argument["alpha"])


@lru_cache(maxsize=1)
def _loaded(folder: str, device: str) -> Sae:
    return load_sae(Path(folder))[0].to(device)
