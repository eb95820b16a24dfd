"""Reading and writing a cache, beside other ways to do it with the same rows: warm, cold, and how much memory it takes.

    python benchmarks/bench_cache.py
    python benchmarks/bench_cache.py --gigabytes 2 --rounds 9 --memory-gigabytes 20

Synthetic residuals go through `CacheWriter` into a temporary folder, and into safetensors files and SAELens' Arrow format.
Every candidate gives all units of 256 rows in the same random order, and is seen to give the right ones in a first round.
After that candidates take turns within each round, so that a busy machine hurts all alike; figures are medians over rounds,
ratios medians of the ratios within a round. A GB is 1e9 bytes of bfloat16 rows, whatever the format stores (Arrow: twice as
many). Ours reads in two threads and checks every unit; the others hand over for free, from the thread that read.
Cold means that the kernel was told to forget the files; what lies below it may still remember.
"""

import argparse
import gc
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cache_files
import numpy as np
from cache_candidates import DISK, OURS, SAELENS, UNCHECKED, ZARR, Candidate, Data, candidates, read_disk
from cache_files import HOOK
from crc32c import crc32c

from fastcache.cache_format.reader import open_cache
from fastcache.cache_format.schema import checksum_array, encode

BATCH_ROWS = 4096
MIB = 2**20

Times = dict[str, list[float]]


def check(candidate: Candidate, data: Data) -> None:
    """Exit unless the candidate gives every unit once, with the bytes that were written."""
    cache = open_cache(data.cache)
    expected = np.concatenate([part.small(checksum_array(HOOK), (None,), "uint32") for part in cache.parts])
    found = np.zeros(len(expected), np.uint32)

    def take(unit: int, rows: Any) -> None:
        if not isinstance(rows, np.ndarray):
            import torch

            rows = rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else encode(rows.numpy(), "bfloat16")
        found[unit] = crc32c(np.ascontiguousarray(rows).data.cast("B"))

    candidate.read(data, take)
    if not np.array_equal(found, expected):
        sys.exit(f"{candidate.name} gives OTHER rows in {int((found != expected).sum())} of {len(found)} units.")


def timed(candidate: Candidate, data: Data) -> float:
    """Seconds to be given all units."""
    seen = 0

    def take(unit: int, rows: Any) -> None:
        nonlocal seen
        seen += 1

    begun = time.perf_counter()
    candidate.read(data, take)
    return time.perf_counter() - begun


def read_rounds(compared: list[Candidate], data: Data, n_rounds: int, cold: bool) -> tuple[Times, float]:
    """Seconds of each candidate in each round, and the largest share of a file that the page cache kept before a cold one."""
    times: Times = defaultdict(list)
    kept = 0.0
    for number in range(n_rounds):
        data.shuffle(number)
        turn = number * 5 % len(compared)
        for candidate in compared[turn:] + compared[:turn]:
            gc.collect()  # mapped files can't be dropped
            paths = cache_files.files(getattr(data, candidate.files))
            if cold:
                cache_files.drop(paths)
                kept = max(kept, cache_files.resident(paths))
            else:
                cache_files.warm(paths)
            times[candidate.name].append(timed(candidate, data))
    return times, kept


def write_rounds(folder: Path, gigabytes: float, d_in: int, n_rounds: int) -> tuple[Times, list[cache_files.Written]]:
    """Seconds of our writer and of `write` + `fsync`, turn about, and what our writer says of itself."""
    data = cache_files.pool(d_in).data.cast("B")
    times: Times = defaultdict(list)
    written: list[cache_files.Written] = []
    sizes = [path.stat().st_size for path in cache_files.files(folder.parent / "cache")]

    def ours() -> float:
        written.append(cache_files.write_cache(folder, gigabytes, d_in))
        return written[-1].wall

    def plain() -> float:
        return cache_files.write_plain(folder, sizes, data)

    for number in range(n_rounds):
        for name, work in ((OURS, ours), ("plain", plain))[:: 1 if number % 2 else -1]:
            times[name].append(work())
            shutil.rmtree(folder)
    return times, written


def ratio(times: Times, name: str, others: Iterable[str]) -> float:
    """Median over rounds of how much quicker `name` was than the quickest of the others."""
    mine, theirs = np.array(times[name]), np.array([times[other] for other in others if other in times])
    return float(np.median(theirs.min(0) / mine))


def peak_memory(folder: Path, buffer_tokens: int) -> float:
    """MiB at the peak, above what the imports took, of a process that reads the cache once: see `read_once`."""
    command = [sys.executable, __file__, "--read", folder, "--buffer-tokens", buffer_tokens]
    return float(subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout)


