"""A command whose reader goes away ends as other Unix tools end, and leaves what can be gone on with."""

import fcntl
import os
import shutil
import subprocess
import sys

import pytest
from conftest import run_extract, tree_bytes
from processes import start, start_command

from fastcache.pipeline.cli import main
from fastcache.stages.train.checkpoint import checkpoint_steps

CLOSED = 141
RUN = [sys.executable, "-c", "from fastcache.pipeline.cli import main; main()"]
TRAIN = (
    "--arch",
    "jumprelu",
    "--layer",
    "1",
    "--batch-size",
    "16",
    "--tokens",
    "8_000",
    "--lr",
    "1e-3",
    "--log-every",
    "10",
)


def run_into_closed_pipe(*words, prefix=(), stderr_too=False):
    """The exit code of a command into a pipe that nobody reads, and what it says elsewhere."""
    read, write = os.pipe()
    os.close(read)
    errors = write if stderr_too else subprocess.PIPE
    done = subprocess.run([*prefix, *RUN, *map(str, words)], stdout=write, stderr=errors, text=True, check=False)
    os.close(write)
    return done.returncode, done.stderr


@pytest.fixture
def damaged(small_cache, tmp_path):
    shutil.copytree(small_cache, tmp_path / "damaged")
    next((tmp_path / "damaged/parts").glob("*/token_ids/c/0")).unlink()
    return tmp_path / "damaged"


def test_verify_of_a_closed_pipe_never_ends_with_the_code_for_damage(small_cache, damaged):
    assert run_into_closed_pipe("verify", small_cache) == (CLOSED, "")
    assert run_into_closed_pipe("verify", damaged) == (CLOSED, "")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["inspect", "{cache}"]])
def test_all_ways_of_printing_end_alike(small_cache, words):
    filled = [word.format(cache=small_cache) for word in words]
    assert run_into_closed_pipe(*filled) == (CLOSED, "")
    assert run_into_closed_pipe(*filled, stderr_too=True) == (CLOSED, None)


def test_it_ends_where_ctrl_c_is_ignored_too(small_cache):
    ignoring = ["bash", "-c", "trap '' INT; exec \"$@\"", "bash"]
    assert run_into_closed_pipe("inspect", small_cache, prefix=ignoring)[0] == CLOSED


def test_an_error_keeps_its_exit_code_where_only_its_message_is_lost():
    assert run_into_closed_pipe("inspect", "/no/where", stderr_too=True)[0] == 2


@pytest.mark.parametrize(("stdout", "code", "said"), [(">&-", 0, ""), ("> /dev/full", 2, "No space left on device")])
def test_no_output_at_all_and_a_full_disk(small_cache, stdout, code, said):
    line = ["bash", "-c", f'exec "$@" {stdout}', "bash", *RUN, "verify", str(small_cache)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert said in done.stderr
    assert ("Traceback" in done.stderr, "Exception ignored" in done.stderr) == (False, False)


def into_pipe_that_closes(pipe, words):
    """Run a command line that reports every step into a pipe."""
    import fastcache.pipeline.console

    fastcache.pipeline.console.SECONDS_BETWEEN_LINES = -1
    os.dup2(os.open(pipe, os.O_WRONLY), 1)
    fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 4096)  # so that it can't be done before a slow reader has seen its mark
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  the old one knows a place in another file
    main(words)


def stop_reading_at(tmp_path, mark, *words):
    """Start a command, read its lines until one has `mark`, and close the pipe; returns the exit code."""
    os.mkfifo(tmp_path / "pipe")
    process = start(into_pipe_that_closes, str(tmp_path / "pipe"), [str(word) for word in words])
    with (tmp_path / "pipe").open() as lines:
        assert any(mark in line for line in lines)
    process.join()
    (tmp_path / "pipe").unlink()
    return process.exitcode


def test_training_keeps_every_step_and_goes_on_to_the_same_sae(small_cache, tmp_path):
    command = ["train", "--cache", small_cache, *TRAIN]
    undisturbed = start_command(*command, "--out", tmp_path / "whole")
    assert stop_reading_at(tmp_path, "1,600 of", *command, "--out", tmp_path / "sae") == CLOSED
    (step,) = checkpoint_steps(tmp_path / "sae")
    assert 100 <= step < 500
    main([str(word) for word in [*command, "--out", tmp_path / "sae"]])
    undisturbed.join()
    for name in ("sae.safetensors", "metrics.jsonl"):
        assert (tmp_path / "sae" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_extraction_goes_on_to_the_same_cache(tiny_qwen, chat_corpus, tmp_path):
    run_extract(tiny_qwen, chat_corpus, tmp_path / "whole", unit_tokens=400)
    command = [
        "extract",
        "--model",
        tiny_qwen,
        "--corpus",
        chat_corpus,
        "--layer",
        "1",
        "--dtype",
        "float32",
        "--parity",
        "2",
    ]
    command += ["--unit-tokens", "400", "--out", tmp_path / "cache"]
    assert stop_reading_at(tmp_path, "2 units on disk", *command) == CLOSED
    main([str(word) for word in command])
    assert tree_bytes(tmp_path / "cache") == tree_bytes(tmp_path / "whole")
