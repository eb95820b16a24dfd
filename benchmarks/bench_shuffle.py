"""Shuffle quality by unit and buffer: training's own order over 16M tokens, measured without a residual.

    python benchmarks/bench_shuffle.py
    python benchmarks/bench_shuffle.py --tokens 200000000 --units 256 --buffers 1048576 2097152

Dialogue lengths are lognormal (median 545, mean about 690 tokens); with FASTCACHE_TESTDATA set, the lengths of real
dialogues in Qwen2.5's chat template too. Prints distinct instances of a batch, variance inflation of a batch mean and
drift over the cache, beside a global permutation and sequential reading, and which units and buffers reach the targets.
"""

import argparse
import gzip
import json
import os
import platform
from itertools import islice
from pathlib import Path

import numpy as np

import fastcache
from fastcache.cache_format.schema import UNIT_ROWS
from fastcache.errors import InputError
from fastcache.progress import Silent
from fastcache.stages.extract.config import ExtractConfig
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.order import MixedOrder
from fastcache.stages.train.shuffle import RHO, Comparison, Quality, Runs, compare, tenths

TARGET_DISTINCT, TARGET_INFLATION = 0.8, 1.2
DIALOGUES_OF_A_FILE = 500


def lognormal_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.clip(np.exp(rng.normal(6.3, 0.7, count)), 40, 4096).astype(np.int64)


def real_lengths(folder: Path) -> np.ndarray:
    """Tokens of the first dialogues of each file of real dialogues."""
    from transformers import AutoTokenizer

    from fastcache.llm.chat import ChatRenderer

    renderer = ChatRenderer(AutoTokenizer.from_pretrained(folder / "tokenizers/qwen2.5"))
    lengths = []
    for path in sorted(path for kind in ("single", "multi") for path in (folder / "sft" / kind).iterdir()):
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            for line in islice(file, DIALOGUES_OF_A_FILE):
                try:
                    lengths.append(len(renderer.render(json.loads(line)["messages"]).token_ids))
                except InputError:
                    continue  # what extract skips too
    return np.array(lengths)


def cut(lengths: np.ndarray, n_tokens: int) -> tuple[Runs, np.ndarray]:
    """Instances up to `n_tokens`, and where the parts begin: at an instance, as `extract` cuts them."""
    stops = np.cumsum(lengths)
    stops = stops[stops <= n_tokens]
    starts = np.concatenate([[0], stops[:-1]])
    parts = [0]
    while parts[-1] + ExtractConfig.unit_tokens < stops[-1]:
        parts.append(int(starts[np.searchsorted(stops, parts[-1] + ExtractConfig.unit_tokens, side="right")]))
    return Runs(starts, np.arange(len(starts)), int(stops[-1])), np.array(parts)


def units_of(parts: np.ndarray, n_rows: int, unit: int) -> np.ndarray:
    """First row and last row + 1 of each unit; none crosses a part."""
    ends = [*parts[1:].tolist(), n_rows]
    pairs = [
        (a, min(a + unit, end)) for part, end in zip(parts.tolist(), ends, strict=True) for a in range(part, end, unit)
    ]
    return np.array(pairs, np.int64)


def line(name: str, quality: Quality, comparison: Comparison, verdict: str = "") -> None:
    share = quality.distinct / comparison.permutation.distinct
    figures = f"{quality.distinct:>9,.0f}{share:>8.3f}{quality.inflation:>11.3f}{quality.drift['place']:>8.3f}"
    print(f"{name:36}{figures}  {verdict}".rstrip(), flush=True)


def table(lengths: np.ndarray, arguments: argparse.Namespace) -> None:
    instances, parts = cut(lengths, arguments.tokens)
    n, batch, seed = instances.n_rows, arguments.batch_size, arguments.seed
    print(f"{n:,} tokens, {len(instances.starts):,} dialogues of {n / len(instances.starts):,.0f}, {len(parts)} parts")
    print(f"{'order':36}{'distinct':>9}{'share':>8}{'inflation':>11}{'drift':>8}")
    reached = []
    for unit in arguments.units:
        for buffer in arguments.buffers:
            order = MixedOrder(units_of(parts, n, unit), buffer, batch, seed)
            comparison = compare(order, instances, {"place": tenths(n)}, batch, seed, Silent())
            if not reached and (unit, buffer) == (arguments.units[0], arguments.buffers[0]):
                line("global permutation", comparison.permutation, comparison)
                line("sequential", comparison.sequential, comparison)
            met = comparison.distinct_ratio >= TARGET_DISTINCT and comparison.mixed.inflation <= TARGET_INFLATION
            reached += [(unit, buffer)] if met else []
            line(f"units of {unit:,}, buffer {buffer:,}", comparison.mixed, comparison, "met" if met else "missed")
    default = (UNIT_ROWS, TrainConfig.buffer_tokens)
    least = {unit: min(b for u, b in reached if u == unit) for unit, _ in reached}
    for unit, buffer in least.items():
        print(f"Units of {unit:,} need a buffer of {buffer:,} of those tried.")
    if default[0] in arguments.units and default[1] in arguments.buffers:
        print(
            f"The default, units of {default[0]} and a buffer of {default[1]:,}: {'met' if default in reached else 'missed'}."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_000_000)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--units", type=int, nargs="+", default=[64, 256, 1024, 16384])
    parser.add_argument("--buffers", type=int, nargs="+", default=[2**18, 2**20, 2**22])
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    arguments = parser.parse_args()
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, fastcache {fastcache.__version__}"
    print(f"{versions}; batches of {arguments.batch_size:,}, rho {RHO}")
    print(
        f"Targets: {TARGET_DISTINCT} of a global permutation's distinct dialogues, variance inflation {TARGET_INFLATION}"
    )
    rng = np.random.default_rng(arguments.seed)
    print("\nLognormal lengths")
    table(lognormal_lengths(rng, arguments.tokens // 400), arguments)
    if folder := os.environ.get("FASTCACHE_TESTDATA"):
        found = real_lengths(Path(folder))
        print(f"\nReal lengths: {len(found):,} dialogues, drawn again and again")
        table(rng.choice(found, arguments.tokens // int(found.mean() / 2)), arguments)


if __name__ == "__main__":
    main()
