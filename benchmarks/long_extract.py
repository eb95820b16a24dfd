"""A long extraction that is killed: twice as a whole, by SIGKILL at random moments, and once one of its two workers.

    python benchmarks/long_extract.py [--tokens 20000000] [--d-in 64] [--seed 0] [--folder DIR]

A tiny random model over a generated corpus. Each time the same command is run again. At the end: the ledger's sum, what
`verify` finds, and tokens a second over all the time, starts included.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_memory import make_corpus, make_model

COMMAND = "from fastcache.pipeline.cli import main; main()"
TOKENS_PER_DIALOGUE = 500
"""A little less than a dialogue of `make_corpus` has."""


def start(arguments: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", COMMAND, "extract", *arguments])


def workers_of(process_id: int) -> list[int]:
    children = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def n_parts(cache: Path) -> int:
    log = cache / "parts.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for(cache: Path, parts: int, process: "subprocess.Popen[bytes]") -> None:
    """Until the log has so many lines."""
    while n_parts(cache) < parts:
        if process.poll() is not None:
            raise SystemExit(f"The run ended with code {process.returncode}, before {parts} parts were there.")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--d-in", type=int, default=64)
    parser.add_argument("--unit-tokens", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run(given, given.folder or Path(name))


def run(given: argparse.Namespace, folder: Path) -> None:
    rng = random.Random(given.seed)
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(folder / "model", given.d_in, 2 * given.d_in, 2, 4)
    corpus = make_corpus(folder / "corpus", given.tokens // TOKENS_PER_DIALOGUE + 100, given.seed, words=150)
    cache = folder / "cache"
    arguments = ["--model", str(model), "--layer", "1", "--corpus", str(corpus), "--tokens", str(given.tokens)]
    arguments += ["--unit-tokens", str(given.unit_tokens), "--workers", "2", "--out", str(cache)]
    expected = given.tokens // given.unit_tokens
    moments = sorted(rng.sample(range(1, max(4, expected - 1)), 3))
    print(f"about {expected} parts; kills after {moments[0]}, {moments[1]} (a worker) and {moments[2]}", flush=True)
    begun = time.perf_counter()
    process = start(arguments)
    for victim, moment in zip(("run", "worker", "run"), moments, strict=True):
        wait_for(cache, moment, process)
        time.sleep(rng.random())
        if victim == "worker":
            os.kill(rng.choice(workers_of(process.pid)), signal.SIGKILL)
        else:
            process.kill()
            process.wait()
        print(f"SIGKILL to the {victim} at {n_parts(cache)} parts", flush=True)
        if victim == "run":
            process = start(arguments)
    if process.wait():
        raise SystemExit("The last run failed.")
    report(cache, time.perf_counter() - begun)


def report(cache: Path, seconds: float) -> None:
    """The figures at the end; exits with 1 if the ledger isn't complete or something is wrong."""
    manifest = json.loads((cache / "manifest.json").read_text())
    ledger, n_tokens = manifest["ledger"], manifest["totals"]["n_tokens"]
    outcomes = ("stored", "truncated", "failed", "not reached")
    accounted = sum(ledger[name] for name in outcomes) + sum(ledger["skipped"].values())
    verified = subprocess.run([sys.executable, "-c", COMMAND, "verify", str(cache)], check=False).returncode
    complete = manifest["state"] == "complete" and not manifest["failed"] and accounted == ledger["rows"]
    print(
        f"ledger: {accounted:,} of {ledger['rows']:,} rows accounted for, {'complete' if complete else 'NOT complete'}"
    )
    print(f"verify: {'clean' if not verified else 'NOT clean'}")
    print(
        f"{n_tokens:,} tokens in {manifest['totals']['n_parts']} parts, {seconds:,.0f} s, {n_tokens / seconds:,.0f} tokens/s"
    )
    sys.exit(0 if complete and not verified else 1)


if __name__ == "__main__":
    main()
