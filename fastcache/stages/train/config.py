"""Settings of `fastcache train`; the defaults are the paper's (docs/method.md), scaled to the length of the run."""

from dataclasses import dataclass
from typing import Any

from fastcache.config import option

PAPER_LAMBDA = {"standard": 5.0, "jumprelu": 0.01}

FREE_ON_RESUME = ("cache", "checkpoint_every", "device", "on_corrupt")
"""Settings that may differ on resume: the cache goes by its fingerprint, so that it may be moved."""


@dataclass(frozen=True)
class TrainConfig:
    """How one SAE is trained."""

    cache: str = option(help="Cache made by `fastcache extract`.")
    arch: str = option(choices=("standard", "jumprelu"), help="Architecture.")
    layer: int | None = option(None, help="Layer to train on; needed where the cache holds several.", at_least=0)
    expansion: int = option(8, help="d_sae = expansion * d_in.", at_least=1)
    coefficient: float | None = option(
        None, help="Sparsity coefficient. Default: 5 standard, 0.01 jumprelu.", at_least=0
    )
    tokens: int | None = option(
        None, help="Training tokens. Default: one pass over the cache, at most the paper's 40,960,000.", at_least=1
    )
    batch_size: int = option(128, help="Tokens of a batch.", at_least=1)
    lr: float = option(7e-5, help="Peak learning rate.", at_least=0)
    lr_end: float = option(7e-6, help="Learning rate at the end of the cosine.", at_least=0)
    lr_warm_up: float = option(0.05, help="Share of the steps with rising learning rate.", at_least=0, at_most=1)
    lr_decay: float = option(
        0.2, help="Share of the steps, at the end, over which it falls to 0.", at_least=0, at_most=1
    )
    coefficient_warm_up: float = option(
        0.03125, help="Share of the steps over which it rises from 0.", at_least=0, at_most=1
    )
    bandwidth: float = option(0.001, help="Kernel bandwidth of the jumprelu gradients.", at_least=1e-12)
    threshold: float = option(0.001, help="Initial threshold of the jumprelu latents.", at_least=1e-12)
    clip_norm: float = option(1.0, help="Largest norm of the gradient; 0 clips nothing.", at_least=0)
    buffer_tokens: int = option(1_048_576, help="Rows of the mixing buffer.", at_least=1)  # docs/benchmarks/shuffle.md
    dead_window: int = option(1000, help="A latent is dead when it did not fire for so many steps.", at_least=1)
    seed: int = option(42, help="Seed of weights and shuffle.", at_least=0)
    device: str | None = option(None, help="Device to train on. Default: cuda where there is one, else cpu.")
    on_corrupt: str = option(
        "stop",
        choices=("stop", "skip"),
        help="At a damaged unit of the cache: stop, or leave its rows out and count them.",
    )
    checkpoint_every: int = option(5000, help="Steps between checkpoints.", at_least=1)
    log_every: int = option(50, help="Steps between lines of the metrics log.", at_least=1)

    def resolved_coefficient(self) -> float:
        """Lambda, given or the paper's."""
        return PAPER_LAMBDA[self.arch] if self.coefficient is None else self.coefficient

    def identity(self) -> dict[str, Any]:
        """What of the settings stands in the SAE's own file."""
        names = ("expansion", "batch_size", "lr", "lr_end", "lr_warm_up", "lr_decay", "coefficient_warm_up")
        more = ("bandwidth", "threshold", "clip_norm", "buffer_tokens", "seed")
        values = {name: getattr(self, name) for name in (*names, *more)}
        return {**values, "coefficient": self.resolved_coefficient()}


@dataclass(frozen=True)
class ShuffleConfig:
    """Which batches `fastcache inspect --shuffle` measures."""

    batch_size: int = option(4096, help="With --shuffle: tokens of a batch.", at_least=1)
    buffer_tokens: int = option(
        TrainConfig.buffer_tokens, help="With --shuffle: rows of the mixing buffer.", at_least=1
    )
    seed: int = option(TrainConfig.seed, help="With --shuffle: seed of the shuffle.", at_least=0)
