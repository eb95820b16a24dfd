"""`fastcache extract --backend vllm`: the same rows as with transformers, whatever dies on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vllm is not installed: `make test-vllm` has an environment with it")

from conftest import run_extract

import fastcache
from fastcache.errors import MismatchError
from with_vllm.models import make_model

HOOK = "resid_post.2"
SETTINGS = {"layer": (0, 2), "unit_tokens": 1000, "pack_tokens": 256, "backend": "vllm"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("qwen"), "Qwen2")


@pytest.fixture(scope="module")
def expected(model, chat_corpus, tmp_path_factory):
    """The cache that transformers makes."""
    out = tmp_path_factory.mktemp("expected") / "cache"
    return run_extract(model, chat_corpus, out, **{**SETTINGS, "backend": "transformers"})


def assert_same(cache, expected):
    """The same sequences in the same parts, and residuals within the tolerance of another order of summing."""
    assert cache.n_tokens == expected.n_tokens
    for part, other in zip(cache.parts, expected.parts, strict=True):
        assert part.record.ledger == other.record.ledger
        for name, values in other.tokens.items():
            np.testing.assert_array_equal(part.tokens[name], values)
    for one, other in zip(cache.instances(), expected.instances(), strict=True):
        np.testing.assert_allclose(one.residuals(HOOK), other.residuals(HOOK), atol=2e-5)


def test_the_cache_has_the_rows_of_transformers_and_says_what_made_it(model, chat_corpus, expected, tmp_path):
    cache = run_extract(model, chat_corpus, tmp_path / "cache", **SETTINGS)
    assert_same(cache, expected)
    assert cache.manifest.identity["backend"] == "vllm"
    assert any(name.startswith("vllm") for name in cache.manifest.versions)
    assert cache.manifest.parity["hook_points"][HOOK]["max_abs_difference"] < 2e-5


def test_a_cache_is_not_gone_on_with_by_another_backend(model, chat_corpus, expected):
    with pytest.raises(MismatchError, match="backend"):
        run_extract(model, chat_corpus, Path(expected.path), **SETTINGS)


CODE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import run_extract

if __name__ == "__main__":
    model, corpus, out = map(Path, sys.argv[2:5])
    settings = {"layer": (0, 2), "unit_tokens": 1000, "pack_tokens": 256, "backend": "vllm", "parity": 0}
    run_extract(model, corpus, out, **settings, workers=int(sys.argv[5]))
"""


def begin(tmp_path, model, corpus, workers):
    script = tmp_path / "run.py"
    script.write_text(CODE)
    arguments = [Path(__file__).parents[1], model, corpus, tmp_path / "cache", workers]
    return subprocess.Popen([sys.executable, script, *map(str, arguments)])


def wait_for_a_part(process, out):
    while process.poll() is None and not (out / "parts.jsonl").exists():
        time.sleep(0.01)
    assert process.poll() is None


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants(pid: int) -> list[int]:
    return [one for child in children(pid) for one in (child, *descendants(child))]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_run_leaves_no_engine_behind_and_is_gone_on_with(model, chat_corpus, expected, tmp_path):
    process = begin(tmp_path, model, chat_corpus, 1)
    wait_for_a_part(process, tmp_path / "cache")
    engine = descendants(process.pid)
    assert engine
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(map(is_running, engine)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, engine))
    cache = run_extract(model, chat_corpus, tmp_path / "cache", **SETTINGS)
    assert_same(cache, expected)


@pytest.mark.parametrize("victim", ["VLLM::EngineCor", "VLLM::Worker"])
def test_an_engine_that_is_killed_costs_its_worker_a_new_start_and_nothing_else(
    victim, model, chat_corpus, expected, tmp_path
):
    process = begin(tmp_path, model, chat_corpus, 2)
    wait_for_a_part(process, tmp_path / "cache")
    states = json.loads((tmp_path / "cache/status.json").read_text())["workers"]
    busy = next(int(number) for number, state in states.items() if state.startswith("unit"))  # not one that starts yet
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(process.pid)}
    worker = sorted(pid for pid, command in commands.items() if b"spawn_main" in command)[busy]
    engine = next(pid for pid in descendants(worker) if Path(f"/proc/{pid}/comm").read_text().strip() == victim)
    os.kill(engine, signal.SIGKILL)
    assert process.wait() == 0
    cache = fastcache.open_cache(tmp_path / "cache")
    assert cache.manifest.failed == {}
    assert set(json.loads((tmp_path / "cache/status.json").read_text())["workers"]) == {"0", "1"}
    assert_same(cache, expected)
