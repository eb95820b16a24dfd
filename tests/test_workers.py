"""Several workers: the same cache for any number, whatever dies or fails on the way."""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import edit_manifest, run_extract, tree_bytes
from disk_changes import Changes
from processes import forks, start
from safetensors.numpy import load_file, save_file

import fastcache
from fastcache.errors import InputError, NonFiniteError
from fastcache.pipeline.cli import main

HOOK = "resid_post.1"
UNIT = 400


@pytest.fixture(scope="module")
def alone(tiny_qwen, chat_corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "cache"
    run_extract(tiny_qwen, chat_corpus, out, unit_tokens=UNIT)
    return out


def parts_of(root):
    return {name: data for name, data in tree_bytes(root).items() if name.startswith("parts/")}


def test_any_number_of_workers_makes_the_same_cache(alone, tiny_qwen, chat_corpus, tmp_path):
    cache = run_extract(tiny_qwen, chat_corpus, tmp_path / "cache", unit_tokens=UNIT, devices=("cpu", "cpu", "cpu"))
    assert parts_of(tmp_path / "cache") == parts_of(alone)
    before = fastcache.open_cache(alone).manifest
    assert cache.manifest.ledger == before.ledger
    assert cache.manifest.statistics == before.statistics
    assert set(json.loads((tmp_path / "cache/status.json").read_text())["workers"]) == {"0", "1", "2"}


def _children(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _is_worker(pid):
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


def run_and_kill_a_worker(words, root):
    """Run a command of our command line; one of its workers is killed when the first line of the log is written."""
    killed = []

    def seen(_kind, path, _source):
        if path.endswith("parts.jsonl") and not killed:
            killed.append(next(pid for pid in _children(os.getpid()) if _is_worker(pid)))
            os.kill(killed[0], signal.SIGKILL)

    with Changes(root, seen):
        main([str(word) for word in words])
    assert killed


def test_a_worker_that_is_killed_loses_nothing(alone, tiny_qwen, chat_corpus, tmp_path):
    out = tmp_path / "cache"
    given = {
        "model": tiny_qwen,
        "corpus": chat_corpus,
        "layer": 1,
        "dtype": "float32",
        "unit-tokens": UNIT,
        "parity": 2,
    }
    options = [word for name, value in given.items() for word in (f"--{name}", value)]
    process = start(run_and_kill_a_worker, ["extract", *options, "--workers", 2, "--out", out], out)
    process.join()
    assert process.exitcode == 0
    assert parts_of(out) == parts_of(alone)
    assert fastcache.open_cache(out).manifest.failed == {}


@pytest.fixture
def forked_workers(monkeypatch):
    """Workers begin with all modules loaded: loading them anew for each is most of the time, and is tested above."""
    monkeypatch.setattr("fastcache.crew.multiprocessing", SimpleNamespace(get_context=lambda _: forks))


@pytest.fixture(scope="module")
def rare_model(tiny_qwen, tmp_path_factory):
    """A model whose tokenizer knows a token that its embedding hasn't: a dialogue with it can't be computed."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("rare") / "model"
    shutil.copytree(tiny_qwen, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zzrare"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def unchecked_tokens(monkeypatch):
    """A run that finds out only while it computes that a model doesn't know a token, as if a unit failed for any reason."""
    monkeypatch.setattr("fastcache.stages.extract.job.require_known_tokens", lambda *_given: None)


@pytest.fixture(scope="module")
def rare_corpus(chat_file, tmp_path_factory):
    """Dialogues, one of which has the rare token."""
    from fastcache.progress import Silent
    from fastcache.stages.prepare.config import PrepareConfig
    from fastcache.stages.prepare.run import prepare

    folder = tmp_path_factory.mktemp("rare-corpus")
    turns = [{"role": "user", "content": "What is zzrare ?"}, {"role": "assistant", "content": "Nobody knows."}]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + chat_file.read_text())
    settings = {"eval_rows": 0, "interpret_rows": 0, "steer_rows": 0}
    prepare(PrepareConfig(source=(str(folder / "chat.jsonl"),), **settings), folder / "corpus", Silent())
    return folder / "corpus"


@pytest.mark.usefixtures("unchecked_tokens", "forked_workers")
def test_a_unit_that_always_fails_is_named_and_the_rest_goes_on(rare_model, rare_corpus, tmp_path):
    options = {"unit_tokens": UNIT, "workers": 2, "parity": 0}
    cache = run_extract(rare_model, rare_corpus, tmp_path / "cache", **options)
    ((part, reason),) = cache.manifest.failed.items()
    assert "out of range" in reason
    indices = [one.record.index for one in cache.parts]
    assert sorted([*indices, int(part)]) == list(range(len(indices) + 1))
    ledger = cache.manifest.ledger
    assert ledger["failed"] > 0
    assert ledger["stored"] + ledger["truncated"] + ledger["failed"] == ledger["rows"]


def test_a_failed_unit_is_tried_again_by_the_next_run(alone, tiny_qwen, chat_corpus, tmp_path):
    out = tmp_path / "cache"
    shutil.copytree(alone, out)
    log = (out / "parts.jsonl").read_bytes().splitlines(keepends=True)
    (out / "parts.jsonl").write_bytes(b"".join(log[:-1]))
    cache = fastcache.open_cache(alone)
    totals = dict(cache.manifest.totals)
    totals["n_parts"] -= 1
    totals["n_tokens"] -= cache.parts[-1].record.n_tokens
    totals["n_instances"] -= cache.parts[-1].record.n_instances
    edit_manifest(out, totals=totals, failed={str(len(log) - 1): "its process was killed"})
    again = run_extract(tiny_qwen, chat_corpus, out, unit_tokens=UNIT)
    assert again.manifest.failed == {}
    assert parts_of(out) == parts_of(alone)


@pytest.fixture(scope="module")
def rare(tiny_qwen, rare_corpus, tmp_path_factory):
    """A token that stands in one dialogue only, the row of that, and all rows."""
    cache = run_extract(tiny_qwen, rare_corpus, tmp_path_factory.mktemp("rare-cache") / "cache", parity=0)
    holders = {}
    for instance in cache.instances():
        for token in set(instance.token_ids.tolist()):
            holders.setdefault(token, []).append(instance.instance_id)
    token, (holder,) = next((token, rows) for token, rows in sorted(holders.items()) if len(rows) == 1)
    return token, holder, [instance.instance_id for instance in cache.instances()]


def _with_nan(model, folder, token):
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("embed_tokens.weight"))
    weights[name][token] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.usefixtures("forked_workers")
