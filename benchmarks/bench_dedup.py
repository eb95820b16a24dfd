"""Deduplication of `fastcache prepare` against Algorithm 1 with a Python set, and against datatrove's MinHash.

    python benchmarks/bench_dedup.py
    python benchmarks/bench_dedup.py --sizes 250000 500000 1000000 2000000 --library-python OTHER-VENV/bin/python

Synthetic dialogues (a seed, a Zipf-like vocabulary, a quarter share a passage with an earlier one) are written to a
temporary folder. Every candidate runs in a process of its own: wall time and CPU time after its imports, memory as the
largest sum of resident sizes over its process tree. At the first size ours meets the naive version, three times each in
turns, of which the quickest counts; at all sizes it shows its growth. The library gets fewer dialogues, and is left out where
it is not installed (`pip install "datatrove[io,processing,multilingual]" spacy`).
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

BLOCK = 20_000  # dialogues generated at a time
VOCABULARY = 50_000
PASSAGE = 24  # words that a sharing dialogue takes over: five 20-grams
PAPER_DIALOGUES, PAPER_GRAMS = 11_400_000, 8e9
LIBRARY_DIALOGUES = 3000
REPEATS = 3  # of ours and naive in turns, since other processes disturb them
NAIVE_GIB = 14  # more than this the naive candidate may not take
MIB, GIB = 2**20, 2**30


def generate(folder: Path, n_dialogues: int, seed: int = 0) -> None:
    """Write the dialogues to two files: datatrove shares out work by files."""
    rng = np.random.default_rng(seed)
    letters = rng.integers(ord("a"), ord("z") + 1, (VOCABULARY + 3, 12)).astype(np.uint8)
    lengths = np.minimum(2 + rng.poisson(np.log10(np.arange(1, VOCABULARY + 4)) * 1.2), 11)
    places = np.arange(12)
    letters[places == lengths[:, None]] = ord(" ")
    letters[places > lengths[:, None]] = 0
    letters[VOCABULARY:] = 0
    letters[VOCABULARY:, 0] = [1, 2, 3]  # marks: to the assistant's turn, to the user's, to the next dialogue
    words = letters.view("S12").ravel()
    weights = 1 / (np.arange(VOCABULARY) + 3.0)
    zipf = np.searchsorted(np.cumsum(weights) / weights.sum(), (np.arange(1 << 20) + 0.5) / (1 << 20)).astype(np.uint16)
    begin, answer, ask = (
        b'{"messages":[{"role":"user","content":"',
        *(f'"}},{{"role":"{role}","content":"'.encode() for role in ("assistant", "user")),
    )
    passages = np.empty((n_dialogues + BLOCK, PASSAGE), np.uint16)
    n_passages = 0
    folder.mkdir()
    for part, start in enumerate((0, n_dialogues // 2)):
        stop = (n_dialogues // 2, n_dialogues)[part]
        with (folder / f"part-{part}.jsonl").open("wb") as file:
            for first in range(start, stop, BLOCK):
                n = min(BLOCK, stop - first)
                rounds = rng.integers(1, 4, n)
                each = rng.integers(120, 161, n) // rounds
                asked = each * rng.integers(10, 31, n) // 100
                shape = np.stack([asked, each - asked], 1)
                turns = np.repeat(shape, rounds, axis=0).ravel()  # words in every turn
                ends = np.cumsum(turns + 1)  # a mark after every turn
                ids = zipf[rng.integers(0, 1 << 20, ends[-1])]
                last = np.cumsum(2 * rounds) - 1
                ids[ends - 1] = np.where(np.arange(len(turns)) % 2, VOCABULARY + 1, VOCABULARY)
                ids[ends[last] - 1] = VOCABULARY + 2
                answers = ends[last - 2 * rounds + 1][:, None] + np.arange(PASSAGE)  # the first answer's first words
                sharing = rng.random(n) < 0.25
                sharing[0] &= n_passages > 0
                known = n_passages + np.cumsum(~sharing)  # passages that stand before each dialogue
                new = ids[answers[~sharing]]
                passages[n_passages : n_passages + len(new)] = new
                chosen = (rng.random(n) * known).astype(np.int64)[sharing]
                ids[answers[sharing]] = passages[chosen]
                n_passages += len(new)
                text = words[ids].tobytes().translate(None, b"\0").replace(b" \1", answer).replace(b" \2", ask)
                file.write(begin + text[:-2].replace(b" \3", b'"}]}\n' + begin) + b'"}]}\n')


def now() -> np.ndarray:
    """Wall time and the CPU time of this process and of its children that have ended."""
    return np.array([time.perf_counter(), sum(os.times()[:4])])


class Phases:
    """A `Progress` that notes when tasks begin and end."""

    def __init__(self) -> None:
        self.marks: list[np.ndarray] = []

    @contextmanager
    def task(self, name: str, total: int | None, unit: str):
        self.marks.append(now())
        yield self
        self.marks.append(now())

    def advance(self, amount: int, note: str = "") -> None: ...

    def say(self, text: str) -> None: ...


def run_ours(folder: Path, out: Path, workers: int) -> dict:
    import pyarrow.parquet as pq

    from fastcache.stages.prepare.config import PrepareConfig
    from fastcache.stages.prepare.run import prepare

    phases = Phases()
    begun = now()
    info = prepare(PrepareConfig(source=(str(folder),), workers=workers), out, phases)
    ended = now()
    outcomes = pq.read_table(out / "ledger.parquet", columns=["outcome"])["outcome"].to_numpy()
    hashed, dealt = phases.marks[1], phases.marks[4]  # the tasks: read and hash, find shared n-grams, deal, write
    parts = np.diff([begun, hashed, dealt, ended], axis=0)
    return {"parts": parts, "kept": np.flatnonzero(outcomes == "kept"), "n_grams": info["n_grams"]}


def run_naive(folder: Path, out: Path, workers: int) -> dict:
    """Algorithm 1, word by word as the paper has it; an exact duplicate of a whole dialogue is dropped too."""
    resource.setrlimit(resource.RLIMIT_AS, (NAIVE_GIB * GIB,) * 2)
    begun = now()
    seen: set = set()
    kept = []
    number = 0
    for path in sorted(folder.iterdir()):
        with path.open() as file:
            for line in file:
                turns = [turn["content"] for turn in json.loads(line)["messages"]]
                grams = {tuple(turns)}
                for turn in turns:
                    words = turn.split()
                    grams.update(tuple(words[i : i + 20]) for i in range(len(words) - 19))
                if seen.isdisjoint(grams):
                    seen |= grams
                    kept.append(number)
                number += 1
    return {"parts": now()[None] - begun, "kept": np.array(kept)}


def _document(self, data: dict, path: str, number: int) -> dict:
    return {"text": "\n".join(turn["content"] for turn in data["messages"]), "id": f"{path}/{number}"}


def run_library(folder: Path, out: Path, workers: int) -> dict:
    """datatrove's MinHash pipeline with its default settings: near duplicates, so it keeps other dialogues than we do."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    config = MinhashConfig()
    signatures, buckets, removed, clean = (str(out / name) for name in ("signatures", "buckets", "removed", "clean"))
    reader = JsonlReader(str(folder), adapter=_document)
    begun = now()
    steps = (
        (2, [reader, MinhashDedupSignature(signatures, config)]),
        (config.num_buckets, [MinhashDedupBuckets(signatures, buckets, config=config)]),
        (1, [MinhashDedupCluster(buckets, removed, config=config)]),
        (2, [reader, MinhashDedupFilter(removed), JsonlWriter(clean, compression=None)]),
    )
    for number, (tasks, pipeline) in enumerate(steps):
        # Forked, so that the processes are children of this one and their CPU time counts.
        options = {"tasks": tasks, "workers": workers, "start_method": "fork"}
        LocalPipelineExecutor(pipeline, logging_dir=str(out / f"log-{number}"), **options).run()
    parts = now()[None] - begun
    rows = sum(path.read_bytes().count(b"\n") for path in Path(clean).iterdir())
    return {"parts": parts, "kept": np.arange(rows)}


