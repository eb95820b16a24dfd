"""A sweep of 8 SAEs from one cache, beside SAELens runs that each read their own cache; and what streaming costs.

    peers/bin/python benchmarks/bench_sweep.py     # the environment of bench_train.py
    peers/bin/python benchmarks/bench_sweep.py --tokens 1_000_000 --all

The same rows lie in a fastcache cache and in the Arrow data set that SAELens' cache runner leaves. Ours: `sweep`, from the
opening of the cache to eight saved SAEs, 4 JumpReLU and 4 Standard. SAELens: the steps of its `SAETrainer` on its
`ActivationsStore`, from the opening of its cache on, nothing saved; by default one run of each architecture in a round, each
counted four times; `--all` runs all eight. All begin at the L0 of an SAE well into its training, which a learning rate near
0 keeps: so steps are those of a long run. `--from-dense`: ours trains by its recipe from its own beginning, where Standard
is dense for some hundred steps. Both have a JumpReLU band of 0.05, SAELens' default; `--bandwidth 1` is our recipe's, in which
so many latents lie that ours takes dense steps.

One thread. CPU seconds are of the whole process, threads that read included. The cost of streaming is the CPU time of
drawing all batches of the sweep from disk, checked and mixed, over that of the rest of the sweep: a difference of two
whole sweeps would be lost in the noise of a busy machine.
"""

import argparse
import contextlib
import importlib.util
import io
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import torch
from cache_files import HOOK
from train_candidates import BANDWIDTH, LR, Problem, saelens

from fastcache.cache_format.manifest import Manifest
from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.reader import Cache, open_cache
from fastcache.cache_format.schema import UNIT_ROWS, TokenType, decode
from fastcache.cache_format.writer import CacheWriter
from fastcache.files import read_json_lines
from fastcache.progress import Silent
from fastcache.stages.train.sweep import sweep
from fastcache.stages.train.sweep_config import SweepConfig, sweep_config
from fastcache.stages.train.task import prepare_task, to_tensor
from fastcache.stages.train.trainer import Trainer

ARCHES = ("standard", "jumprelu")
TARGET, STREAMING_TARGET = 6.0, 0.05
SAELENS = importlib.util.find_spec("sae_lens") is not None
PART_TOKENS = 128 * UNIT_ROWS


class Seconds(NamedTuple):
    """Of one piece of work."""

    cpu: float
    wall: float


def timed(work: Callable[[], Any]) -> Seconds:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def rows(n: int, d_in: int) -> np.ndarray:
    """Sparse sums of random directions with some noise `[n, d_in]`, with a mean squared norm of d_in."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((4 * d_in, d_in), np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    active = rng.random((n, 4 * d_in), np.float32) < 16 / (4 * d_in)
    x = (rng.random((n, 4 * d_in), np.float32) * active) @ directions
    x += 0.02 * rng.standard_normal((n, d_in), np.float32)
    return x * np.sqrt(d_in / np.square(x).sum(1).mean())


def write_cache(folder: Path, n_tokens: int, d_in: int) -> None:
    """A complete cache of dialogues of 256 tokens."""
    identity = {"hook_points": [HOOK], "d_in": d_in, "dtype": "bfloat16", "corpus": {"split": "train"}}
    identity |= {"model": {"name": "synthetic"}, "tokenizer": {}, "method": {"name": "fast"}}
    types = np.full(UNIT_ROWS, TokenType.CONTENT, np.uint8)
    pool = rows(PART_TOKENS, d_in)
    rng = np.random.default_rng(1)
    with CacheWriter(folder, Manifest(identity)) as writer:
        for index, first in enumerate(range(0, n_tokens // UNIT_ROWS, PART_TOKENS // UNIT_ROWS)):
            last = min(first + PART_TOKENS // UNIT_ROWS, n_tokens // UNIT_ROWS)
            ids = np.arange(UNIT_ROWS, dtype=np.int32)
            instances = [Instance(number, ids, types, [(number, 0)]) for number in range(first, last)]
            part = writer.part(index, instances)
            for _ in instances:
                part.append({HOOK: pool[rng.integers(len(pool), size=UNIT_ROWS)]})
            part.commit({"stored": len(instances), "truncated": [], "skipped": {}})
        cache = Cache(writer.storage)
        writer.manifest.totals = {
            "n_tokens": cache.n_tokens,
            "n_instances": cache.n_instances,
            "n_parts": len(cache.parts),
        }
        writer.manifest.statistics = {HOOK: cache.summary(HOOK)}
        writer.manifest.state = "complete"
        writer.save_manifest()


def write_arrow(cache: Cache, folder: Path) -> None:
    """One Arrow data set of float32 sequences `[context, d_in]`, as SAELens' cache runner leaves it."""
    import datasets

    datasets.disable_progress_bars()

    def sequences() -> Iterator[dict[str, Any]]:
        for part in cache.parts:
            stored = part.rows(HOOK, 0, part.record.n_tokens)
            for sequence in decode(stored, "bfloat16").reshape(-1, UNIT_ROWS, cache.d_in):
                yield {"rows": sequence}

    features = datasets.Features({"rows": datasets.Array2D((UNIT_ROWS, cache.d_in), "float32")})
    made = datasets.Dataset.from_generator(sequences, features, cache_dir=str(folder.with_name("made")))
    made.save_to_disk(folder)


