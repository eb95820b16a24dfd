"""Training steps: ours beside SAELens, dictionary_learning, sparsify and minimal eager torch, and the bare products.

    python -m venv peers && peers/bin/pip install torch==2.13.0
    peers/bin/pip install torch==2.13.0 sae-lens==6.54.12 dictionary-learning==0.1.0 eai-sparsify==1.3.3 .
    peers/bin/pip uninstall -y torchvision    # where the index has one for another build of torch
    peers/bin/python benchmarks/bench_train.py
    python benchmarks/bench_train.py --shapes 256/2048 --batches 4096 --l0 70 --rounds 3   # what isn't installed is left out

For each shape, batch, architecture and L0, all candidates take turns on the same batches; times are medians over rounds,
ratios medians of the ratios within a round. "of bound" is the time of five bare products, in the way that the probe chose,
over that of the step. The default goes sparse by itself where few latents are active: then it can be above 1. With one
thread, CPU seconds of the process are measured, which other work on the machine hardly disturbs; with more, wall time.
Then: several SAEs on one stream, and batches read from disk.
"""

import argparse
import importlib.util
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from train_candidates import PEERS, Problem, Step, eager, ours, products

from fastcache.sae.fast.products import ROUTES, choose_route, product_error

ARCHES = ("standard", "jumprelu")
N_BATCHES = 4
TARGETS = {"ours, dense": 3.0, "ours, default": 7.0, "ours, bf16": 5.0}
SMALL_BATCH_TARGET = 2.0
Times = dict[str, list[float]]


def data(d_in: int, batch: int) -> list[torch.Tensor]:
    """Sparse sums of random directions with some noise, scaled to a mean squared norm of d_in."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * d_in, d_in, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    found = []
    for _ in range(N_BATCHES):
        active = torch.rand(batch, 4 * d_in, generator=generator) < 16 / (4 * d_in)
        x = (torch.rand(batch, 4 * d_in, generator=generator) * active) @ directions
        found.append(x + 0.02 * torch.randn(batch, d_in, generator=generator))
    scale = (d_in / torch.cat(found).square().sum(1).mean()) ** 0.5
    return [x * scale for x in found]


def take_turns(steps: dict[str, Step], batches: list[torch.Tensor], rounds: int, clock: Callable[[], float]) -> Times:
    """Seconds a step, one figure a round; the first round warms up, and short steps are repeated within a turn."""
    times: Times = {name: [] for name in steps}
    repeats: dict[str, int] = {}
    for number in range(rounds + 1):
        x = batches[number % len(batches)]
        for name, step in steps.items():
            if number == 0:
                repeats[name] = _repeats(step, x, clock)
                continue
            start = clock()
            for _ in range(repeats[name]):
                step(x)
            times[name].append((clock() - start) / repeats[name])
    return times


def _repeats(step: Step, x: torch.Tensor, clock: Callable[[], float]) -> int:
    """Steps in a turn: about a fifth of a second's. Warms up: the first step compiles and allocates."""
    for _ in range(2):
        start = clock()
        step(x)
        taken = clock() - start
        if taken > 2:
            return 1
    return max(1, min(50, int(0.2 / max(taken, 1e-6))))


def ratio(times: Times, slow: str, fast: str) -> float:
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def cell(problem: Problem, everything: bool, arguments: argparse.Namespace, route, bf16: bool) -> Times:
    """All candidates on one problem; `everything`: those too whose time doesn't depend on L0."""
    steps: dict[str, Step] = {
        "five products": products(problem, route),
        "ours, default": ours(problem, "sparse", route),
    }
    if everything:
        steps |= {
            "ours, dense": ours(problem, "dense", route),
            "ours, no compiler": ours(problem, "torch", route),
            "ours, --plain": ours(problem, "plain"),
        }
        if bf16:
            steps |= {
                "five products, bf16": products(problem, ROUTES["bf16"]),
                "ours, bf16": ours(problem, "dense", ROUTES["bf16"]),
            }
        for name, (module, make) in PEERS.items():
            if importlib.util.find_spec(module):
                steps[name] = make(problem)
        steps["eager torch"] = eager(problem)
    elif importlib.util.find_spec("sae_lens"):
        steps["SAELens"] = PEERS["SAELens"][1](problem)
    return take_turns(steps, problem.batches, arguments.rounds, arguments.clock)


def show(problem: Problem, times: Times) -> None:
    against = "SAELens" if "SAELens" in times else "eager torch" if "eager torch" in times else "five products"
    title = f"{problem.arch} {problem.d_in}/{problem.d_sae:,}, batch {problem.batch:,}, L0 {problem.l0}"
    print(f"\n{title:44}{'ms':>9}{'tokens/s':>11}{'of bound':>10}{'x ' + against:>21}")
    for name, found in times.items():
        taken = statistics.median(found)
        bound = "five products, bf16" if "bf16" in name else "five products"
        share, gain = ratio(times, bound, name), ratio(times, against, name)
        target = SMALL_BATCH_TARGET if problem.batch <= 128 else TARGETS.get(name)
        note = ""
        if against == "SAELens" and target and name in TARGETS and (name != "ours, default" or problem.l0 <= 70):
            note = f"  target {target:g}: {'met' if gain >= target else 'missed'}"
        print(
            f"  {name:42}{1000 * taken:>9.1f}{problem.batch / taken:>11,.0f}{share:>10.2f}{gain:>21.2f}{note}",
            flush=True,
        )