RUNNERS = {"ours": run_ours, "naive": run_naive, "datatrove": run_library}


def _tree_rss(root: int) -> int:
    """Resident memory of a process and all below it, in bytes; pages they share count more than once."""
    total, waiting = 0, [root]
    while waiting:
        process = Path("/proc", str(waiting.pop()))
        try:
            total += int((process / "statm").read_text().split()[1]) * resource.getpagesize()
            for task in (process / "task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, IndexError):
            continue  # it just ended
    return total


def measure(name: str, folder: Path, workers: int, python: str = sys.executable) -> dict | None:
    """Run one candidate in a process of its own; None if it failed."""
    out = folder.parent / "out"
    command = [python, __file__, "--candidate", name, "--folder", folder, "--workers", str(workers)]
    peak = 0
    with (folder.parent / "log").open("w+") as log:
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, _tree_rss(process.pid))
            time.sleep(0.05)
        shutil.rmtree(out, ignore_errors=True)
        if process.returncode:
            log.seek(0)
            reason = (log.read().strip().splitlines() or ["killed"])[-1]
            print(f"{name} with {workers} processes failed: {reason}")
            return None
    with np.load(folder.parent / "result.npz") as result:
        return dict(result) | {"peak": peak}


def show(name: str, n: int, size: int, run: dict, parts: slice = slice(None)) -> np.ndarray:
    """Print a line of the table; returns the wall and CPU time of these parts of the run."""
    wall, cpu = run["parts"][parts].sum(0)
    columns = f"{wall:>8.1f}{cpu:>8.1f}{size / MIB / wall:>8.2f}{size / MIB / cpu:>9.2f}{n / wall:>9,.0f}"
    print(f"{n:>9,}  {name:<32}{columns}{run['peak'] / GIB:>7.2f}{len(run['kept']):>11,}", flush=True)
    return np.array([wall, cpu])


