"""What SAEs do to the language model: its loss with their reconstructions in the place of the residual stream.

The loss at a token is that of predicting the next one; it belongs to the sets of the token whose residual is replaced, and
the last token of a dialogue has none. Zero and mean ablation put zeros, or the mean of the evaluated tokens, in the place
of the whole stream: an SAE that recovers the loss fully has a `loss_recovered` of 1, one that is no better than the ablation 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastcache.cache_format.reader import CachedInstance
from fastcache.cache_format.schema import token_sets
from fastcache.llm.splicing import Replace, SplicedModel, kl_divergence
from fastcache.llm.vllm_backend.splicing import Losses, Splice, SplicedEngine
from fastcache.progress import Progress
from fastcache.sae.architectures import Sae
from fastcache.sae.bootstrap import Sums, resampled, with_intervals
from fastcache.sae.storage import load_sae

COLUMNS = ("n_tokens", "loss", "loss_zero", "loss_mean", "loss_spliced", "kl")
"""Sums over the tokens of a dialogue in a set."""
ROUNDING = 1e-6
"""Losses come from float32: a difference of a smaller share of the loss is none."""


@dataclass
class Spliced:
    """An SAE at its place in the model."""

    folder: Path
    sae: Sae
    hook_point: str
    dialogues: list[Sums] = field(default_factory=list)
    """`[sets, columns]` of each."""


def measure(
    saes: Sequence[Spliced],
    model: SplicedModel,
    means: dict[str, Tensor],
    instances: Sequence[CachedInstance],
    progress: Progress,
) -> None:
    """Run dialogues of two tokens or more: as they are, ablated at each hook point, and with each SAE; fills `saes`.

    `means` `[d_in]` by hook point.
    """
    with progress.task("evaluate with the model", len(instances), "dialogues") as task:
        for instance in instances:
            _measure_one(saes, model, means, instance.token_ids, token_sets(instance.token_types)[:, :-1])
            task.advance(1)


def _measure_one(
    saes: Sequence[Spliced],
    model: SplicedModel,
    means: dict[str, Tensor],
    ids: npt.NDArray[np.int32],
    masks: npt.NDArray[np.bool_],
) -> None:
    clean = model.log_probs(ids)[:-1]
    following = torch.from_numpy(ids[1:].astype(np.int64)).to(clean.device)

    def losses(log_probs: Tensor) -> Tensor:
        return -log_probs[: len(following)].gather(1, following[:, None])[:, 0].double()

    ablated: dict[str, list[Tensor]] = {}
    for hook, mean in means.items():
        zero = model.log_probs(ids, (hook, torch.zeros_like))
        ablated[hook] = [losses(zero), losses(model.log_probs(ids, (hook, lambda x, mean=mean: mean.expand_as(x))))]  # type: ignore[misc]
    for one in saes:
        log_probs = model.log_probs(ids, (one.hook_point, one.sae))[:-1]
        kl = kl_divergence(clean, log_probs)
        figures = [torch.ones_like(kl), losses(clean), *ablated[one.hook_point], losses(log_probs), kl]
        one.dialogues.append(masks.astype(np.float64) @ torch.stack(figures, 1).cpu().numpy())


def measure_in_engine(
    saes: Sequence[Spliced],
    engine: SplicedEngine,
    means: dict[str, Tensor],
    instances: Sequence[CachedInstance],
    progress: Progress,
) -> None:
    """The same in vLLM, which takes all dialogues at a time and gives losses alone: KL is NaN."""
    sequences = [instance.token_ids for instance in instances]
    with progress.task("evaluate with the model", 1 + 2 * len(means) + len(saes), "passes") as task:

        def losses(splice: Splice | None = None) -> Losses:
            found = engine.losses(sequences, splice)
            task.advance(1)
            return found

        clean, ablated = losses(), {}
        for hook, mean in means.items():
            constants = torch.zeros_like(mean), mean
            ablated[hook] = [losses(Splice(hook, make_constant, constant.tolist())) for constant in constants]
        for one in saes:
            spliced = losses(Splice(one.hook_point, make_sae, str(one.folder)))
            for place, instance in enumerate(instances):
                zero, mean_ablated = (found[place] for found in ablated[one.hook_point])
                n = np.ones_like(zero)
                figures = np.stack([n, clean[place], zero, mean_ablated, spliced[place], np.nan * n], 1)
                one.dialogues.append(token_sets(instance.token_types)[:, :-1].astype(np.float64) @ figures)


def make_constant(values: list[float], device: str) -> Replace:
    """The vector `[d_in]` in the place of every row."""
    constant = torch.tensor(values, device=device)
    return constant.expand_as


def make_sae(folder: str, device: str) -> Replace:
    """The SAE in `folder`."""
    return load_sae(Path(folder))[0].to(device)


def result_of(one: Spliced, names: Sequence[str]) -> dict[str, Any]:
    """JSON-ready figures by set of tokens, with intervals of 95 % over dialogues (`bootstrap`); losses are in nats."""
    by_dialogue = np.stack(one.dialogues)
    totals, samples = by_dialogue.sum(0), resampled(by_dialogue)
    splits: dict[str, Any] = {}
    for i, name in enumerate(names):
        splits[name] = {"n_tokens": int(totals[i, 0])}
        if totals[i, 0]:
            splits[name] |= with_intervals(figures_of(totals[i]), figures_of(samples[:, i]))
    return {"dialogues": len(by_dialogue), "splits": splits}


def figures_of(totals: Sums) -> dict[str, Any]:
    """Figures from totals `[..., columns]`."""
    n, loss, zero, mean, spliced, kl = np.moveaxis(totals, -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "loss": loss / n,
            "loss_spliced": spliced / n,
            "delta_loss": (spliced - loss) / n,
            "kl": kl / n,
            "loss_zero": zero / n,
            "loss_mean": mean / n,
            "loss_recovered": _recovered(loss, zero, spliced),
            "loss_recovered_from_mean": _recovered(loss, mean, spliced),
        }


def _recovered(loss: Sums, ablated: Sums, spliced: Sums) -> Sums:
    """The share of what an ablation costs that the SAE spares; NaN where it costs nothing but rounding."""
    cost = ablated - loss
    return np.where(np.abs(cost) > ROUNDING * np.abs(loss), (ablated - spliced) / cost, np.nan)