def _peak() -> float:
    """Largest resident memory of this process so far, in MiB."""
    if sys.platform == "linux":  # getrusage counts the process before exec too, which is the parent's copy
        return int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def read_once(folder: Path, buffer_tokens: int) -> float:
    """Read every unit in random order, through a mixing buffer if one is asked for; returns the memory that took."""
    from fastcache.cache_format.stream import unit_stream
    from fastcache.stages.train.stream import MixingBuffer

    before = _peak()
    cache = open_cache(folder)
    if buffer_tokens:
        buffer = MixingBuffer(cache, HOOK, buffer_tokens, BATCH_ROWS, 0)
        for _ in range(cache.n_tokens // BATCH_ROWS):
            buffer.next_batch()
    else:
        for _ in unit_stream(cache, HOOK, np.random.default_rng(0).permutation(len(cache.units()))):
            pass
    return _peak() - before


def show_memory(folder: Path, gigabytes: list[float], d_in: int, buffer_tokens: int) -> None:
    """Peak memory for caches of these sizes; the first is there already, the others are removed again."""
    print(
        f"\nPeak memory above the imports, MiB (a mixing buffer of {buffer_tokens * d_in * 2 / MIB:.0f} MiB was asked for)"
    )
    print(f"{'GB':>6}{'unit stream':>14}{'mixing buffer':>16}")
    for number, size in enumerate(gigabytes):
        path = folder / ("memory" if number else "cache")
        if number:
            cache_files.write_cache(path, size, d_in)
        stream, mixing = peak_memory(path, 0), peak_memory(path, buffer_tokens)
        print(f"{size:>6g}{stream:>14.0f}{mixing:>16.0f}", flush=True)
        if number:
            shutil.rmtree(path)


def show_reading(warm: Times, cold: Times, n_bytes: int) -> None:
    """The table of candidates."""
    print(f"{'candidate':<38}{'warm GB/s':>10}{'cold GB/s':>11}")
    for name in {**warm, **cold}:
        columns = (f"{n_bytes / 1e9 / np.median(times[name]):.2f}" if name in times else "-" for times in (warm, cold))
        print("{:<38}{:>10}{:>11}".format(name, *columns))


def show_writing(writing: Times, written: list[cache_files.Written], n_bytes: int) -> None:
    """How quick the writer is, and what the thread notices that hands it residuals."""
    ours, plain = (n_bytes / 1e9 / np.median(writing[name]) for name in (OURS, "plain"))
    wall, blocked, append = np.median(np.array(written), 0)
    print(f"\nWriter: {ours:.2f} GB/s; write + fsync of as many bytes: {plain:.2f} GB/s.")
    print(f"A thread that does nothing but append was blocked for {blocked / wall:.0%} of the time; ", end="")
    print(f"half of the calls took less than {1e6 * append:.0f} us.")


def show_targets(warm: Times, cold: Times, writing: Times) -> None:
    """The ratios that were promised."""
    zarr = [name for name in warm if name.startswith((*ZARR, "tensorstore"))]
    goals = [
        ("warm, checked, to readinto, 2 threads each", ratio(warm, OURS, ["readinto, 2 threads"]), 0.5),
        ("warm, checked, to readinto, 1 thread each", ratio(warm, OURS + ", 1 thread", ["readinto"]), 0.5),
        ("warm, checked, to SAELens' format at its best", ratio(warm, OURS, SAELENS), 5),
        ("warm, checked, to the quickest Zarr library", ratio(warm, OURS, zarr), 2),
    ]
    if cold:
        goals.append(("cold, checked, to the disk in order", ratio(cold, OURS, [DISK]), 0.9))
    goals.append(("writer to write + fsync", ratio(writing, OURS, ["plain"]), 0.6))
    print(f"\n{'ratio':<48}{'target':>8}{'found':>8}")
    for name, found, target in goals:
        print(f"{name:<48}{target:>8}{found:>8.2f}  {'met' if found >= target else 'missed'}")
    print(f"{'cost of checking, warm':<48}{'':>8}{1 - ratio(warm, OURS, [UNCHECKED]):>8.0%}")


def main(folder: Path, arguments: argparse.Namespace) -> None:
    d_in, n_rounds = arguments.d_in, arguments.rounds
    cache_files.write_cache(folder / "cache", arguments.gigabytes, d_in)
    data = Data(folder)
    cache_files.write_safetensors(open_cache(data.cache), data.safetensors)
    cache_files.write_arrow(open_cache(data.cache), data.arrow)
    n_bytes = len(data.table) * data.unit_bytes
    print(f"{n_bytes / 1e9:.2f} GB in {len(data.table):,} units, {data.n_parts} parts, d_in {d_in}; {n_rounds} rounds")
    compared = candidates()
    for candidate in compared:
        check(candidate, data)
    warm, _ = read_rounds(compared, data, n_rounds, cold=False)
    cold, kept = {}, 0.0
    if hasattr(os, "posix_fadvise"):
        compared.append(Candidate(DISK, read_disk))
        cold, kept = read_rounds(compared, data, arguments.cold_rounds, cold=True)
    writing, written = write_rounds(folder / "written", arguments.gigabytes, d_in, arguments.cold_rounds)
    show_reading(warm, cold, n_bytes)
    print(f"When a cold round began, the page cache held up to {kept:.1%} of the files.")
    show_writing(writing, written, n_bytes)
    show_targets(warm, cold, writing)
    shutil.rmtree(data.safetensors)
    shutil.rmtree(data.arrow)
    sizes = [arguments.gigabytes, *([arguments.memory_gigabytes] if arguments.memory_gigabytes else [])]
    show_memory(folder, sizes, d_in, arguments.buffer_tokens)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=0.25, help="size of the cache")
    parser.add_argument(
        "--memory-gigabytes", type=float, help="another cache, for the memory alone: minutes, and so much disk"
    )
    parser.add_argument("--d-in", type=int, default=896)
    parser.add_argument("--rounds", type=int, default=5, help="warm ones")
    parser.add_argument("--cold-rounds", type=int, default=3, help="cold ones, and rounds of writing")
    parser.add_argument("--buffer-tokens", type=int, default=65_536, help="rows of the mixing buffer")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; 5 times the size of the cache")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        print(read_once(given.read, given.buffer_tokens))
    else:
        with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
            main(Path(temporary), given)
