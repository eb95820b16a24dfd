"""Real SIGKILLs: a killed run, resumed, leaves what an undisturbed one leaves; Ctrl-C says how to go on."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import run_extract, tree_bytes
from processes import hearing_ctrl_c, kill, n_lines, start_command, wait_for

import fastcache
from fastcache.errors import BusyError
from fastcache.pipeline.cli import main

EXTRACT = (
    "--layer", "1", "--layer", "3", "--dtype", "float32", "--parity", "2", "--unit-tokens", "400",
)  # fmt: skip


def run_command(*words):
    main([str(word) for word in words])


def test_extraction_killed_again_and_again_gives_the_same_cache(tiny_qwen, chat_corpus, tmp_path):
    arguments = ["extract", "--model", tiny_qwen, "--corpus", chat_corpus, *EXTRACT]
    whole = run_extract(tiny_qwen, chat_corpus, tmp_path / "whole", layer=(1, 3), parity=2, unit_tokens=400)
    rng = random.Random(0)
    out, log = tmp_path / "killed", tmp_path / "killed/parts.jsonl"
    for n_parts in (0, 2, 5, len(whole.parts) - 1):
        process = start_command(*arguments, "--out", out)
        wait_for(lambda n=n_parts: (out / "parts").exists() and n_lines(log) >= n, process)
        time.sleep(rng.random() * 0.03)  # somewhere in the writing of the next part
        kill(process)
        assert n_lines(log) < len(whole.parts) or n_parts > 5
    run_command(*arguments, "--out", out)
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


def test_a_resumed_extraction_keeps_the_parts_that_are_there(tiny_qwen, chat_corpus, tmp_path):
    out = tmp_path / "cache"
    process = start_command("extract", "--model", tiny_qwen, "--corpus", chat_corpus, *EXTRACT, "--out", out)
    wait_for(lambda: n_lines(out / "parts.jsonl") >= 3, process)
    kill(process)
    kept = n_lines(out / "parts.jsonl")
    times = {path.name: path.stat().st_mtime_ns for path in sorted((out / "parts").glob("0*"))[:kept]}
    assert kept >= 3
    run_extract(tiny_qwen, chat_corpus, out, layer=(1, 3), parity=2, unit_tokens=400)
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
    run_command("train", "--cache", small_cache, *TRAIN, "--out", out)
    return out


def checkpoints(out):
    return set((out / "checkpoints").glob("[0-9]*"))


def writing(out):
    """When the file of the checkpoint that is being written was last touched."""
    try:
        return {(out / "checkpoints/.tmp/state.safetensors").stat().st_mtime_ns}
    except FileNotFoundError:
        return set()


def kill_and_resume(arguments, out, n_kills, seed):
    """Kill a training run `n_kills` times at random moments, half of them while a checkpoint is being written."""
    rng = random.Random(seed)
    kills = 0
    while kills < n_kills and not (out / "sae.json").exists():
        finished, begun = checkpoints(out), writing(out)
        process = start_command(*arguments, "--out", out)
        if rng.random() < 0.5:
            wait_for(lambda old=begun: writing(out) - old, process)
            time.sleep(rng.random() * 0.005)
        else:
            wait_for(lambda old=finished: checkpoints(out) - old, process)  # so that it gets on
            time.sleep(rng.random() * 0.1)
        kill(process)
        kills += 1
    run_command(*arguments, "--out", out)
    return kills


def same(out, whole):
    return all((out / name).read_bytes() == (whole / name).read_bytes() for name in RESULTS)


def test_training_killed_again_and_again_gives_the_same_sae(small_cache, undisturbed, tmp_path):
    out = tmp_path / "killed"
    assert kill_and_resume(["train", "--cache", small_cache, *TRAIN], out, 3, seed=1) >= 2
    assert same(out, undisturbed)
    assert len(list((out / "checkpoints").glob("[0-9]*"))) == 3


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["modern", "fast-paper"])
@pytest.mark.parametrize("arch", ["standard", "jumprelu", "topk", "batchtopk", "gated", "matryoshka"])
def test_many_kills_give_the_same_sae(small_cache, tmp_path, arch, recipe):
    if recipe == "fast-paper" and arch not in ("standard", "jumprelu"):
        pytest.skip("not an architecture of the paper")
    arguments = [
        "train", "--cache", small_cache, *TRAIN, "--arch", arch, "--recipe", recipe, "--tokens", "24_000",
    ]  # fmt: skip
    run_command(*arguments, "--out", tmp_path / "whole")
    assert kill_and_resume(arguments, tmp_path / "killed", 8, seed=2) >= 5
    assert same(tmp_path / "killed", tmp_path / "whole")


def test_ctrl_c_saves_and_says_how_to_resume(small_cache, undisturbed, tmp_path):
    out = tmp_path / "interrupted"
    arguments = ("train", "--cache", str(small_cache), *TRAIN, "--out", str(out))
    code = "from fastcache.pipeline.cli import main; main()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with hearing_ctrl_c():
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], **pipes)
    while n_lines(out / "metrics.jsonl") < 2 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "to resume, run:\n  fastcache train --cache" in output
    assert list((out / "checkpoints").glob("[0-9]*"))
    run_command(*arguments)
    assert same(out, undisturbed)


def test_two_writers_on_one_output_are_kept_apart(tiny_qwen, chat_corpus, tmp_path):
    out = tmp_path / "cache"
    process = start_command("extract", "--model", tiny_qwen, "--corpus", chat_corpus, *EXTRACT, "--out", out)
    wait_for((out / "manifest.json").exists, process)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(BusyError, match="Another fastcache process"):
            run_extract(tiny_qwen, chat_corpus, out, layer=(1, 3), parity=2, unit_tokens=400)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 0
    assert fastcache.open_cache(out).complete
