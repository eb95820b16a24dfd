"""Preparation as a whole: splits, ledger, resuming, settings."""

import gzip
import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpora import dialogue, run, write

from fastcache.corpus import Corpus
from fastcache.errors import InputError, MismatchError
from fastcache.pipeline.cli import main
from fastcache.progress import Silent
from fastcache.stages.prepare import dedup, reading, staging
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.sources import Source


def many_dialogues(count):
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(300)]
    rows = []
    for i in range(count):
        text = " ".join(rng.choice(words, 30))
        rows.append(
            dialogue(text if i % 5 or not i else f"{rows[i // 2]['messages'][0]['content']} again", f"answer {i}")
        )
    return rows


@pytest.mark.parametrize(("workers", "memory_gib"), [(1, 1e-4), (2, 1.5)])
def test_workers_memory_and_chunks_do_not_change_the_corpus(tmp_path, monkeypatch, workers, memory_gib):
    path = write(tmp_path / "rows.jsonl", many_dialogues(600))
    whole, _ = run(tmp_path / "whole", path)
    monkeypatch.setattr(reading, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(staging, "CHUNK_ROWS", 100)
    monkeypatch.setattr(dedup, "RANGE_GRAMS", 100)
    monkeypatch.setattr(dedup, "PIECE_GRAMS", 1)
    monkeypatch.setattr(dedup, "SMALL_JOB", 0)  # so that even this is done in processes of their own
    cut, _ = run(tmp_path / "cut", path, workers=workers, memory_gib=memory_gib)
    assert whole["fingerprint"] == cut["fingerprint"]
    assert whole["counts"] == cut["counts"]
    assert whole["counts"][path]["dropped"]["n-gram duplicate"] > 50


def test_excluded_sets_are_kept_out(tmp_path):
    secret = " ".join(f"secret{i}" for i in range(25))
    path = write(tmp_path / "rows.jsonl", [dialogue(f"hear {secret} now", "yes"), dialogue("hello there", "hi")])
    test_set = write(tmp_path / "test.jsonl", [{"question": secret, "answer": "x"}, {"text": f"{secret} too"}])
    info, kept = run(tmp_path / "out", path, exclude=(test_set,))
    assert info["counts"][path]["dropped"] == {"in an excluded set": 1}
    assert len(kept) == 1


def test_near_duplicates_are_dropped_on_request(tmp_path):
    words = [f"w{i}" for i in range(200)]
    near = " ".join(w if i % 60 else "other" for i, w in enumerate(words))
    path = write(
        tmp_path / "rows.jsonl",
        [dialogue(text, "yes") for text in (" ".join(words), near, "quite another text of five words")],
    )
    plain, _ = run(tmp_path / "plain", path, ngram=0)
    info, _ = run(tmp_path / "near", path, ngram=0, minhash=0.7)
    assert plain["counts"][path]["dropped"] == {}
    assert info["counts"][path]["dropped"] == {"near duplicate": 1}
    assert info["duplicates"] == {path: {path: 1}}


def test_token_lengths_are_those_of_the_chat_template(tmp_path):
    from transformers import AutoTokenizer

    from fastcache.assets import DEMO

    path = write(tmp_path / "rows.jsonl", [dialogue("word " * i, "yes") for i in range(1, 40)])
    info, _ = run(tmp_path / "out", path, model="demo", ngram=0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    rows = Corpus(tmp_path / "out").rows("train")
    lengths = [len(tokenizer.apply_chat_template(row.messages, return_dict=False)) for row in rows]
    found = info["token_lengths"]
    assert found["mean"] == pytest.approx(np.mean(lengths))
    assert found["counts"] == np.histogram(lengths, found["edges"])[0].tolist()
    assert sum(found["counts"]) == info["splits"]["train"]


def test_the_ledger_file_settles_every_input_row(tmp_path):
    rows = [dialogue("hi", "ho"), {"x": 1}, dialogue("hi", "ho"), dialogue("a", "b")]
    path = write(tmp_path / "rows.jsonl", rows)
    run(tmp_path / "out", path)
    ledger = pq.read_table(tmp_path / "out/ledger.parquet").to_pylist()
    assert [row["outcome"] for row in ledger] == ["kept", "no known column", "exact duplicate", "kept"]
    assert [row["source_row"] for row in ledger] == [0, 1, 2, 3]
    assert ledger[2]["repeats_row"] == 0
    assert sorted(row["row"] for row in ledger if row["row"] is not None) == [0, 1]


def is_worker(pid):
    try:
        return "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def workers_end_with_it(pids):
    """Waits for them; the time limit of the test ends it if they outlive the command that was killed."""
    assert pids
    while any(map(is_worker, pids)):
        time.sleep(0.05)


DIES = """
    import multiprocessing, os, pathlib, signal, sys
    from concurrent.futures import ProcessPoolExecutor
    from fastcache.pipeline.cli import main

    plain = ProcessPoolExecutor.submit

    def die(_future):
        pids = [str(process.pid) for process in multiprocessing.active_children()]
        pathlib.Path(sys.argv[1]).write_text(" ".join(pids))
        os.kill(os.getpid(), signal.SIGKILL)

    def submit(self, *arguments):
        future = plain(self, *arguments)
        future.add_done_callback(die)
        return future

    ProcessPoolExecutor.submit = submit
    main(sys.argv[2:])
"""
"""Runs a command that is killed when one of its worker processes has done its first work; the first argument is a file
for the numbers of the workers."""


def test_preparation_killed_and_resumed_gives_the_same_corpus(tmp_path):
    path = write(tmp_path / "rows.jsonl", many_dialogues(60_000))
    words = ["prepare", "--source", path, "--workers", "2", "--out", str(tmp_path / "killed")]
    command = [sys.executable, "-c", textwrap.dedent(DIES), str(tmp_path / "workers"), *words]
    assert subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == -signal.SIGKILL
    staged = tmp_path / "killed/.work/staged"
    workers_end_with_it((tmp_path / "workers").read_text().split())
    first = {chunk.name: chunk.stat().st_mtime_ns for chunk in staged.glob("*.json")}
    assert first
    assert not (tmp_path / "killed/corpus.json").exists()
    main(words)
    whole, _ = run(tmp_path / "whole", path)
    assert json.loads((tmp_path / "killed/corpus.json").read_text())["fingerprint"] == whole["fingerprint"]
    assert not (tmp_path / "killed/.work").exists()


def test_chunks_are_in_order_whichever_of_them_were_there(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(staging, "CHUNK_ROWS", 100)
    source = Source("x", write(tmp_path / "rows.jsonl", many_dialogues(600)))
    config = PrepareConfig(workers=2)
    whole = staging.stage([source], config, tmp_path / "staged", Silent())
    assert len(whole) > 4
    for index in (0, 2):
        (tmp_path / f"staged/{index:06d}.json").unlink()
    assert staging.stage([source], config, tmp_path / "staged", Silent()) == whole


def test_short_dialogues_are_compared_as_a_whole(tmp_path):
    rows = [dialogue("hi", "ho"), dialogue("hi", "ho"), dialogue("hi", "hu")]
    info, kept = run(tmp_path / "out", write(tmp_path / "rows.jsonl", rows))
    assert info["counts"][str(tmp_path / "rows.jsonl")]["dropped"] == {"exact duplicate": 1}
    assert len(kept) == 2


def test_shared_system_prompts_make_no_duplicates(tmp_path):
    system = {"role": "system", "content": " ".join(map(str, range(30)))}
    rows = [{"messages": [system, *dialogue(f"question {i}", "yes")["messages"]]} for i in range(5)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert len(run(tmp_path / "a", path)[1]) == 5
    assert len(run(tmp_path / "b", path, ngram_system=True)[1]) == 1


def test_an_empty_corpus_is_an_error_that_says_why(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"other": 1}] * 3)
    with pytest.raises(InputError, match="3 x no known column"):
        run(tmp_path / "out", path)


def test_the_permutation_is_seeded_and_the_splits_disjoint(tmp_path):
    path = write(tmp_path / "rows.jsonl", [dialogue(f"q{i}", f"a{i}") for i in range(100)])
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        info, rows = run(tmp_path / name, path, seed=seed)
        assert info["splits"] == {"eval": 10, "interpret": 10, "steer": 5, "train": 75}
        assert sorted(row.row for row in rows) == list(range(100))
        orders.append([row.messages[0]["content"] for row in rows])
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_the_fingerprint_tells_corpora_apart(tmp_path):
    first = write(tmp_path / "a.jsonl", [dialogue(f"q{i}", "a") for i in range(10)])
    other = write(tmp_path / "b.jsonl", [dialogue(f"q{i}", "b") for i in range(10)])
    prints = [run(tmp_path / name, path)[0]["fingerprint"] for name, path in (("x", first), ("y", first), ("z", other))]
    # The rows name their source, so only the file read twice gives the same print.
    assert prints[0] == prints[1] != prints[2]


def test_other_settings_on_the_same_output_are_refused(tmp_path):
    path = write(tmp_path / "rows.jsonl", [dialogue(f"q{i}", "a") for i in range(10)])
    run(tmp_path / "out", path)
    with pytest.raises(MismatchError, match="seed: 42 -> 7"):
        run(tmp_path / "out", path, seed=7)


def test_dialogues_and_texts_are_not_mixed(tmp_path):
    path = write(tmp_path / "rows.jsonl", [dialogue("a", "b"), {"text": "c"}])
    with pytest.raises(InputError, match="two corpora"):
        run(tmp_path / "out", path)


def test_a_mended_file_can_be_prepared_in_the_same_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{broken")
    with pytest.raises(InputError, match="strict"):
        run(tmp_path / "out", str(path), strict=True)
    write(path, [dialogue("a", "b")])
    assert len(run(tmp_path / "out", str(path), strict=True)[1]) == 1


def test_a_failure_far_on_keeps_what_was_staged(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 5000)
    monkeypatch.setattr(staging, "CHUNK_ROWS", 100)
    good = write(tmp_path / "a.jsonl", many_dialogues(250))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": 1}' * 1000)[:30])
    with pytest.raises(InputError, match="breaks off"):
        run(tmp_path / "out", good, str(tmp_path / "b.jsonl.gz"), workers=1)
    assert len(list((tmp_path / "out/.work/staged").glob("*.json"))) >= 2
