"""The two recipes: what a setting is where the user leaves it out. A resolved recipe has no gaps and stands in sae.json."""

from dataclasses import asdict, dataclass
from typing import Any

from fastcache.errors import InputError
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.together import WITH_K, check_learning_rate, check_options

PAPER_TOKENS = 40_960_000
MODERN_STEPS = 1_000
"""A modern run has at least so many steps: of a small cache its batches are smaller, and then it takes several passes."""
SMALLEST_BATCH = 256
MODERN_L0 = 64

PAPER_LAMBDA = {"standard": 5.0, "jumprelu": 0.01}
MODERN_L1 = {"standard": 0.1, "gated": 0.6}
"""Times sqrt(d_in), as which latents of scaled activations grow."""
MODERN_L0_COEFFICIENT = 0.5
"""Times d_in / target: L0 then ends above its target by about half the FVU, whatever the two are."""

FAST_PAPER: dict[str, Any] = {
    "batch_size": 128, "lr": 7e-5, "lr_warm_up": 0.05, "lr_decay": 0.2, "coefficient_warm_up": 0.03125,
    "scale_activations": False, "init": "kaiming", "decoder_norm": "unit", "theta": "log", "theta_lr": 1.0, "threshold": 0.001,
    "bandwidth": 0.001, "aux_coefficient": 0.0, "dead_window": 1000,
}  # fmt: skip
MODERN: dict[str, Any] = {
    "batch_size": 4096, "lr_warm_up": 0.05, "lr_decay": 0.2, "coefficient_warm_up": 0.05, "scale_activations": True,
    "init": "tied", "decoder_norm": "unit", "theta": "direct", "theta_lr": 1.0, "bandwidth": 1.0, "aux_coefficient": 1 / 32,
    "dead_window": 250,
}  # fmt: skip
NORM_WEIGHTED = ("standard", "gated")
"""Those with an L1 penalty: it is what the norms matter to. The others keep unit rows, which fix the scale of their latents."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights of one SAE, besides the stream of its batches."""

    name: str
    arch: str
    d_in: int
    d_sae: int
    steps: int
    batch_size: int
    lr: float
    lr_end: float
    lr_warm_up: float
    lr_decay: float
    coefficient: float
    coefficient_warm_up: float
    target_l0: float | None
    k: int | None
    widths: tuple[int, ...]
    scale_activations: bool
    init: str
    decoder_norm: str
    theta: str
    theta_lr: float
    """Learning rate of the thresholds, in those of the weights."""
    threshold: float | None
    """None: found from a sample of activations."""
    bandwidth: float
    aux_coefficient: float
    dead_window: int
    clip_norm: float
    precision: str
    plain: bool
    seed: int

    def as_json(self) -> dict[str, Any]:
        """JSON-ready, without what the architecture doesn't have."""
        left_out = {"name"} if self.arch == "jumprelu" else {"name", "theta", "theta_lr", "threshold", "bandwidth"}
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name not in left_out and value not in (None, ())
        }
        return {"recipe": self.name, **values}


def resolve(config: TrainConfig, d_in: int, n_rows: int) -> Recipe:
    """Fill the gaps of `config` for a cache of `n_rows` rows `[d_in]`; raises `InputError` for what doesn't go together."""
    check_options(config)
    paper = config.recipe == "fast-paper"
    d_sae = config.expansion * d_in
    chosen = dict(FAST_PAPER if paper else MODERN)
    if not paper:
        chosen["lr"] = 2e-4 / (d_sae / 2**14) ** 0.5  # Gao et al. 2024, figure 3
        chosen["threshold"] = None
        # Pre-activations are sums of d_in terms; thresholds at the weights' rate would lag behind them.
        chosen["theta_lr"] = d_in**0.5
        while chosen["batch_size"] > max(SMALLEST_BATCH, n_rows // MODERN_STEPS):
            chosen["batch_size"] //= 2
        chosen["decoder_norm"] = "free" if config.arch in NORM_WEIGHTED else "unit"
    if config.arch == "gated":
        chosen["aux_coefficient"] = 0.0
    chosen |= {name: value for name in chosen if (value := getattr(config, name)) is not None}
    end = chosen["lr"] / 10 if paper else chosen["lr"]
    few = max(1, min(MODERN_L0, d_in // 4))
    target = config.target_l0 if paper or config.arch != "jumprelu" else config.target_l0 or float(few)
    k = (config.k or few) if config.arch in WITH_K else None
    widths = config.widths or tuple(d_sae // part for part in (16, 4, 2, 1) if d_sae // part)
    for name, value in (("k", k), ("target-l0", target)):
        if value is not None and value > d_sae:
            raise InputError(f"--{name} {value:g} is more than d_sae, {d_sae}.")
    if config.lr_end is not None:
        end = config.lr_end
    check_learning_rate(chosen["lr"], end, chosen["lr_warm_up"], chosen["lr_decay"])
    return Recipe(
        name=config.recipe, arch=config.arch, d_in=d_in, d_sae=d_sae, lr_end=end, target_l0=target, k=k,
        steps=_steps(config, n_rows, chosen["batch_size"]), coefficient=_coefficient(config, d_in, target),
        widths=_checked_widths(widths, d_sae) if config.arch == "matryoshka" else (), clip_norm=config.clip_norm,
        precision=config.precision, plain=config.plain, seed=config.seed, **chosen,
    )  # fmt: skip


def _checked_widths(widths: tuple[int, ...], d_sae: int) -> tuple[int, ...]:
    if list(widths) != sorted(set(widths)) or widths[-1] > d_sae:
        shown = ", ".join(map(str, widths))
        raise InputError(f"--widths {shown}: expected rising numbers up to d_sae, {d_sae}.")
    return widths


def _coefficient(config: TrainConfig, d_in: int, target_l0: float | None) -> float:
    if config.coefficient is not None:
        return config.coefficient
    if config.recipe == "fast-paper":
        return PAPER_LAMBDA[config.arch]
    if config.arch == "jumprelu":
        return MODERN_L0_COEFFICIENT * d_in / (target_l0 or 1.0)
    return MODERN_L1.get(config.arch, 0.0) * d_in**0.5


def _steps(config: TrainConfig, n_rows: int, batch_size: int) -> int:
    if config.tokens is not None:
        if config.tokens < batch_size:
            raise InputError(f"--tokens {config.tokens} is less than one batch of {batch_size}.")
        return config.tokens // batch_size
    one_pass = min(n_rows, PAPER_TOKENS) // batch_size
    return max(1, one_pass) if config.recipe == "fast-paper" else max(MODERN_STEPS, one_pass)