def test_nan_in_a_worker_stops_the_run_and_names_the_dialogue(rare, tiny_qwen, rare_corpus, tmp_path):
    token, holder, _ = rare
    model = _with_nan(tiny_qwen, tmp_path / "model", token)
    with pytest.raises(NonFiniteError, match=f"Instance {holder} has NaN"):
        run_extract(model, rare_corpus, tmp_path / "cache", unit_tokens=UNIT, workers=2, parity=0)


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [1, 2])
def test_nan_can_be_skipped_and_is_counted(workers, rare, tiny_qwen, rare_corpus, tmp_path):
    token, holder, everyone = rare
    model = _with_nan(tiny_qwen, tmp_path / "model", token)
    options = {"unit_tokens": 1000, "workers": workers, "parity": 0, "on_nonfinite": "skip"}
    cache = run_extract(model, rare_corpus, tmp_path / "cache", **options)
    assert cache.manifest.ledger["skipped"] == {"non-finite residuals": 1}
    assert [instance.instance_id for instance in cache.instances()] == [row for row in everyone if row != holder]
    before = tree_bytes(tmp_path / "cache")
    run_extract(model, rare_corpus, tmp_path / "cache", **options)
    assert tree_bytes(tmp_path / "cache") == before


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_unit_of_which_nan_leaves_nothing_is_named_and_the_rest_goes_on(
    workers, rare, tiny_qwen, rare_corpus, tmp_path
):
    token, holder, everyone = rare
    model = _with_nan(tiny_qwen, tmp_path / "model", token)
    options = {"unit_tokens": 1, "workers": workers, "parity": 0, "on_nonfinite": "skip"}  # a dialogue a unit
    cache = run_extract(model, rare_corpus, tmp_path / "cache", **options)
    assert cache.manifest.failed == {str(everyone.index(holder)): "all of its dialogues have NaN or infinity"}
    assert cache.manifest.ledger["failed"] == 1
    assert [instance.instance_id for instance in cache.instances()] == [row for row in everyone if row != holder]
    before = tree_bytes(tmp_path / "cache")
    run_extract(model, rare_corpus, tmp_path / "cache", **options)  # tried again, with the same end
    assert tree_bytes(tmp_path / "cache") == before


def test_the_status_file_tells_where_the_run_stands(alone):
    status = json.loads((alone / "status.json").read_text())
    cache = fastcache.open_cache(alone)
    assert status["state"] == "computed"
    assert status["tokens"] == cache.n_tokens
    assert status["units_done"] == len(cache.parts)


@pytest.mark.usefixtures("unchecked_tokens", "forked_workers")
def test_a_repair_leaves_failed_units_failed(rare_model, rare_corpus, tmp_path):
    from fastcache.progress import Silent
    from fastcache.stages.extract.repair import repair

    out = tmp_path / "cache"
    before = run_extract(rare_model, rare_corpus, out, unit_tokens=UNIT, workers=2, parity=0)
    index = before.parts[0].record.index
    chunk = out / f"parts/{index:08d}/token_ids/c/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert repair(out, Silent()) == [index]
    after = fastcache.open_cache(out)
    assert after.manifest.failed == before.manifest.failed
    assert after.manifest.ledger == before.manifest.ledger


def test_blocks_can_not_be_skipped(tiny_qwen, chat_corpus, tmp_path):
    with pytest.raises(InputError, match="for --method fast"):
        run_extract(tiny_qwen, chat_corpus, tmp_path / "cache", method="bt-f", on_nonfinite="skip")
