"""A small complete cache from no model."""

from pathlib import Path

import numpy as np

from fastcache.cache_format.manifest import Manifest
from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import TokenType
from fastcache.cache_format.storage import LocalStorage, Storage
from fastcache.cache_format.writer import CacheWriter

HOOK = "resid_post.0"
LENGTHS = ((300, 7), (20,), (5, 5, 270), (1,), (40, 2))
"""Tokens of each instance, by part."""


def rows_of(instance: int, n: int, d_in: int) -> np.ndarray:
    return np.random.default_rng(instance).standard_normal((n, d_in)).astype(np.float32)


def instances_of(lengths, part: int) -> list[Instance]:
    first = sum(len(one) for one in lengths[:part])
    made = []
    for number, n in enumerate(lengths[part], first):
        types = np.where(np.arange(n) % 5 == 0, 1, 8).astype(np.uint8)
        types[0] |= 16
        made.append(Instance(number, np.arange(n, dtype=np.int32), types, [(number, 0)]))
    return made


def write(place: Path | Storage, lengths=LENGTHS, d_in: int = 8, dtype: str = "bfloat16") -> None:
    """Write what is missing, as extract does."""
    storage = LocalStorage(place) if isinstance(place, Path) else place
    with CacheWriter(storage, Manifest({"hook_points": [HOOK], "d_in": d_in, "dtype": dtype})) as writer:
        if writer.manifest.state == "complete":
            return
        for index in range(len(lengths)):
            if index in writer.committed:
                continue
            instances = instances_of(lengths, index)
            part = writer.part(index, instances)
            for instance in instances:
                part.append({HOOK: rows_of(instance.instance_id, len(instance.token_ids), d_in)})
            part.commit({"stored": len(instances), "truncated": [], "skipped": {}})
        finish(writer)


def finish(writer: CacheWriter) -> None:
    cache, manifest = Cache(writer.storage), writer.manifest
    types = np.concatenate([part.tokens["token_types"] for part in cache.parts])
    n = cache.n_instances
    manifest.ledger = {"rows": n, "stored": n, "truncated": 0, "skipped": {}, "not reached": 0}
    manifest.statistics = {HOOK: cache.summary(HOOK)}
    manifest.totals = {
        "n_tokens": cache.n_tokens,
        "n_instances": n,
        "n_parts": len(cache.parts),
        "n_bytes": sum(size for part in cache.parts for size, _ in part.record.files.values()),
        "tokens_by_type": {str(flag.name): int(((types & flag) != 0).sum()) for flag in TokenType},
    }
    manifest.state = "complete"
    writer.save_manifest()
