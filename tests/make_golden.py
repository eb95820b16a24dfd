"""Writes a golden cache with the current code: `python tests/make_golden.py`. Made once a format version, then never again.

test_golden.py opens every golden cache there is with the current code and compares all values with `golden_rows`.
"""

import sys
from pathlib import Path

import numpy as np

from fastcache.cache_format.manifest import Manifest
from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.reader import open_cache
from fastcache.cache_format.schema import FORMAT_VERSION
from fastcache.cache_format.storage import LocalStorage
from fastcache.cache_format.writer import CacheWriter

GOLDEN = Path(__file__).parent / "golden"
HOOKS = ("resid_post.3",)
D_IN = 8
LENGTHS = ((300, 5), (4,))
"""Tokens of each instance, by part; 300 rows make two units."""


def golden_rows(hook: str, instance: int, n: int) -> np.ndarray:
    """Residuals `[n, D_IN]` of an instance, exact in every dtype of 16 bits or more."""
    token, dimension = np.mgrid[:n, :D_IN]
    values = (37 * token + 11 * dimension + 5 * instance + 3 * HOOKS.index(hook)) % 201 - 100
    return (values / 8).astype(np.float32)


def golden_tokens(instance: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and types of an instance."""
    types = np.where(np.arange(n) % 5 == 0, 1, 8) | (2 << 5)
    types[0] |= 16
    return (np.arange(n) * 7 + instance).astype(np.int32), types.astype(np.uint8)


def main(dtype: str) -> None:
    root = GOLDEN / f"{FORMAT_VERSION}-{dtype}"
    writer = CacheWriter(root, Manifest({"hook_points": list(HOOKS), "d_in": D_IN, "dtype": dtype}))
    number = 0
    for index, lengths in enumerate(LENGTHS):
        instances = []
        for n in lengths:
            instances.append(Instance(100 + number, *golden_tokens(number, n), [(100 + number, 0)]))
            number += 1
        part = writer.part(index, instances)
        for instance in instances:
            i = instance.instance_id - 100
            part.append({hook: golden_rows(hook, i, len(instance.token_ids)) for hook in HOOKS})
        part.commit({"stored": len(instances), "truncated": [], "skipped": {}})
    cache = open_cache(root)
    writer.manifest.totals = {"n_parts": 2, "n_tokens": cache.n_tokens, "n_instances": cache.n_instances}
    writer.manifest.statistics = {hook: cache.summary(hook) for hook in HOOKS}
    writer.manifest.state = "complete"
    writer.manifest.save(LocalStorage(root))


if __name__ == "__main__":
    for dtype in sys.argv[1:] or ["bfloat16"]:
        main(dtype)
