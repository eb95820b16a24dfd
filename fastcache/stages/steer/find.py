"""Latents to steer with: those that are most active on each special token, as the paper finds them (table F.3)."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import select
from fastcache.devices import choose_device
from fastcache.files import keep_earlier, write_bytes_atomic
from fastcache.llm.loading import known_tokenizer, place_of
from fastcache.progress import Progress
from fastcache.sae.architectures import Sae
from fastcache.sae.of_cache import load_sae_of, open_held_out
from fastcache.stages.steer.config import FindConfig
from fastcache.text_files import require_output_file


class Found(NamedTuple):
    """A special token, in how many dialogues it is, and its latents with their mean maximum activation, highest first."""

    token_id: int
    token: str
    n_dialogues: int
    latents: list[tuple[int, float]]


def find(config: FindConfig, out: Path, progress: Progress) -> list[Found]:
    """For each special token the latents with the highest mean, over the dialogues, of their maximum on it; writes `out`, CSV.

    Raises `InputError` for a cache of training rows or of blocks, `MismatchError` for an SAE of another model or layer.
    """
    require_output_file(out, "--out", ",".join(COLUMNS))
    cache = open_held_out(config.cache, "steer", config.allow_train)
    sae, info = load_sae_of(cache, Path(config.sae))
    device = choose_device(config.device)
    means = _means(cache, sae.to(device), info["hook_point"], min(config.max_instances, cache.n_instances), progress)
    found = [
        Found(token, text, mean.n_dialogues, mean.highest(config.top))
        for (token, mean), text in zip(means.items(), _texts(list(means), cache), strict=True)
    ]
    table = _csv(found).encode()
    if kept := keep_earlier(out, table):
        progress.say(f"{out} held another table, which is kept in {kept}.")
    write_bytes_atomic(out, table)
    return found


COLUMNS = ("token_id", "token", "n_dialogues", "rank", "latent", "value")
"""The columns of the table."""


@dataclass
class _Mean:
    """Of each latent's maximum in a dialogue, over the dialogues that have the token."""

    total: torch.Tensor
    """`[d_sae]`, float64."""
    n_dialogues: int = 0

    def highest(self, count: int) -> list[tuple[int, float]]:
        values, latents = (self.total / self.n_dialogues).topk(min(count, len(self.total)))
        return list(zip(latents.tolist(), values.tolist(), strict=True))


def _means(cache: Cache, sae: Sae, hook_point: str, n_instances: int, progress: Progress) -> dict[int, _Mean]:
    means: dict[int, _Mean] = {}
    device = sae.b_dec.device
    with progress.task("find", n_instances, "dialogues") as task:
        for index in range(n_instances):
            instance = cache.instance(index)
            special = select(instance.token_types, "special")
            ids = instance.token_ids[special]
            acts = sae.encode(torch.from_numpy(instance.residuals(hook_point)[special]).to(device))
            for token in np.unique(ids).tolist():
                largest = acts[torch.from_numpy(ids == token).to(device)].amax(0).double()
                mean = means.setdefault(token, _Mean(torch.zeros_like(largest)))
                mean.total += largest
                mean.n_dialogues += 1
            task.advance(1)
    return dict(sorted(means.items()))


def _texts(tokens: list[int], cache: Cache) -> list[str]:
    """How the tokenizer writes the tokens; their numbers where it isn't at hand."""
    identity = cache.manifest.identity["model"]
    tokenizer = known_tokenizer(identity, place_of(identity["name"], cache.path))
    if tokenizer is None:
        return [str(token) for token in tokens]
    return [str(text) for text in tokenizer.convert_ids_to_tokens(tokens)]


def _csv(found: list[Found]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for each in found:
        for rank, (latent, value) in enumerate(each.latents, 1):
            writer.writerow((each.token_id, each.token, each.n_dialogues, rank, latent, value))
    return text.getvalue()
