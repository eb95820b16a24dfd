"""Tokens per second from tokens to a cache on disk: ours and the alternatives, same model, same instances, one run.

    FASTCACHE_TESTDATA=DIR python benchmarks/bench_extract.py
    python benchmarks/bench_extract.py --hidden 768 --tokens 8192 --saelens-python OTHER/bin/python
    OMP_NUM_THREADS=1 python benchmarks/bench_extract.py --vllm-python .venv-vllm/bin/python
    python benchmarks/bench_extract.py --layer 5 --vocabulary 151936
    python benchmarks/bench_extract.py --sweep
    python benchmarks/bench_extract.py --memory

A randomly initialised Qwen2-shaped model of 8 layers, float32 on the CPU; extract_candidates.py says what each candidate
does. By default the model is captured after its last layer and has a small vocabulary, so that every candidate runs
every layer and a language-model head, where it is run, costs little; `--layer` and `--vocabulary` make it as models are,
and the early stop count. Rounds go through all candidates in turn; ratios are taken within a round, and their median is
printed. With FASTCACHE_TESTDATA set, lengths are those of real dialogues; otherwise lognormal. SAELens and vLLM want
Python environments of their own (vLLM's is made by `make test-vllm`).

`--sweep` prints the speed by size of the pack, `--memory` the peak memory of a process that caches 1x and 10x as many
instances. The whole takes about 4 minutes on an idle core, half of them for SAELens.
"""

import argparse
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from bench_shuffle import lognormal_lengths, real_lengths
from extract_candidates import (
    BATCH_1,
    BLOCK,
    CANDIDATES,
    DENSE,
    OURS,
    SAELENS,
    VLLM,
    Child,
    Instances,
    Task,
    Work,
    dense_blocks,
    saelens,
    vllm,
    write,
)
from transformers import Qwen2Config, Qwen2ForCausalLM

import fastcache

N_LAYERS = 8
HEADS = {64: 2, 256: 4, 768: 12}
VLLM_TARGET = 0.93
TARGETS = {BATCH_1: 1.0, DENSE: 0.95, **dict.fromkeys(SAELENS, 3.0)}


def make_model(folder: Path, hidden: int, n_vocabulary: int) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=n_vocabulary, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=N_LAYERS,
        num_attention_heads=HEADS[hidden], num_key_value_heads=HEADS[hidden] // 2, max_position_embeddings=8192,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def make_instances(lengths: np.ndarray, n_tokens: int, n_vocabulary: int) -> Instances:
    """Instances of these lengths with `n_tokens` in all: the last one is cut."""
    rng = np.random.default_rng(0)
    stops = np.minimum(np.cumsum(rng.permutation(lengths)), n_tokens)
    sizes = np.diff(stops, prepend=0)
    return [rng.integers(0, n_vocabulary, size).astype(np.int32) for size in sizes[sizes > 0].tolist()]


