"""What bench_cache.py reads: a synthetic cache, the same rows in other formats, and what is known of the page cache."""

import ctypes
import os
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastcache.cache_format.manifest import Manifest
from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import PARTS_FOLDER, UNIT_ROWS, TokenType, decode
from fastcache.cache_format.writer import CacheWriter

HOOK = "resid_post.1"
POOL_ROWS = 32_768
PART_UNITS = 2048  # 524,288 tokens


@lru_cache(1)
def pool(d_in: int) -> np.ndarray:
    """Residual-like float32 rows `[POOL_ROWS, d_in]`: scales differ by dimension, a few dimensions are huge."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(0, 0.5, d_in))
    scale[rng.permutation(d_in)[:6]] *= 20
    return (rng.standard_normal((POOL_ROWS, d_in), np.float32) + rng.normal(0, 0.3, d_in)).astype(
        np.float32
    ) * scale.astype(np.float32)


def _instances(n_tokens: int, first: int, rng: np.random.Generator) -> list[Instance]:
    """Dialogues of 40 to 4,096 tokens with headers of turns, `n_tokens` in all."""
    ends = np.cumsum(np.clip(rng.lognormal(6.3, 0.7, n_tokens // 40 + 1), 40, 4096).astype(int))
    ends = np.append(ends[ends < n_tokens], n_tokens)
    found = []
    for number, n in enumerate(np.diff(ends, prepend=0).tolist(), first):
        types = np.full(n, TokenType.CONTENT, np.uint8)
        for place, flag in enumerate((TokenType.SPECIAL, TokenType.ROLE_WORD, TokenType.TEMPLATE)):
            types[place::100] = flag
        types[0] |= TokenType.FIRST_POSITION
        found.append(Instance(number, np.arange(n, dtype=np.int32), types, [(number, 0)]))
    return found


class Written(NamedTuple):
    """How long a cache took, in seconds."""

    wall: float
    blocked: float
    """Spent in calls by the thread that has the residuals, all of them together."""
    append: float
    """Median of these calls."""


def write_cache(folder: Path, gigabytes: float, d_in: int) -> Written:
    """A cache of whole units through `CacheWriter`, from rows that are there already."""
    rng = np.random.default_rng(1)
    rows = pool(d_in)
    n_units = max(8, round(gigabytes * 1e9 / (2 * UNIT_ROWS * d_in)))
    n_parts = max(4, -(-n_units // PART_UNITS))
    parts, first = [], 0
    for units in np.array_split(np.arange(n_units), n_parts):
        parts.append(_instances(UNIT_ROWS * len(units), first, rng))
        first += len(parts[-1])
    calls = []
    begun = time.perf_counter()
    with CacheWriter(folder, Manifest({"hook_points": [HOOK], "d_in": d_in, "dtype": "bfloat16"})) as writer:
        for index, instances in enumerate(parts):
            part = writer.part(index, instances)
            for instance in instances:
                start = int(rng.integers(POOL_ROWS - 4096))
                before = time.perf_counter()
                part.append({HOOK: rows[start : start + len(instance.token_ids)]})
                calls.append(time.perf_counter() - before)
            part.commit_soon({"stored": len(instances), "truncated": [], "skipped": {}})
    return Written(time.perf_counter() - begun, sum(calls), float(np.median(calls)))


def write_plain(folder: Path, sizes: Iterable[int], data: memoryview) -> float:
    """Seconds for `write` and `fsync` of files of these sizes."""
    folder.mkdir()
    begun = time.perf_counter()
    for number, size in enumerate(sizes):
        with (folder / str(number)).open("wb", buffering=0) as file:
            for start in range(0, size, 1 << 22):
                file.write(data[: min(1 << 22, size - start)])
            os.fsync(file.fileno())
    return time.perf_counter() - begun


def shards(cache: Cache) -> list[Path]:
    """The shard files, in the order of the rows."""
    folders = [Path(cache.path, PARTS_FOLDER, part.record.name, HOOK, "c") for part in cache.parts]
    return [path for folder in folders for path in sorted(folder.glob("*/0"), key=lambda path: int(path.parent.name))]


def write_safetensors(cache: Cache, folder: Path) -> None:
    """A file for each part, with its rows as bfloat16."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    for number, part in enumerate(cache.parts):
        rows = torch.from_numpy(part.rows(HOOK, 0, part.record.n_tokens)).view(torch.bfloat16)
        save_file({"rows": rows}, folder / f"{number}.safetensors")


def write_arrow(cache: Cache, folder: Path) -> None:
    """As SAELens caches: sequences `[context, d_in]` of float32 in an Arrow file; here a unit is a sequence."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"rows": datasets.Array2D((UNIT_ROWS, cache.d_in), "float32")})
    for number, part in enumerate(cache.parts):
        rows = decode(part.rows(HOOK, 0, part.record.n_tokens), "bfloat16").reshape(-1, UNIT_ROWS, cache.d_in)
        datasets.Dataset.from_dict({"rows": rows}, features).save_to_disk(folder / str(number), num_shards=1)


def files(folder: Path) -> list[Path]:
    """All files below a folder."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def drop(paths: Iterable[Path]) -> None:
    """Have the kernel forget what it holds of these files; needs no privilege."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(paths: Iterable[Path]) -> None:
    """Have the page cache hold these files: a kernel may give up pages that were not used for a while."""
    buffer = bytearray(1 << 22)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def resident(paths: Iterable[Path]) -> float:
    """Share of these files' pages that are in the page cache."""
    libc = ctypes.CDLL(None)
    pages = []
    for path in paths:
        content = np.memmap(path, np.uint8, "c")
        seen = np.empty(-(-len(content) // os.sysconf("SC_PAGESIZE")), np.uint8)
        libc.mincore(
            ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(len(content)), seen.ctypes.data_as(ctypes.c_void_p)
        )
        pages.append(seen & 1)
    return float(np.concatenate(pages).mean())
