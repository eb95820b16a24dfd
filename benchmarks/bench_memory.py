"""Peak memory of `extract`, beside what its plan says, and beside the same run over ten times the dialogues.

    python benchmarks/bench_memory.py [FOLDER]

Random models of two sizes, in float32 and bfloat16, by one process and by two workers; every run is a process of its
own. Peaks are the kernel's (VmHWM), summed over the processes of a run.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "seven", "grey", "owls", "counted", "stars", "overhead"]
SIZES = {"36M": (512, 2048, 8, 8), "103M": (1024, 4096, 6, 16)}
"""Width, width of the MLP, layers, heads."""


def make_model(folder: Path, d_in: int, width: int, n_layers: int, n_heads: int) -> Path:
    """A random model with the tokenizer of the demo's."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from fastcache.assets import DEMO

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=d_in, intermediate_size=width, num_hidden_layers=n_layers,
        num_attention_heads=n_heads, num_key_value_heads=max(1, n_heads // 2), max_position_embeddings=2048,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def make_corpus(folder: Path, n_rows: int, seed: int = 0, words: int = 30) -> Path:
    """Dialogues of random words."""
    from fastcache.progress import Silent
    from fastcache.stages.prepare.config import PrepareConfig
    from fastcache.stages.prepare.run import prepare

    rng = np.random.default_rng(seed)
    source = folder.with_suffix(".jsonl")
    with source.open("w") as file:
        for _ in range(n_rows):
            turns = [
                {
                    "role": ("user", "assistant")[turn % 2],
                    "content": " ".join(rng.choice(WORDS, rng.integers(1, words))),
                }
                for turn in range(2 * int(rng.integers(1, 4)))
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    settings = {"eval_rows": 0, "interpret_rows": 0, "steer_rows": 0}
    prepare(PrepareConfig(source=(str(source),), ngram=0, **settings), folder, Silent())
    return folder


def peak_of(process_id: int) -> int:
    """Peak resident bytes of a process."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0


def run_extract(arguments: list[str]) -> tuple[int, str]:
    """Summed peaks of the processes of a run, and what it printed."""
    command = [sys.executable, "-c", "from fastcache.pipeline.cli import main; main()", "extract", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "COLUMNS": "200"}
    )
    peaks: dict[int, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            try:
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            except OSError:
                continue
            for one in (process.pid, *map(int, children)):
                peaks[one] = max(peaks.get(one, 0), peak_of(one))

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed = process.communicate()[0]
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(printed)
    return sum(peaks.values()), printed


def planned(printed: str) -> int:
    """The bytes that the plan named."""
    words = printed.partition("Plan (estimates):")[2].split(" of memory")[0].split()
    return int(float(words[-2].replace(",", "")) * {"GB": 1e9, "MB": 1e6}[words[-1]])


def main(folder: Path) -> None:
    few, many = (make_corpus(folder / f"corpus-{n}", n) for n in (1500, 15_000))
    print(f"{'model':>6} {'dtype':>9} {'workers':>7} {'parity':>6} {'planned MB':>11} {'peak MB':>8} {'ratio':>6}")
    for name, size in SIZES.items():
        model = make_model(folder / name, *size)
        for dtype, workers, parity in (("float32", 1, 8), ("bfloat16", 1, 8), ("float32", 1, 0), ("float32", 2, 8)):
            options = [
                "--model",
                str(model),
                "--layer",
                "3",
                "--corpus",
                str(few),
                "--model-dtype",
                dtype,
                "--tokens",
                "20000",
            ]
            options += ["--parity", str(parity), "--workers", str(workers), "--unit-tokens", "10000"]
            peak, printed = run_extract([*options, "--out", str(folder / f"{name}-{dtype}-{workers}-{parity}")])
            plan = planned(printed)
            print(
                f"{name:>6} {dtype:>9} {workers:>7} {parity:>6} {plan / 1e6:>11.0f} {peak / 1e6:>8.0f} {plan / peak:>6.2f}",
                flush=True,
            )
    model = make_model(folder / "tiny", 64, 128, 2, 4)
    peaks = []
    for corpus in (few, many):
        options = ["--model", str(model), "--layer", "1", "--corpus", str(corpus), "--unit-tokens", "10000"]
        peaks.append(run_extract([*options, "--out", str(folder / f"tiny-{corpus.name}")])[0])
    print(f"1,500 dialogues: {peaks[0] / 1e6:.0f} MB; 15,000: {peaks[1] / 1e6:.0f} MB; ratio {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as name:
            main(Path(name))
