"""Settings of `fastcache train`. Where one is left out, the recipe says it (`recipe.py`)."""

from dataclasses import dataclass

from fastcache.config import Settings, option

FREE_ON_RESUME = ("cache", "checkpoint_every", "keep_checkpoints", "device", "on_corrupt")
"""Settings that may differ on resume: the cache goes by its fingerprint, so that it may be moved."""

ARCHES = ("standard", "jumprelu", "topk", "batchtopk", "gated", "matryoshka")
RECIPES = ("modern", "fast-paper")
TOKENS_OF = ("all", "content", "special", "assistant", "reasoning")
LARGEST_SEED = 2**63 - 1
LARGEST_EXPANSION = 2**16


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How one SAE is trained."""

    cache: str = option(help="Cache made by `fastcache extract`.")
    arch: str = option(choices=ARCHES, help="Architecture.")
    recipe: str = option(
        "modern",
        choices=RECIPES,
        help="What the options below are where they are left out: modern, for a good SAE; fast-paper, as in the FAST paper.",
    )
    layer: int | None = option(None, help="Layer to train on; needed where the cache holds several.", at_least=0)
    expansion: int = option(8, help="d_sae = expansion * d_in.", at_least=1, at_most=LARGEST_EXPANSION)
    target_l0: float | None = option(
        None,
        help="jumprelu: active latents a token to aim at. modern: 64, at most d_in / 4; fast-paper: none.",
        at_least=1,
    )
    k: int | None = option(
        None, help="topk, batchtopk, matryoshka: active latents a token. Default: 64, at most d_in / 4.", at_least=1
    )
    widths: tuple[int, ...] = option(
        (), help="matryoshka: width of a prefix. Repeatable. Default: d_sae / 16, / 4, / 2, all.", at_least=1
    )
    coefficient: float | None = option(
        None, help="Sparsity coefficient. fast-paper: 5 standard, 0.01 jumprelu; modern: see docs/train.md.", at_least=0
    )
    tokens: int | None = option(
        None,
        help="Training tokens. fast-paper: one pass over the cache; modern: so too, but 1,000 steps at least. "
        "At most the paper's 40,960,000.",
        at_least=1,
    )
    batch_size: int | None = option(
        None, help="Tokens of a batch. modern: 4,096, less for a cache of under 4M tokens; fast-paper: 128.", at_least=1
    )
    lr: float | None = option(
        None, help="Peak learning rate. modern: 2e-4 / sqrt(d_sae / 16,384); fast-paper: 7e-5.", at_least=1e-12
    )
    lr_end: float | None = option(
        None, help="Learning rate at the end of the cosine. modern: as at its peak; fast-paper: a tenth.", at_least=0
    )
    lr_warm_up: float | None = option(
        None, help="Share of the steps with rising learning rate. Default: 0.05.", at_least=0, at_most=1
    )
    lr_decay: float | None = option(
        None, help="Share of the steps, at the end, over which it falls to 0. Default: 0.2.", at_least=0, at_most=1
    )
    coefficient_warm_up: float | None = option(
        None, help="Share of the steps over which it rises from 0. modern: 0.05; fast-paper: 0.03125.",
        at_least=0, at_most=1,
    )  # fmt: skip
    scale_activations: bool | None = option(
        None, help="Train on activations scaled to a mean squared norm of d_in; undone in the saved SAE. modern: yes."
    )
    init: str | None = option(
        None,
        choices=("kaiming", "tied"),
        help="Initial weights: kaiming (fast-paper), or the encoder as the decoder's transpose (modern).",
    )
    decoder_norm: str | None = option(
        None,
        choices=("unit", "free"),
        help="Decoder rows of norm 1, or free with norms weighting the L1 penalty. modern: free for standard and gated.",
    )
    theta: str | None = option(
        None,
        choices=("direct", "log"),
        help="jumprelu: train the thresholds (modern) or their logarithms (fast-paper).",
    )
    theta_lr: float | None = option(
        None,
        help="jumprelu: learning rate of the thresholds, times --lr. modern: sqrt(d_in); fast-paper: 1.",
        at_least=0,
    )
    threshold: float | None = option(
        None, help="jumprelu: initial threshold. modern: such that target-l0 latents are active; fast-paper: 0.001.",
        at_least=1e-12,
    )  # fmt: skip
    bandwidth: float | None = option(
        None, help="jumprelu: kernel bandwidth of the gradients. modern: 1; fast-paper: 0.001.", at_least=1e-12
    )
    aux_coefficient: float | None = option(
        None, help="Coefficient of the auxiliary loss for dead latents. modern: 1/32, not for gated; fast-paper: 0.",
        at_least=0,
    )  # fmt: skip
    dead_window: int | None = option(
        None, help="A latent is dead when it did not fire for so many steps. modern: 250; fast-paper: 1000.", at_least=1
    )
    clip_norm: float = option(1.0, help="Largest norm of the gradient; 0 clips nothing.", at_least=0)
    tokens_of: str = option(
        "all",
        choices=TOKENS_OF,
        help="Train on all tokens, on contents, on special tokens, or on contents of the assistant's turns.",
    )
    skip_first_position: bool = option(False, help="Leave out the first token of every sequence.")
    norm_filter: str | None = option(
        None, help="Leave out tokens whose norm is above so many times the median, for example 10x-median."
    )
    buffer_tokens: int = option(1_048_576, help="Rows of the mixing buffer.", at_least=1)  # docs/benchmarks/shuffle.md
    seed: int = option(42, help="Seed of weights and shuffle.", at_least=0, at_most=LARGEST_SEED)
    shuffle_seed: int | None = option(
        None, help="Seed of the shuffle, where it is to be another than --seed.", at_least=0, at_most=LARGEST_SEED
    )
    precision: str = option(
        "float32",
        choices=("float32", "tf32", "bf16"),
        help="Least precision of matrix products; the fastest that this machine has is used. Weights are float32.",
    )
    plain: bool = option(False, help="Leave out the fast steps: the architecture's equations and torch's Adam.")
    device: str | None = option(None, help="Device to train on. Default: cuda where there is one, else cpu.")
    on_corrupt: str = option(
        "stop",
        choices=("stop", "skip"),
        help="At a damaged unit of the cache: stop, or leave its rows out and count them.",
    )
    checkpoint_every: int = option(5000, help="Steps between checkpoints.", at_least=1)
    keep_checkpoints: int = option(2, help="How many checkpoints are kept, the newest.", at_least=1, at_most=10_000)
    log_every: int = option(50, help="Steps between lines of the metrics log.", at_least=1)

    @property
    def stream_seed(self) -> int:
        """Seed of the order of the rows."""
        return self.seed if self.shuffle_seed is None else self.shuffle_seed


@dataclass(frozen=True)
class ShuffleConfig(Settings):
    """Which batches `fastcache inspect --shuffle` measures."""

    batch_size: int = option(4096, help="With --shuffle: tokens of a batch.", at_least=1)
    buffer_tokens: int = option(
        TrainConfig.buffer_tokens, help="With --shuffle: rows of the mixing buffer.", at_least=1
    )
    seed: int = option(TrainConfig.seed, help="With --shuffle: seed of the shuffle.", at_least=0, at_most=LARGEST_SEED)
