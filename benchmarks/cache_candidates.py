"""The ways of reading that bench_cache.py compares: each gives every unit of the order to `take`, opening included.

`take` may be called from the thread that read: handing over costs the others nothing, and ours what it costs in use.
"""

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cache_files import HOOK, shards

from fastcache.cache_format.reader import open_cache
from fastcache.cache_format.schema import UNIT_ROWS, shard_rows
from fastcache.cache_format.stream import unit_stream

Take = Callable[[int, Any], None]
DIRECT_BYTES = 1 << 22
ARROW_BATCH = 32  # SAELens' default number of sequences in a read


class Data:
    """The same rows in every format, and the order in which to read them."""

    def __init__(self, folder: Path) -> None:
        self.cache, self.safetensors, self.arrow = (folder / name for name in ("cache", "safetensors", "arrow"))
        cache = open_cache(self.cache)
        self.table = cache.units().tolist()
        self.d_in, self.n_parts = cache.d_in, len(cache.parts)
        self.arrays = [self.cache / part.folder / HOOK for part in cache.parts]
        self.shards = shards(cache)
        self.unit_bytes = UNIT_ROWS * cache.d_in * 2
        per_shard = [shard_rows(part.record.n_tokens, cache.d_in, 2) for part in cache.parts]
        self.places = [  # of each unit: its shard's path and the offset in there
            (
                str(self.arrays[part] / "c" / str(start // per_shard[part]) / "0"),
                start % per_shard[part] * cache.d_in * 2,
            )
            for part, start, _ in self.table
        ]
        self.order: list[int] = list(range(len(self.table)))

    def shuffle(self, seed: int) -> None:
        """Another order of all units."""
        self.order = np.random.default_rng(seed).permutation(len(self.table)).tolist()


class Candidate(NamedTuple):
    """One line of the table."""

    name: str
    read: Callable[[Data, Take], None]
    files: str = "cache"
    """The attribute of `Data` with the folder it reads."""


def _in_threads(n: int, units: list[int], work: Callable[[list[int]], None]) -> None:
    if n == 1:
        return work(units)
    with ThreadPoolExecutor(n) as threads:
        list(threads.map(work, [units[k::n] for k in range(n)]))
    return None


def ours(data: Data, take: Take, n_threads: int = 2, verify: bool = True) -> None:
    for unit, rows, _ in unit_stream(open_cache(data.cache), HOOK, data.order, n_threads=n_threads, verify=verify):
        take(unit, rows)


def readinto(data: Data, take: Take, n_threads: int = 1, in_order: bool = False) -> None:
    def work(units: list[int]) -> None:
        buffer = np.empty((UNIT_ROWS, data.d_in), np.uint16)
        with ExitStack() as stack:
            opened = {
                path: stack.enter_context(Path(path).open("rb", buffering=0)) for path in {p for p, _ in data.places}
            }
            for unit in units:
                path, offset = data.places[unit]
                opened[path].seek(offset)
                if opened[path].readinto(buffer) != data.unit_bytes:
                    raise OSError(f"{path} is too short")
                take(unit, buffer)

    _in_threads(n_threads, sorted(data.order) if in_order else data.order, work)


def zarr_python(data: Data, take: Take, n_threads: int, pipeline: str) -> None:
    import zarr

    with zarr.config.set({"codec_pipeline.path": pipeline}):
        arrays = [zarr.open_array(path, mode="r") for path in data.arrays]

        def work(units: list[int]) -> None:
            for unit in units:
                part, start, stop = data.table[unit]
                take(unit, arrays[part][start:stop])

        _in_threads(n_threads, data.order, work)


def tensorstore(data: Data, take: Take, in_flight: int) -> None:
    import tensorstore as ts

    def opened(path: Path) -> Any:
        return ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}, read=True).result()

    arrays = [opened(path) for path in data.arrays]
    reading: deque[tuple[int, Any]] = deque()

    def take_first() -> None:
        unit, future = reading.popleft()
        take(unit, future.result())

    for unit in data.order:
        part, start, stop = data.table[unit]
        reading.append((unit, arrays[part][start:stop].read()))
        if len(reading) == in_flight:
            take_first()
    while reading:
        take_first()


