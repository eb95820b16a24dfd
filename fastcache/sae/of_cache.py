"""SAEs for a cache: of its model, hook point and width, or refused."""

from pathlib import Path
from typing import Any

from fastcache.cache_format.reader import Cache
from fastcache.config import differences
from fastcache.errors import MismatchError
from fastcache.sae.architectures import Sae
from fastcache.sae.storage import load_sae


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
