"""The same command gives the same SAE: on an idle and on a busy machine, undisturbed and killed, alone and in a sweep.

What is compared are the weights, `sae.json` and the log, byte by byte. The runs have some 10^9 tokens x d_in x d_sae. Of
this size the ways to multiply used to be timed, and near a tie the load of the machine decided.
"""

import hashlib
import itertools
import os
import random
import subprocess
import sys
import time

import pytest
from deaths import STEP, die
from load import changing_load
from processes import kill, n_lines, start_command, wait_for

from fastcache.pipeline.cli import main

RESULTS = ("sae.safetensors", "sae.json", "metrics.jsonl")
STEPS, FIRST_CHECKPOINT, BATCH = 32, 20, 512
MEMBER = {
    "arch": "batchtopk", "k": 16, "tokens": STEPS * BATCH, "batch_size": BATCH, "checkpoint_every": FIRST_CHECKPOINT,
    "log_every": 1, "dead_window": 10,
}  # fmt: skip


def digest_of(folder):
    """One SHA-256 of all that a run leaves for good."""
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in RESULTS)).hexdigest()


def train_command(cache, **settings):
    chosen = {name: value for name, value in (MEMBER | settings).items() if value is not None}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    return ["train", "--cache", str(cache), *options]


@pytest.fixture(scope="module")
def reference(small_cache, tmp_path_factory):
    """A command whose products are of a size that used to be measured, and what it ends with."""
    command = train_command(small_cache, layer=1, expansion=40)
    out = tmp_path_factory.mktemp("reference") / "sae"
    main([*command, "--out", str(out)])
    return command, digest_of(out)


def test_runs_under_changing_load_end_with_the_same_bits(reference, tmp_path):
    command, expected = reference
    with changing_load(1):
        processes = [start_command(*command, "--out", tmp_path / str(number)) for number in range(2)]
        for number, process in enumerate(processes):
            process.join()
            assert process.exitcode == 0
            assert digest_of(tmp_path / str(number)) == expected


@pytest.mark.parametrize("step_number", [0, 13, 27], ids=["at once", "before the first checkpoint", "after it"])
def test_a_run_killed_once_ends_with_the_same_bits(reference, tmp_path, step_number):
    command, expected = reference
    words = [*command, "--out", str(tmp_path / "sae")]
    die(STEP, step_number, main, words)
    assert bool(list((tmp_path / "sae").glob("checkpoints/[0-9]*"))) == (step_number >= FIRST_CHECKPOINT)
    main(words)
    assert digest_of(tmp_path / "sae") == expected


def test_products_round_alike_whatever_a_process_did_before():
    """MKL looks at its environment once, at its first product, whichever command makes it."""
    code = "import os, fastcache; print(os.environ['MKL_CBWR'], os.environ['OMP_DYNAMIC'])"
    environment = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"} | {"OMP_DYNAMIC": "TRUE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "AUTO,STRICT FALSE\n"


@pytest.fixture(scope="module")
def demo_cache(tmp_path_factory):
    """The demo model's residuals, as `extract` stores them by default."""
    out = tmp_path_factory.mktemp("demo") / "cache"
    main(["extract", "--model", "demo", "--corpus", "demo", "--layer", "2", "--tokens", "30000", "--parity", "1",
          "--dtype", "float32", "--out", str(out)])  # fmt: skip
    return out


def run_fresh(command, out):
    """In a process that begins from nothing."""
    code = "from fastcache.pipeline.cli import main; main()"
    words = [sys.executable, "-c", code, *command, "--out", str(out)]
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    return digest_of(out)


def killed_once(command, out, rng, before):
    """Kill a run at a random moment, before its first checkpoint or after it, and run it again; whether it was then."""
    moment = rng.randrange(FIRST_CHECKPOINT) if before else rng.randrange(FIRST_CHECKPOINT, STEPS)
    process = start_command(*command, "--out", out)
    wait_for(lambda: out.exists() and n_lines(out / "metrics.jsonl") >= moment, process)
    time.sleep(rng.random() * 0.02)
    kill(process)
    was_before, is_trained = not list(out.glob("checkpoints/[0-9]*")), (out / "sae.json").exists()
    again = start_command(*command, "--out", out)
    again.join()
    assert again.exitcode == 0
    return was_before == before and not is_trained


LONG = {
    "batchtopk": {},
    "jumprelu": {"arch": "jumprelu", "k": None},
    "standard in bfloat16": {"arch": "standard", "k": None, "precision": "bf16"},
}


@pytest.mark.long
@pytest.mark.parametrize("case", LONG)
def test_twenty_fresh_runs_and_sixty_killed_ones_give_one_sha256(demo_cache, tmp_path, case):
    """Kills that come too late, when the run has got further, are made again."""
    command = train_command(demo_cache, **LONG[case])
    expected, rng, n_killed = run_fresh(command, tmp_path / "idle"), random.Random(1), {True: 0, False: 0}
    with changing_load(3):
        assert {run_fresh(command, tmp_path / f"fresh-{number}") for number in range(20)} == {expected}
        for number in itertools.count():
            before = n_killed[True] <= n_killed[False]
            n_killed[before] += killed_once(command, tmp_path / f"killed-{number}", rng, before)
            assert digest_of(tmp_path / f"killed-{number}") == expected
            if min(n_killed.values()) == 30:
                break


@pytest.mark.long
def test_members_of_a_sweep_under_load_equal_train(demo_cache, tmp_path):
    base = [f"--set={name}={value}" for name, value in MEMBER.items() if name != "arch"]
    command = ["sweep", "--cache", str(demo_cache), *base, "--grid=arch=batchtopk,matryoshka"]
    with changing_load(3):
        processes = [start_command(*command, "--out", tmp_path / name) for name in ("one", "two")]
        for process in processes:
            process.join()
            assert process.exitcode == 0
        for arch in ("batchtopk", "matryoshka"):
            expected = run_fresh(train_command(demo_cache, arch=arch), tmp_path / arch)
            assert {digest_of(tmp_path / name / arch) for name in ("one", "two")} == {expected}
