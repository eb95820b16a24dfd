"""Real SIGKILLs: a killed run, resumed, leaves what an undisturbed one leaves; Ctrl-C says how to go on."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_extract, tree_bytes
from deaths import (
    CHECKPOINT_BEGINS,
    CHECKPOINT_HALF_WRITTEN,
    PART_PUBLISHED,
    PART_WRITTEN,
    STEP,
    command,
    die,
    start_stopped,
)
from processes import hearing_ctrl_c, n_lines

import fastcache
from fastcache.errors import BusyError

TESTS = Path(__file__).parent
EXTRACT = (
    "--layer", "1", "--layer", "3", "--dtype", "float32", "--parity", "2", "--unit-tokens", "400",
)  # fmt: skip


def test_extraction_killed_again_and_again_gives_the_same_cache(tiny_qwen, chat_corpus, tmp_path):
    words = ["extract", "--model", tiny_qwen, "--corpus", chat_corpus, *EXTRACT, "--out", tmp_path / "killed"]
    whole = run_extract(tiny_qwen, chat_corpus, tmp_path / "whole", layer=(1, 3), parity=2, unit_tokens=400)
    log, kept = tmp_path / "killed/parts.jsonl", 0
    for moment, number in ((PART_WRITTEN, 0), (PART_PUBLISHED, 2), (PART_WRITTEN, 3), (PART_PUBLISHED, 0)):
        die(moment, number, command, words)
        kept += number
        assert n_lines(log) == kept < len(whole.parts)
    command(words)
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "whole")


def test_a_resumed_extraction_keeps_the_parts_that_are_there(tiny_qwen, chat_corpus, tmp_path):
    out = tmp_path / "cache"
    words = ["extract", "--model", tiny_qwen, "--corpus", chat_corpus, *EXTRACT, "--out", out]
    die(PART_WRITTEN, 3, command, words)
    times = {path.name: path.stat().st_mtime_ns for path in (out / "parts").glob("0*")}
    assert len(times) == n_lines(out / "parts.jsonl") == 3
    command(words)
    assert {name: (out / "parts" / name).stat().st_mtime_ns for name in times} == times


TRAIN = (
    "--arch", "jumprelu", "--layer", "1", "--batch-size", "16", "--tokens", "8_000", "--checkpoint-every", "50",
    "--log-every", "10", "--lr", "1e-3", "--buffer-tokens", "900", "--tokens-of", "content", "--norm-filter", "1.3x-median",
    "--dead-window", "20", "--keep-checkpoints", "3",
)  # fmt: skip
RESULTS = ("sae.safetensors", "sae.json", "metrics.jsonl")


@pytest.fixture(scope="module")
def undisturbed(small_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "whole"
    command(["train", "--cache", small_cache, *TRAIN, "--out", out])
    return out


def same(out, whole):
    return all((out / name).read_bytes() == (whole / name).read_bytes() for name in RESULTS)


def test_training_killed_again_and_again_gives_the_same_sae(small_cache, undisturbed, tmp_path):
    out = tmp_path / "killed"
    words = ["train", "--cache", small_cache, *TRAIN, "--out", out]
    for moment, number, step in ((STEP, 123, 100), (CHECKPOINT_BEGINS, 1, 150), (CHECKPOINT_HALF_WRITTEN, 2, 250)):
        die(moment, number, command, words)
        assert newest_checkpoint(out) == step
    command(words)
    assert same(out, undisturbed)
    assert len(list((out / "checkpoints").glob("[0-9]*"))) == 3


def newest_checkpoint(out):
    return max((int(folder.name) for folder in (out / "checkpoints").glob("[0-9]*")), default=0)


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["modern", "fast-paper"])
@pytest.mark.parametrize("arch", ["standard", "jumprelu", "topk", "batchtopk", "gated", "matryoshka"])
def test_many_kills_give_the_same_sae(small_cache, tmp_path, arch, recipe):
    if recipe == "fast-paper" and arch not in ("standard", "jumprelu"):
        pytest.skip("not an architecture of the paper")
    arguments = [
        "train", "--cache", small_cache, *TRAIN, "--arch", arch, "--recipe", recipe, "--tokens", "24_000",
    ]  # fmt: skip
    command([*arguments, "--out", tmp_path / "whole"])
    rng, words = random.Random(arch + recipe), [*arguments, "--out", tmp_path / "killed"]
    for _ in range(8):  # each time 150 steps at most are done, of 1,500
        moment = rng.choice([STEP, CHECKPOINT_BEGINS, CHECKPOINT_HALF_WRITTEN])
        die(moment, rng.randrange(150 if moment == STEP else 3), command, words)
    command(words)
    assert same(tmp_path / "killed", tmp_path / "whole")


def test_ctrl_c_saves_and_says_how_to_resume(small_cache, undisturbed, tmp_path):
    out = tmp_path / "interrupted"
    words = ["train", "--cache", str(small_cache), *TRAIN, "--out", str(out)]
    code = "import sys; from deaths import *; signal_in(STEP, 25, signal.SIGINT, command, sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with hearing_ctrl_c():
        done = subprocess.run([sys.executable, "-c", code, *words], env=environment, check=False, **pipes)
    assert done.returncode == 130, done.stdout
    assert "to resume, run:\n  fastcache train --cache" in done.stdout
    assert newest_checkpoint(out) == 26
    command(words)
    assert same(out, undisturbed)


def test_two_writers_on_one_output_are_kept_apart(tiny_qwen, chat_corpus, tmp_path):
    out = tmp_path / "cache"
    words = ["extract", "--model", tiny_qwen, "--corpus", chat_corpus, *EXTRACT, "--out", out]
    process = start_stopped(PART_WRITTEN, 1, command, words)
    try:
        with pytest.raises(BusyError, match="Another fastcache process"):
            run_extract(tiny_qwen, chat_corpus, out, layer=(1, 3), parity=2, unit_tokens=400)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0
    assert fastcache.open_cache(out).complete
