"""Deduplication of `fastcache prepare` against Algorithm 1 with a Python set, and against datatrove's MinHash.

    python benchmarks/bench_dedup.py
    python benchmarks/bench_dedup.py --sizes 250000 500000 1000000 2000000 --library-python OTHER-VENV/bin/python

Synthetic dialogues (a seed, a Zipf-like vocabulary, a quarter share a passage with an earlier one) are written to a
temporary folder. Every candidate runs in a process of its own: wall time and CPU time after its imports, memory as the
largest sum of resident sizes over its process tree. At the first size all are compared; at all sizes ours shows its growth.
The library is left out where it is not installed (`pip install "datatrove[processing]"`).
"""

import argparse
import itertools
import json
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
NAIVE_GIB = 14  # more than this the naive candidate may not take
MIB, GIB = 2**20, 2**30


def generate(folder: Path, n_dialogues: int, seed: int = 0) -> None:
    """Write the dialogues to two files; those of a smaller number are the first of a larger one."""
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


def _cpu() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


class Phases:
    """A `Progress` that notes when tasks begin and end."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    @contextmanager
    def task(self, name: str, total: int | None, unit: str):
        self.marks.append((time.perf_counter(), _cpu()))
        yield self
        self.marks.append((time.perf_counter(), _cpu()))

    def advance(self, amount: int, note: str = "") -> None: ...

    def say(self, text: str) -> None: ...


def run_ours(folder: Path, out: Path, workers: int) -> dict:
    import pyarrow.parquet as pq

    from fastcache.stages.prepare.config import PrepareConfig
    from fastcache.stages.prepare.run import prepare

    phases = Phases()
    begun = time.perf_counter(), _cpu()
    info = prepare(PrepareConfig(source=(str(folder),), workers=workers), out, phases)
    ended = time.perf_counter(), _cpu()
    ledger = pq.read_table(out / "ledger.parquet", columns=["outcome"])["outcome"].to_numpy()
    staged, written = phases.marks[1], phases.marks[4]  # the tasks: read and hash, find shared, deal, write
    steps = itertools.pairwise([begun, staged, written, ended])
    parts = [(stop[0] - start[0], stop[1] - start[1]) for start, stop in steps]
    return {"parts": parts, "kept": np.flatnonzero(ledger == "kept"), "n_grams": info["n_grams"]}


def run_naive(folder: Path, out: Path, workers: int) -> dict:
    """Algorithm 1, word by word as the paper has it; an exact duplicate of a whole dialogue is dropped too."""
    resource.setrlimit(resource.RLIMIT_AS, (NAIVE_GIB * GIB,) * 2)
    begun = time.perf_counter(), _cpu()
    seen: set = set()
    kept = []
    row = 0
    for path in sorted(folder.iterdir()):
        with path.open() as file:
            for row, line in enumerate(file, row):
                turns = [turn["content"] for turn in json.loads(line)["messages"]]
                grams = {tuple(turns)}
                for turn in turns:
                    words = turn.split()
                    grams.update(tuple(words[i : i + 20]) for i in range(len(words) - 19))
                if seen.isdisjoint(grams):
                    seen |= grams
                    kept.append(row)
        row += 1
    return {"parts": [(time.perf_counter() - begun[0], _cpu() - begun[1])], "kept": np.array(kept)}


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
    begun = time.perf_counter(), _cpu()
    steps = (
        (2, [reader, MinhashDedupSignature(signatures, config)]),
        (config.num_buckets, [MinhashDedupBuckets(signatures, buckets, config)]),
        (1, [MinhashDedupCluster(buckets, removed, config)]),
        (2, [reader, MinhashDedupFilter(removed), JsonlWriter(clean, compression=None)]),
    )
    for number, (tasks, pipeline) in enumerate(steps):
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=str(out / f"log-{number}")).run()
    parts = [(time.perf_counter() - begun[0], _cpu() - begun[1])]
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
    result = folder.parent / "result.npy"
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
    return np.load(result, allow_pickle=True).item() | {"peak": peak}


def show(name: str, n: int, size: int, run: dict, parts: list) -> tuple[float, float]:
    """Print a line of the table; returns MB a second of wall time and of CPU time."""
    wall, cpu = (sum(part[which] for part in parts) for which in (0, 1))
    speed, cpu_speed = size / MIB / wall, size / MIB / cpu
    columns = f"{wall:>8.1f}{cpu:>8.1f}{speed:>8.2f}{cpu_speed:>9.2f}{n / wall:>9,.0f}"
    print(f"{n:>9,}  {name:<32}{columns}{run['peak'] / GIB:>7.2f}{len(run['kept']):>11,}", flush=True)
    return speed, cpu_speed


def show_ours(n: int, size: int, run: dict, workers: int) -> tuple[float, float]:
    """Print the lines of one run; returns its speed up to the point where the kept rows are known."""
    show(f"ours, {workers} worker{'s'[: workers - 1]}: whole prepare", n, size, run, run["parts"])
    show("   shared n-grams and ledger alone", n, size, run, run["parts"][1:2])
    return show("   all but the shards", n, size, run, run["parts"][:2])


def compare(n: int, size: int, folder: Path, library_python: str) -> None:
    """The other candidates on the same files, after ours with one worker."""
    ours = measure("ours", folder, 1)
    naive = measure("naive", folder, 1)
    known = subprocess.run([library_python, "-c", "import datatrove.pipeline.dedup"], capture_output=True)
    library = None if known.returncode else measure("datatrove", folder, 2, library_python)
    our_speeds = show_ours(n, size, ours, 1) if ours else ()
    naive_speeds = show("naive set, 1 process", n, size, naive, naive["parts"]) if naive else ()
    if library:
        show("datatrove MinHash, 2 processes", n, size, library, library["parts"])
    elif known.returncode:
        print('datatrove is not installed and left out: pip install "datatrove[processing]".')
    if our_speeds and naive_speeds:
        wall, cpu = (mine / other for mine, other in zip(our_speeds, naive_speeds, strict=True))
        print(f"Ours (1 worker, all but the shards) to naive: {wall:.1f}x by wall time, {cpu:.1f}x by CPU time.")
        same = np.array_equal(ours["kept"], naive["kept"])
        print(f"Ours and naive keep {'the same dialogues' if same else 'DIFFERENT dialogues'}.\n")
        if not same:
            sys.exit(1)


def show_growth(growth: list[tuple[int, float, float, int]]) -> None:
    """A line through wall times over numbers of dialogues."""
    n, wall, peak, n_grams = (np.array(column, float) for column in zip(*growth, strict=True))
    slope, start = np.polyfit(n, wall, 1)
    off = np.abs(wall / (start + slope * n) - 1).max()
    exponent = np.polyfit(np.log(n), np.log(wall), 1)[0]
    per_dialogue = n_grams[-1] / n[-1]
    print(
        f"Growth: {start:.1f} s + {1e6 * slope:.1f} us a dialogue, off by at most {off:.0%}; time ~ n^{exponent:.2f}."
    )
    print(f"{PAPER_DIALOGUES / 1e6:.1f}M dialogues of this length: {(start + slope * PAPER_DIALOGUES) / 60:.0f} min.")
    hours = (start + slope * PAPER_GRAMS / per_dialogue) / 3600
    print(f"{PAPER_GRAMS / 1e9:.0f} billion n-grams, at {per_dialogue:.0f} a dialogue here: {hours:.1f} h.")
    print(f"Peak memory: {peak[-1] / GIB:.2f} GiB for {n[-1]:,.0f} dialogues.")


def main(sizes: list[int], library_python: str) -> None:
    head = f"{'wall s':>8}{'CPU s':>8}{'MB/s':>8}{'MB/CPU s':>9}{'rows/s':>9}{'GiB':>7}{'kept':>11}"
    print(f"{'dialogues':>9}  {'candidate':<32}{head}", flush=True)
    growth = []
    for n in sizes:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "input")
            generate(folder, n)
            size = sum(path.stat().st_size for path in folder.iterdir())
            if ours := measure("ours", folder, 2):
                show_ours(n, size, ours, 2)
                growth.append((n, sum(part[0] for part in ours["parts"]), ours["peak"], ours["n_grams"]))
            if n == sizes[0]:
                compare(n, size, folder, library_python)
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
        run = RUNNERS[arguments.candidate]
        result = run(arguments.folder, arguments.folder.parent / "out", arguments.workers)
        np.save(arguments.folder.parent / "result.npy", np.array(result, object))
    else:
        main(sorted(arguments.sizes), arguments.library_python)
