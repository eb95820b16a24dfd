"""SAEs for a cache: of its model, hook point and width, or refused."""

from pathlib import Path
from typing import Any

from fastcache.cache_format.reader import Cache, open_cache
from fastcache.config import differences
from fastcache.errors import InputError, MismatchError
from fastcache.sae.architectures import Sae
from fastcache.sae.storage import load_sae


def open_held_out(path: str, split: str, allow_train: bool) -> Cache:
    """A complete cache of dialogues that no SAE was trained on, unless `allow_train`.

    `split` is the one that messages advise. Raises `InputError` for training rows, blocks, or a cache that isn't complete.
    """
    cache = open_cache(path)
    cache.require_complete()
    if cache.manifest.identity["corpus"]["split"] == "train" and not allow_train:
        raise InputError(
            f"{path} holds training rows, so figures on it would flatter. Make a held-out cache with "
            f"`fastcache extract --split {split}`, or say --allow-train."
        )
    cache.require_dialogues()
    return cache


def load_sae_of(cache: Cache, folder: Path) -> tuple[Sae, dict[str, Any]]:
    """The SAE in `folder` and its `sae.json`; raises `MismatchError` for one of another model, tokenizer, layer or width."""
    sae, info = load_sae(
        folder, ("hook_point", "model", "model.name", "tokenizer", "method", "method.name", "training")
    )
    if info["hook_point"] not in cache.hook_points:
        held = ", ".join(cache.hook_points)
        raise MismatchError(f"{folder} was trained at {info['hook_point']}, but {cache.path} holds {held}.")
    for name in ("model", "tokenizer"):
        if found := differences(info[name], cache.manifest.identity[name]):
            raise MismatchError(f"{folder} and {cache.path} come from different {name}s ({'; '.join(found)}).")
    if sae.d_in != cache.d_in:
        raise MismatchError(f"{folder} has d_in {sae.d_in}, but {cache.path} has {cache.d_in}.")
    return sae, info