def show_ours(n: int, size: int, run: dict, workers: int) -> np.ndarray:
    """Print the lines of one run; returns its times up to the point where the kept rows are known."""
    show(f"ours, {workers} worker{'s'[: workers - 1]}: whole prepare", n, size, run)
    show("   shared n-grams and ledger alone", n, size, run, slice(1, 2))
    return show("   all but the shards", n, size, run, slice(2))


def quickest(runs: list[dict | None], parts: slice) -> dict | None:
    """The run with the least CPU time in these parts: the least disturbed one."""
    return min(filter(None, runs), key=lambda run: run["parts"][parts].sum(0)[1], default=None)


def compare(n: int, size: int, folder: Path) -> None:
    """Ours with one worker and the naive version, in turns on the same files; the quickest of each counts."""
    runs = [(measure("ours", folder, 1), measure("naive", folder, 1)) for _ in range(REPEATS)]
    ours, naive = quickest([run for run, _ in runs], slice(2)), quickest([run for _, run in runs], slice(None))
    if ours:
        our_times = show_ours(n, size, ours, 1)
    if naive:
        naive_times = show("naive set, 1 process", n, size, naive)
    if ours and naive:
        wall, cpu = naive_times / our_times
        print(f"Ours (1 worker, all but the shards) to naive: {wall:.1f}x by wall time, {cpu:.1f}x by CPU time.")
        if not np.array_equal(ours["kept"], naive["kept"]):
            sys.exit("Ours and naive keep DIFFERENT dialogues.")
        print("Ours and naive keep the same dialogues.")


def show_growth(growth: list[tuple[float, ...]]) -> None:
    """Lines through wall times and CPU times over numbers of dialogues."""
    n, wall, cpu, peak, n_grams = np.array(growth, float).T
    many_grams = PAPER_GRAMS * n[-1] / n_grams[-1]  # dialogues of this length with as many n-grams as the paper's
    for name, times in (("Wall", wall), ("CPU", cpu)):
        slope, start = np.polyfit(n, times, 1)
        off = np.abs(times / (start + slope * n) - 1).max()
        exponent = np.polyfit(np.log(n), np.log(times), 1)[0]
        print(
            f"{name} time: {start:.1f} s + {1e6 * slope:.0f} us a dialogue, off by {off:.0%} at most, ~ n^{exponent:.2f};"
        )
        print(f"  for 11.4M dialogues {(start + slope * PAPER_DIALOGUES) / 60:.0f} min, ", end="")
        print(f"for 8 billion n-grams {(start + slope * many_grams) / 3600:.1f} h.")
    print(f"Peak memory: {peak[-1] / GIB:.2f} GiB for {n[-1]:,.0f} dialogues.")


def files(temporary: str, n: int) -> tuple[Path, int]:
    """Generated dialogues and their size in bytes."""
    folder = Path(temporary, "input")
    generate(folder, n)
    return folder, sum(path.stat().st_size for path in folder.iterdir())


def compare_library(n: int, python: str) -> None:
    """The library and ours on the same files, fewer of them: the library takes milliseconds a dialogue."""
    if subprocess.run([python, "-c", "import datatrove.pipeline.dedup"], capture_output=True, check=False).returncode:
        print('datatrove is not installed and left out: pip install "datatrove[io,processing,multilingual]" spacy')
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, size = files(temporary, n)
        if library := measure("datatrove", folder, 2, python):
            show("datatrove MinHash, 2 processes", n, size, library)
        if ours := measure("ours", folder, 2):
            show_ours(n, size, ours, 2)


def main(sizes: list[int], library_python: str) -> None:
    head = f"{'wall s':>8}{'CPU s':>8}{'MB/s':>8}{'MB/CPU s':>9}{'rows/s':>9}{'GiB':>7}{'kept':>11}"
    print(f"{'dialogues':>9}  {'candidate':<32}{head}", flush=True)
    compare_library(LIBRARY_DIALOGUES, library_python)
    growth = []
    for n in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder, size = files(temporary, n)
            if ours := measure("ours", folder, 2):
                show_ours(n, size, ours, 2)
                growth.append((n, *ours["parts"].sum(0), ours["peak"], ours["n_grams"]))
            if n == sizes[0]:
                compare(n, size, folder)
    show_growth(growth)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20_000, 40_000], help="dialogues; naive: at the first")
    parser.add_argument("--library-python", default=sys.executable, help="an interpreter that has datatrove")
    parser.add_argument("--candidate", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.candidate:
        out = arguments.folder.parent / "out"
        measured = RUNNERS[arguments.candidate](arguments.folder, out, arguments.workers)
        np.savez(arguments.folder.parent / "result.npz", **measured)
    else:
        main(sorted(arguments.sizes), arguments.library_python)