def timed(work: Work) -> tuple[float, float]:
    """Wall and CPU seconds, all threads of this process included."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(task: Task, arguments: argparse.Namespace, folder: Path) -> None:
    runs: dict[str, Callable[[], tuple[float, float]]] = {}
    for name, prepare in CANDIDATES.items():
        runs[name] = partial(timed, prepare(task))
    others: list[Child] = []
    if arguments.vllm_python:
        others.append(vllm(arguments.vllm_python, task, folder))
        runs |= {name: partial(others[-1].seconds, work) for name, work in VLLM.items()}
    for name, kind in SAELENS.items() if arguments.saelens_python else ():
        others.append(saelens(arguments.saelens_python, kind, task, folder, arguments.threads))
        runs[name] = others[-1].seconds
    for other in others:
        print("other environment:", other.versions)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(arguments.rounds + 1):
        for name, run in runs.items():
            seconds = run()
            times[name] += [seconds] if number else []  # the first round warms up
    for other in others:
        other.close()
    report(times, sum(map(len, task.instances)))


def report(times: dict[str, list[tuple[float, float]]], n_tokens: int) -> None:
    print(f"{'candidate':34}{'tok/s':>8}{'tok/CPU s':>11}   ours to it, wall / CPU")
    for name, seconds in times.items():
        speeds = [n_tokens / statistics.median(column) for column in zip(*seconds, strict=True)]
        # Within a round, so that a busy spell of the machine weighs on both.
        wall, cpu = (
            statistics.median(it[kind] / our[kind] for it, our in zip(seconds, times[OURS], strict=True))
            for kind in (0, 1)
        )
        target = TARGETS.get(name)
        verdict = f"  target {target}: {'met' if cpu >= target else 'missed'}" if target else ""
        print(f"{name:34}{speeds[0]:>8,.0f}{speeds[1]:>11,.0f}{wall:>10.2f}x {cpu:>5.2f}x{verdict}", flush=True)
    if set(VLLM) <= set(times):
        ours, plain = (times[name] for name in VLLM)
        ratios = [statistics.median(b[kind] / a[kind] for a, b in zip(ours, plain, strict=True)) for kind in (0, 1)]
        verdict = "met" if ratios[1] >= VLLM_TARGET else "missed"
        print(
            f"vLLM with capture and writing to vLLM without: {ratios[0]:.2f}x wall, {ratios[1]:.2f}x CPU; "
            f"target {VLLM_TARGET}: {verdict}"
        )


def sweep(task: Task, rounds: int) -> None:
    """Speed by size of the pack, beside dense blocks."""
    works = {DENSE: dense_blocks(task)}
    for size in (1, 512, 1024, 2048, 4096, 8192):
        backend = task.backend(size)
        works[f"packs of {size:,}"] = partial(
            lambda backend: [None for _ in backend.residuals(task.instances)], backend
        )
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            seconds = timed(work)[1]
            times[name] += [seconds] if number else []
    print("tokens per CPU second")
    for name, found in times.items():
        print(f"{name:20}{sum(map(len, task.instances)) / statistics.median(found):>10,.0f}", flush=True)


def memory(lengths: np.ndarray, folder: Path) -> None:
    """Peak memory of a process that caches as many instances, and ten times as many, in units of one part."""
    model, n_tokens = make_model(folder / "model-64", 64, 4096), 200_000
    print("\nhidden 64; peak resident memory of a process that loads the model and writes the cache")
    np.save(folder / "lengths.npy", lengths)
    for factor in (0, 1, 10):
        command = [sys.executable, __file__, "--memory-child", str(model), str(factor * n_tokens)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout
        print(f"{factor * n_tokens:>10,} tokens: {int(answer) / 1024:,.0f} MiB", flush=True)


def memory_child(model: Path, n_tokens: int) -> None:
    backend = Task(model, 64, N_LAYERS - 1, []).backend()
    unit = 50_000
    for _ in range(0, n_tokens, unit):
        write(backend, 64, make_instances(np.load("lengths.npy"), unit, 4096))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 768], choices=sorted(HEADS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 4_096], help="for each --hidden")
    parser.add_argument("--layer", type=int, default=N_LAYERS - 1)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vllm-python", help="Python of an environment with vLLM; left out without it")
    parser.add_argument("--saelens-python", help="Python of an environment with sae-lens; left out without it")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--memory-child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.memory_child:
        return memory_child(Path(arguments.memory_child[0]), int(arguments.memory_child[1]))
    testdata = os.environ.get("FASTCACHE_TESTDATA")
    rng = np.random.default_rng(0)
    lengths = real_lengths(Path(testdata)) if testdata else lognormal_lengths(rng, 5000)
    lengths = np.minimum(lengths, BLOCK)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__},")
    print(f"fastcache {fastcache.__version__}; {arguments.threads} threads; median of {arguments.rounds} rounds")
    print(f"{'real' if testdata else 'lognormal'} lengths, mean {lengths.mean():,.0f}, cut to {BLOCK}")
    folder = Path(tempfile.mkdtemp())
    try:
        if arguments.memory:
            return memory(lengths, folder)
        for hidden, n_tokens in zip(arguments.hidden, arguments.tokens, strict=False):
            model = make_model(folder / f"model-{hidden}", hidden, arguments.vocabulary)
            instances = make_instances(lengths, n_tokens, arguments.vocabulary)
            print(
                f"\nhidden {hidden}: {n_tokens:,} tokens, {len(instances)} instances, layer {arguments.layer}",
                flush=True,
            )
            task = Task(model, hidden, arguments.layer, instances)
            if arguments.sweep:
                sweep(task, arguments.rounds)
            else:
                compare(task, arguments, folder)
        for name in ("saelens", "vllm") if not arguments.sweep else ():
            if not getattr(arguments, f"{name}_python"):
                print(f"\n{name} was left out: give --{name}-python.")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