def several(arguments: argparse.Namespace, route) -> None:
    """K SAEs on one stream of batches, in a loop, as a sweep does."""
    batches = data(256, 4096)
    print(f"\n{'K SAEs 256/2,048 on one stream, L0 70':44}{'ms':>9}{'ms an SAE':>11}")
    for k in arguments.k:
        problem = Problem("jumprelu", 256, 2048, 4096, 70, batches)
        saes = [ours(problem, "sparse", route) for _ in range(k)]
        steps = {f"ours, default, K = {k}": lambda x, saes=saes: [step(x) for step in saes]}
        for name, found in take_turns(steps, batches, arguments.rounds, arguments.clock).items():
            taken = 1000 * statistics.median(found)
            print(f"  {name:42}{taken:>9.1f}{taken / k:>11.1f}", flush=True)


def from_disk(arguments: argparse.Namespace, route) -> None:
    """The same steps on batches from a cache on disk, through the mixing buffer, and on batches in memory."""
    from cache_files import HOOK, write_cache

    from fastcache.cache_format.reader import open_cache
    from fastcache.stages.train.stream import MixingBuffer
    from fastcache.stages.train.task import to_tensor

    problem = Problem("jumprelu", 896, 7168, 4096, 70, data(896, 4096))
    step, n_steps = ours(problem, "sparse", route), 8
    with tempfile.TemporaryDirectory(dir=arguments.out) as folder:
        write_cache(Path(folder) / "cache", 1.0, 896)
        cache = open_cache(Path(folder) / "cache")
        buffer = MixingBuffer(cache, HOOK, 131_072, 4096, seed=0)
        scale = float(
            problem.batches[0].norm(dim=1).mean()
            / to_tensor(buffer.next_batch()[1], "bfloat16", "cpu").norm(dim=1).mean()
        )
        held = [to_tensor(buffer.next_batch()[1], "bfloat16", "cpu") * scale for _ in range(n_steps)]

        def memory(_x: torch.Tensor) -> None:
            for x in held:
                step(x)

        def disk(_x: torch.Tensor) -> None:
            for _ in range(n_steps):
                step(to_tensor(buffer.next_batch()[1], "bfloat16", "cpu").mul_(scale))

        times = take_turns({"memory": memory, "disk": disk}, problem.batches, arguments.rounds, arguments.clock)
    cost = ratio(times, "disk", "memory") - 1
    per_step = {name: 1000 * statistics.median(found) / n_steps for name, found in times.items()}
    print(
        f"\nsparse steps 896/7,168, batch 4,096: {per_step['memory']:.0f} ms from memory, {per_step['disk']:.0f} ms from disk"
    )
    print(f"streaming costs {100 * cost:.1f} %, target under 5: {'met' if cost < 0.05 else 'missed'}", flush=True)


def environment(arguments: argparse.Namespace, route) -> None:
    names = {"sae_lens": "sae-lens", "dictionary_learning": "dictionary-learning", "sparsify": "eai-sparsify"}
    there = [f"{p} {version(p)}" for module, p in names.items() if importlib.util.find_spec(module)]
    missing = [name for name, (module, _) in PEERS.items() if not importlib.util.find_spec(module)]
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    clock = "CPU seconds" if arguments.threads == 1 else "wall time"
    print(f"{cpu}; torch {torch.__version__}, Python {platform.python_version()}, {', '.join(there)}")
    print(f"{arguments.threads} threads, {clock}, {arguments.rounds} rounds; products by {route.name}", flush=True)
    if missing:
        print(f"Not installed, and left out: {', '.join(missing)}.")


def bf16_is_native() -> bool:
    """Whether bfloat16 products are worth measuring: where they are emulated they take many times as long."""
    problem = Problem("standard", 128, 512, 256, 30, data(128, 256))
    steps = {"float32": products(problem, ROUTES["float32"]), "bf16": products(problem, ROUTES["bf16"])}
    slowdown = ratio(take_turns(steps, problem.batches, 3, time.process_time), "bf16", "float32")
    if slowdown > 3:
        print(f"bfloat16 products take {slowdown:.0f} times as long as float32's here; left out.")
    return slowdown <= 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["256/2048", "896/7168"], help="d_in/d_sae")
    parser.add_argument("--batches", nargs="+", type=int, default=[4096, 128])
    parser.add_argument("--l0", nargs="+", type=int, default=[70, 30, 300])
    parser.add_argument("--arches", nargs="+", default=list(ARCHES), choices=ARCHES)
    parser.add_argument("--k", nargs="*", type=int, default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-disk", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the cache, on the disk to be measured")
    arguments = parser.parse_args()
    arguments.clock = time.process_time if arguments.threads == 1 else time.perf_counter
    torch.set_num_threads(arguments.threads)
    device = torch.device("cpu")
    route = choose_route("float32", device)
    environment(arguments, route)
    print(f"error of a product: {product_error(route, device):.1e}")
    bf16 = bf16_is_native()
    for shape in arguments.shapes:
        d_in, d_sae = map(int, shape.split("/"))
        for batch in arguments.batches:
            batches = data(d_in, batch)
            for arch in arguments.arches:
                for number, l0 in enumerate(arguments.l0):
                    problem = Problem(arch, d_in, d_sae, batch, l0, batches)
                    show(problem, cell(problem, number == 0, arguments, route, bf16))
    if arguments.k:
        several(arguments, route)
    if not arguments.no_disk:
        from_disk(arguments, route)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    sys.exit(main())
