"""What a run is about, found and checked before anything is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcache.cache_format.reader import Cache, open_cache
from fastcache.cache_format.unit_array import Rows
from fastcache.config import as_dict
from fastcache.devices import choose_device
from fastcache.errors import InputError
from fastcache.files import fingerprint
from fastcache.progress import Progress
from fastcache.rundir import output_directory, require_space
from fastcache.stages.train.config import FREE_ON_RESUME, TrainConfig
from fastcache.stages.train.log import METRICS_FILE
from fastcache.stages.train.order import require_batch, rows_of_units
from fastcache.stages.train.recipe import Recipe, resolve
from fastcache.stages.train.selection import Selection, select_rows
from fastcache.stages.train.stream import MixingBuffer, read_units
from fastcache.stages.train.threads import THREADS_FILE, kept_threads
from fastcache.stages.train.watch import EVENTS_FILE

SAMPLE_UNITS, SAMPLE_ROWS = 32, 4096
FAILED_FILE = "failed.json"
MEASURED = ("evaluation*.json", "special_tokens*.csv")
"""What other commands write beside an SAE about it."""
OWNED = ("sae.json", "checkpoints", "sae.*", METRICS_FILE, FAILED_FILE, EVENTS_FILE, THREADS_FILE, *MEASURED)


def to_tensor(rows: Rows, logical_dtype: str, device: str) -> Tensor:
    """Stored rows as a float32 tensor on `device`; exact."""
    if logical_dtype == "bfloat16":
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16).to(device).float()
    return torch.from_numpy(rows).to(device).float()


@dataclass(frozen=True)
class Task:
    """One SAE to be trained: settings, and the rows that it is trained on."""

    config: TrainConfig
    cache: Cache
    hook: str
    device: str
    selection: Selection
    recipe: Recipe

    @property
    def cache_fingerprint(self) -> str:
        """What tells the rows trained on from others; layers that the cache gets later don't change it."""
        return fingerprint({**self.cache.manifest.identity, "hook_points": [self.hook]})

    def buffer(self) -> MixingBuffer:
        """The stream of its batches, from the beginning."""
        config = self.config
        return MixingBuffer(
            self.cache, self.hook, config.buffer_tokens, self.recipe.batch_size, config.stream_seed, config.on_corrupt,
            self.selection,
        )  # fmt: skip

    def sample(self) -> Tensor:
        """Rows of some random units, of those that are trained on: for scale, geometric median and thresholds.

        Raises `InputError` where the norm filter leaves none.
        """
        cache, places, found, n_units = self.cache, rows_of_units(self.cache), [], 0
        units = read_units(cache, self.hook, self.config.stream_seed, skip=self.config.on_corrupt == "skip")
        for read in islice(units, len(places)):
            if read.error is not None:
                continue
            rows = read.rows[self.selection.of_rows(*places[read.unit].tolist())]
            too_large = self.selection.too_large(rows, cache.manifest.dtype)
            found.append((rows if too_large is None else rows[~too_large]).copy())
            n_units += 1
            if n_units >= SAMPLE_UNITS and sum(map(len, found)) >= SAMPLE_ROWS:
                break
        if not sum(map(len, found)):
            raise InputError(
                f"{cache.path} has no rows that --norm-filter {self.config.norm_filter} keeps of those of --tokens-of "
                f"{self.config.tokens_of}. Raise the factor, or choose other tokens."
            )
        return to_tensor(np.concatenate(found), cache.manifest.dtype, self.device)

    @contextmanager
    def output(self, out: Path, progress: Progress, fresh: bool = False) -> Iterator[None]:
        """Hold `out` as the output of this run, and compute as it began; see `output_directory` for what is refused."""
        recipe = self.recipe
        settings = {
            **as_dict(self.config),
            "resolved": recipe.as_json(),
            "cache_fingerprint": self.cache_fingerprint,
        }
        parameters = 2 * recipe.d_sae * recipe.d_in
        copies = 4 + 3 * self.config.keep_checkpoints
        require_space(out, 4 * parameters * copies, "An SAE of this size with its checkpoints")
        with (
            output_directory(out, "train", settings, OWNED, free=FREE_ON_RESUME, fresh=fresh),
            kept_threads(out, progress),
        ):
            yield

    def provenance(self, scale: float) -> dict[str, Any]:
        """Where an SAE trained on `scale` times the activations comes from, as it stands in sae.json."""
        identity, recipe = self.cache.manifest.identity, self.recipe
        n_tokens = recipe.steps * recipe.batch_size
        stream = {"buffer_tokens": self.config.buffer_tokens, "shuffle_seed": self.config.stream_seed}
        return {
            "hook_point": self.hook,
            "model": identity["model"],
            "tokenizer": identity["tokenizer"],
            "method": identity["method"],
            "corpus": identity["corpus"],
            "cache_fingerprint": self.cache_fingerprint,
            "training": {**recipe.as_json(), **stream, "tokens": n_tokens, "activation_scale": scale},
        }


def prepare_task(config: TrainConfig, cache: Cache | None = None, selection: Selection | None = None) -> Task:
    """Open the cache and resolve the settings; raises `InputError` for a cache or settings that can't serve.

    `cache` and `selection` are those of another task on the same rows, to be had once.
    """
    cache = cache or open_cache(config.cache)
    cache.require_complete()
    if cache.manifest.identity["corpus"]["split"] != "train":
        raise InputError(
            f"{config.cache} holds held-out rows, kept for evaluation. Train on a cache of training rows, which "
            "`fastcache extract --split train` makes."
        )
    hook = cache.require_hook(None if config.layer is None else f"resid_post.{config.layer}")
    selection = selection or select_rows(cache, hook, config)
    recipe = resolve(config, cache.d_in, selection.n_kept)
    require_batch(cache, selection.n_kept, recipe.batch_size)
    return Task(config, cache, hook, choose_device(config.device), selection, recipe)