def our_sweep(cache: Path, arguments: argparse.Namespace) -> SweepConfig:
    """Four JumpReLU SAEs, and four Standard ones whose seed is the number of their L0."""
    base = {
        "batch_size": arguments.batch, "expansion": arguments.expansion, "device": "cpu", "checkpoint_every": 10**9,
        "tokens": arguments.tokens // arguments.batch * arguments.batch, "log_every": 10,
    }  # fmt: skip
    if not arguments.from_dense:
        base["lr"] = LR
    runs: list[dict[str, Any]]
    runs = [{"arch": "jumprelu", "target_l0": l0, "bandwidth": arguments.bandwidth} for l0 in arguments.l0]
    runs += [{"arch": "standard", "seed": number} for number in range(len(arguments.l0))]
    return sweep_config({"cache": str(cache), "base": base, "runs": runs})


@contextlib.contextmanager
def begun_sparse(arguments: argparse.Namespace) -> Iterator[None]:
    """Standard SAEs begin with encoder biases at which they have the wanted L0; JumpReLU's recipe does that by itself."""
    plain = Trainer.initialise

    def initialise(trainer: Trainer, sample: torch.Tensor, median: torch.Tensor) -> None:
        plain(trainer, sample, median)
        if trainer.recipe.arch == "standard" and not arguments.from_dense:
            with torch.no_grad():
                z = (sample[:512] * trainer.scale @ trainer.sae.W_enc + trainer.sae.b_enc).flatten()
                share = arguments.l0[trainer.recipe.seed] / trainer.recipe.d_sae
                trainer.sae.b_enc -= z.kthvalue(int(len(z) * (1 - share))).values

    with patch.object(Trainer, "initialise", initialise):
        yield


