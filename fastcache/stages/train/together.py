"""Which settings of `train` go together. Each value is in its range already; what is wrong here is their combination."""

from fastcache.errors import InputError
from fastcache.stages.train.config import TrainConfig

PAPER_ARCHES = ("standard", "jumprelu")
WITH_K = ("topk", "batchtopk", "matryoshka")
ONLY_OF = {
    **dict.fromkeys(("target_l0", "theta", "theta_lr", "threshold", "bandwidth"), ("jumprelu",)),
    "k": WITH_K,
    "widths": ("matryoshka",),
}
"""The architectures that use an option, where not all do."""


def check_options(config: TrainConfig) -> None:
    """Raise `InputError` for options that contradict each other, or that the architecture doesn't use."""
    if config.recipe == "fast-paper" and config.arch not in PAPER_ARCHES:
        raise InputError(
            f"--recipe fast-paper is for the paper's architectures, standard and jumprelu; {config.arch} is not one of "
            "them. Leave --recipe out: modern has all."
        )
    for name, arches in ONLY_OF.items():
        if getattr(config, name) not in (None, ()) and config.arch not in arches:
            raise InputError(
                f"{_flag(name)} is an option of --arch {' and '.join(arches)}, not of {config.arch}. Leave it out."
            )
    if config.plain and config.precision != "float32":
        raise InputError(
            f"--plain multiplies in float32, and --precision {config.precision} was asked for. Leave one out."
        )
    for name in ("coefficient", "coefficient_warm_up"):
        if getattr(config, name) and config.arch in WITH_K:
            raise InputError(
                f"{_flag(name)} means nothing to {config.arch}, which has no sparsity penalty. Set --k instead."
            )
    if config.arch == "gated" and config.aux_coefficient:
        raise InputError("--aux-coefficient means nothing to gated, which has no auxiliary loss. Leave it out.")
    if config.target_l0 is not None and config.coefficient == 0:
        raise InputError(
            f"--coefficient 0 leaves out the penalty that leads L0 to --target-l0 {config.target_l0:g}. Leave one out."
        )


def check_learning_rate(peak: float, end: float, warm_up: float, decay: float) -> None:
    """Raise `InputError` for a learning rate that would end above its peak, or rise and fall at the same time."""
    if end > peak:
        raise InputError(f"--lr-end {end:g} is above the peak learning rate, {peak:g}. Raise --lr, or lower --lr-end.")
    if warm_up + decay > 1 + 1e-9:
        raise InputError(
            f"--lr-warm-up {warm_up:g} and --lr-decay {decay:g} are shares of the steps, together {warm_up + decay:g} of "
            "them: the learning rate would jump. Let them add up to 1 at most."
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