def safetensors(data: Data, take: Take, n_threads: int = 1) -> None:
    """A slice is only a view of the mapped file: nothing is read before it is copied."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(1)  # to split such small copies takes longer than to copy, many times so on a busy machine
    with ExitStack() as stack:
        paths = [data.safetensors / f"{part}.safetensors" for part in range(data.n_parts)]
        slices = [stack.enter_context(safe_open(path, "pt")).get_slice("rows") for path in paths]

        def work(units: list[int]) -> None:
            rows = torch.empty((UNIT_ROWS, data.d_in), dtype=torch.bfloat16)
            for unit in units:
                part, start, stop = data.table[unit]
                take(unit, rows.copy_(slices[part][start:stop]))

        _in_threads(n_threads, data.order, work)


def saelens(data: Data, take: Take, in_order: bool) -> None:
    """In its order and batches, as SAELens reads; or at random, unit by unit, which it doesn't do."""
    import datasets
    import torch

    torch.set_num_threads(1)
    parts = [datasets.load_from_disk(data.arrow / str(part)) for part in range(data.n_parts)]
    rows = datasets.concatenate_datasets(parts).with_format("torch")
    if not in_order:
        for unit in data.order:
            take(unit, rows[unit]["rows"])
        return
    for first in range(0, len(rows), ARROW_BATCH):
        for unit, one in enumerate(rows[first : first + ARROW_BATCH]["rows"], first):
            take(unit, one)


def read_disk(data: Data, take: Take, n_threads: int = 2) -> None:
    """What fio would do: large sequential reads of the shard files, past the page cache where the file system can."""

    pieces = [(path, start) for path in data.shards for start in range(0, path.stat().st_size, DIRECT_BYTES)]

    def work(mine: list[tuple[Path, int]]) -> None:
        with mmap.mmap(-1, DIRECT_BYTES) as buffer, ExitStack() as stack:
            opened = {path: os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0)) for path in data.shards}
            for descriptor in opened.values():
                stack.callback(os.close, descriptor)
            for path, start in mine:
                os.preadv(opened[path], [buffer], start)

    with ThreadPoolExecutor(n_threads) as threads:
        list(threads.map(work, [pieces[k::n_threads] for k in range(n_threads)]))
    for unit in data.order:
        take(unit, None)


OURS, UNCHECKED = "ours, checked", "ours, not checked"
SAELENS = ("SAELens' Arrow, in its order", "SAELens' Arrow, shuffled")
DISK = "disk: O_DIRECT, in order, 2 threads"
ZARR = {"zarr-python": "zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs": "zarrs.ZarrsCodecPipeline"}


def _zarr_libraries() -> Iterator[Candidate]:
    for name, pipeline in ZARR.items():
        if name == "zarr-python" or _installed(name):
            yield Candidate(name, partial(zarr_python, n_threads=1, pipeline=pipeline))
            yield Candidate(f"{name}, 2 threads", partial(zarr_python, n_threads=2, pipeline=pipeline))
    if _installed("tensorstore"):
        yield Candidate("tensorstore", partial(tensorstore, in_flight=1))
        yield Candidate("tensorstore, 8 ahead", partial(tensorstore, in_flight=8))


def _installed(package: str) -> bool:
    if find_spec(package) is None:
        print(f"{package} is not installed and left out: pip install {package}")
        return False
    return True


def candidates() -> list[Candidate]:
    """All that can be read here; those whose package is missing are left out, with a line that says so."""
    return [
        Candidate(OURS, ours),
        Candidate(UNCHECKED, partial(ours, verify=False)),
        Candidate(f"{OURS}, 1 thread", partial(ours, n_threads=1)),
        Candidate("readinto", readinto),
        Candidate("readinto, 2 threads", partial(readinto, n_threads=2)),
        Candidate("readinto, in order", partial(readinto, in_order=True)),
        *_zarr_libraries(),
        Candidate("safetensors", safetensors, "safetensors"),
        Candidate("safetensors, 2 threads", partial(safetensors, n_threads=2), "safetensors"),
        Candidate(SAELENS[0], partial(saelens, in_order=True), "arrow"),
        Candidate(SAELENS[1], partial(saelens, in_order=False), "arrow"),
    ]