def saelens_run(folder: Path, problem: Problem, arguments: argparse.Namespace) -> None:
    """Train one SAE by SAELens from its cache."""
    from sae_lens.training.activations_store import ActivationsStore

    store = ActivationsStore(
        model=None, dataset=None, streaming=False, hook_name="rows", hook_head_index=None, context_size=UNIT_ROWS,
        d_in=arguments.d_in, n_batches_in_buffer=20, total_training_tokens=arguments.tokens, store_batch_size_prompts=32,
        train_batch_size_tokens=arguments.batch, prepend_bos=False, normalize_activations="none",
        device=torch.device("cpu"), dtype="float32", cached_activations_path=str(folder),
    )  # fmt: skip  # buffer and batch of prompts as its LanguageModelSAERunnerConfig has them
    step = saelens(problem)
    for _ in range(arguments.tokens // arguments.batch):
        step(next(store))


def draw_all(config: SweepConfig) -> None:
    """Read, check and mix every batch of the sweep, and make a tensor of it."""
    task = prepare_task(next(iter(config.members.values())))
    buffer = task.buffer()
    for _ in range(task.recipe.steps):
        to_tensor(buffer.next_batch()[1], task.cache.manifest.dtype, "cpu")


def one_round(folder: Path, arguments: argparse.Namespace, number: int) -> dict[str, Seconds]:
    """All candidates once."""
    config = our_sweep(folder / "cache", arguments)
    out = folder / f"sweep-{number}"
    with begun_sparse(arguments):
        found = {"sweep": timed(lambda: sweep(config, out, Silent()))}
    found["stream"] = timed(lambda: draw_all(config))
    for name in config.members:
        l0 = [line["l0"] for line in read_json_lines(out / name / "metrics.jsonl")]
        print(f"    ours {name}: L0 {l0[0]:.0f} in the beginning, {l0[-1]:.0f} in the end")
    copies = 4 if arguments.all else 1
    if not SAELENS:
        print(f"  round {number}, CPU / wall seconds: sweep {found['sweep'].cpu:.1f} / {found['sweep'].wall:.1f}")
        return found
    d_in, batch = arguments.d_in, arguments.batch
    for arch in ARCHES:
        l0s = arguments.l0[:copies]
        x = torch.from_numpy(rows(1024, d_in))
        problems = [Problem(arch, d_in, d_in * arguments.expansion, batch, l0, [x]) for l0 in l0s]
        taken = timed(lambda problems=problems: [saelens_run(folder / "arrow", each, arguments) for each in problems])
        found[arch] = Seconds(*(4 / copies * seconds for seconds in taken))
        print(f"    SAELens {arch}: {taken.cpu / copies:.1f} CPU seconds a run")
    found["SAELens"] = Seconds(*(sum(pair) for pair in zip(*(found[arch] for arch in ARCHES), strict=True)))
    line = ", ".join(f"{name} {each.cpu:.1f} / {each.wall:.1f}" for name, each in found.items() if name not in ARCHES)
    print(f"  round {number}, CPU / wall seconds: {line}", flush=True)
    return found


def show(rounds: list[dict[str, Seconds]], arguments: argparse.Namespace) -> None:
    for kind in Seconds._fields if SAELENS else ():
        ours, theirs = (
            statistics.median(getattr(each[name], kind) for each in rounds) for name in ("sweep", "SAELens")
        )
        gain = statistics.median(getattr(each["SAELens"], kind) / getattr(each["sweep"], kind) for each in rounds)
        how = "measured" if arguments.all else "two measured, times four"
        met = "met" if gain >= TARGET else "missed"
        print(f"{kind}: 8 SAEs by sweep {ours:.1f} s, by eight SAELens runs ({how}) {theirs:.1f} s: {gain:.2f} x")
        print(f"  target {TARGET:g}: {met}")
    cost = statistics.median(each["stream"].cpu / (each["sweep"].cpu - each["stream"].cpu) for each in rounds)
    for k, share in ((8, cost), (1, 8 * cost)):
        met = "met" if share < STREAMING_TARGET else "missed"
        print(f"streaming costs {100 * share:.2f} % of {k} SAEs' steps, CPU; target under 5: {met}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000, help="of the cache and of each SAE")
    parser.add_argument("--d-in", type=int, default=256)
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--l0", nargs=4, type=int, default=[30, 40, 50, 70], help="of the SAEs of an architecture")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="of our JumpReLU SAEs")
    parser.add_argument("--from-dense", action="store_true", help="ours trains from its own beginning")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--all", action="store_true", help="run all eight SAELens runs")
    parser.add_argument("--out", type=Path, help="folder for the caches, on the disk to be measured")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    peer = f"sae-lens {version('sae-lens')}" if SAELENS else "sae-lens is not installed and left out"
    print(f"{cpu}; torch {torch.__version__}, Python {platform.python_version()}, {peer}")
    print(f"{arguments.tokens:,} tokens, d_in {arguments.d_in}, d_sae {arguments.d_in * arguments.expansion:,}", end="")
    print(f", batch {arguments.batch:,}, band {arguments.bandwidth}, 1 thread, {arguments.rounds} rounds", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.out) as name:
        folder = Path(name)
        write_cache(folder / "cache", arguments.tokens, arguments.d_in)
        if SAELENS:
            write_arrow(open_cache(folder / "cache"), folder / "arrow")
        short = argparse.Namespace(**{**vars(arguments), "tokens": 3 * arguments.batch, "all": False})
        with contextlib.redirect_stdout(io.StringIO()):  # compiles, imports
            one_round(folder, short, 0)
        show([one_round(folder, arguments, number) for number in range(1, arguments.rounds + 1)], arguments)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
