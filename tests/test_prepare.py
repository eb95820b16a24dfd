"""Preparation: the paper's deduplication against a plain reference, and every input row accounted for."""

import gzip
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcache.corpus import Corpus
from fastcache.errors import InputError, MismatchError
from fastcache.progress import Silent
from fastcache.stages.prepare import dedup, staging
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.conflicts import GramFile, PairFile, find_pairs, owners, resolve, write_grams
from fastcache.stages.prepare.ngrams import ngram_hashes
from fastcache.stages.prepare.run import prepare
from fastcache.stages.prepare.schema import Unusable, to_messages, usable
from fastcache.stages.prepare.sources import Source, estimate_rows


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def dialogue(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def run(out, *sources, **options):
    info = prepare(PrepareConfig(source=sources, **options), out, Silent())
    return info, [row for split in info["splits"] if info["splits"][split] for row in Corpus(out).rows(split)]


def kept_by_algorithm_1(samples, n, unit):
    """Algorithm 1 of the paper, word for word."""
    seen, kept = set(), []
    for index, turns in enumerate(samples):
        grams = set()
        for turn in turns:
            units = turn.split() if unit == "word" else turn
            grams |= {tuple(units[i : i + n]) for i in range(len(units) - n + 1)}
        if not grams & seen:
            seen |= grams
            kept.append(index)
    return kept


def kept_by_ours(samples, n, unit, folder, chunk, n_ranges, bucket, n_given=0):
    """The same through files: n-grams by chunks, pairs by ranges of hashes, rows by buckets."""
    files = []
    for first in range(0, len(samples), chunk):
        part = samples[first : first + chunk]
        rows = np.repeat(np.arange(len(part)), [len(sample) for sample in part])
        grams = ngram_hashes([turn for sample in part for turn in sample], n, unit)
        files.append(GramFile(folder / f"{first}.grams", first))
        write_grams(files[-1].path, grams.hashes, grams.checks, rows[grams.turns])
    pair_files, n_groups = [], 0
    edges = [2**64 * index // n_ranges for index in range(n_ranges + 1)]
    for index in range(n_ranges):
        pairs, count = find_pairs(files, edges[index], edges[index + 1])
        pair_files.append(PairFile(folder / f"{index}.pairs", n_groups))
        pairs.tofile(pair_files[-1].path)
        n_groups += count
    blame = resolve(pair_files, len(samples), n_groups, bucket, n_given)
    return blame, owners(pair_files, blame, bucket)


texts = st.text(alphabet="ab \n\u2003\u00fc", max_size=30)
turns = st.lists(texts, max_size=3)
cuts = st.integers(1, 6)


@settings(max_examples=300, deadline=None)
@given(
    samples=st.lists(turns, min_size=1, max_size=12), n=st.integers(1, 5), unit=st.sampled_from(["word", "character"]),
    chunk=cuts, n_ranges=cuts, bucket=cuts,
)  # fmt: skip
def test_deduplication_equals_algorithm_1(samples, n, unit, chunk, n_ranges, bucket, tmp_path_factory):
    blame, _ = kept_by_ours(samples, n, unit, tmp_path_factory.mktemp("dedup"), chunk, n_ranges, bucket)
    assert np.flatnonzero(blame < 0).tolist() == kept_by_algorithm_1(samples, n, unit)


@settings(max_examples=100, deadline=None)
@given(samples=st.lists(turns, min_size=1, max_size=12), n=st.integers(1, 3), chunk=cuts, n_ranges=cuts, bucket=cuts)
def test_every_duplicate_names_an_earlier_kept_row_that_shares_an_ngram(
    samples, n, chunk, n_ranges, bucket, tmp_path_factory
):
    def grams(sample):
        return {tuple(t.split()[i : i + n]) for t in sample for i in range(len(t.split()) - n + 1)}

    blame, owner = kept_by_ours(samples, n, "word", tmp_path_factory.mktemp("dedup"), chunk, n_ranges, bucket)
    assert np.array_equal(owner >= 0, blame >= 0)
    for row in np.flatnonzero(owner >= 0).tolist():
        assert owner[row] < row
        assert blame[owner[row]] < 0
        assert grams(samples[row]) & grams(samples[owner[row]])


def test_given_rows_are_kept_whatever_they_share(tmp_path):
    samples = [["a b"], ["a b c"], ["b c"], ["d e"]]
    blame, owner = kept_by_ours(samples, 2, "word", tmp_path, 2, 1, 2, n_given=2)
    assert (blame < 0).tolist() == [True, True, False, True]
    assert owner[2] == 1


def test_a_dropped_sample_adds_nothing_to_the_seen_set(tmp_path):
    blame, _ = kept_by_ours([["a b"], ["a b c d"], ["c d"]], 2, "word", tmp_path, 3, 1, 3)
    assert (blame < 0).tolist() == [True, False, True]


@settings(deadline=None)
@given(
    turns=st.lists(st.text(max_size=40), max_size=6), n=st.integers(1, 25), unit=st.sampled_from(["word", "character"])
)
def test_equal_ngrams_and_only_they_have_equal_hashes(turns, n, unit):
    expected = []
    for index, turn in enumerate(turns):
        units = turn.split() if unit == "word" else turn
        expected += [(index, tuple(units[i : i + n])) for i in range(len(units) - n + 1)]
    grams = ngram_hashes(turns, n, unit)
    assert grams.turns.tolist() == [index for index, _ in expected]
    hashes = list(zip(grams.hashes.tolist(), grams.checks.tolist(), strict=True))
    assert (
        len(set(hashes))
        == len({gram for _, gram in expected})
        == len(set(zip(hashes, (g for _, g in expected), strict=True)))
    )


def test_ngrams_do_not_depend_on_what_else_is_hashed():
    long = " ".join(f"w{i}" for i in range(60_000))  # more than a batch
    alone = ngram_hashes([long], 20, "word")
    together = ngram_hashes(["a b c", long, "", "d"], 20, "word")
    assert np.array_equal(alone.hashes, together.hashes)


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
    monkeypatch.setattr(staging, "CHUNK_ROWS", 100)
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


odd_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "\x00", " "]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "messages", "text", "prompt"]), children, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(odd_json | st.binary(max_size=20), min_size=1, max_size=6))
def test_any_rows_are_kept_or_counted(values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    lines = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]
    lines = [line.replace(b"\n", b"") for line in lines]
    (folder / "rows.jsonl").write_bytes(b"\n".join([json.dumps(dialogue("good", "one")).encode(), *lines]))
    try:
        info, kept = run(folder / "out", str(folder / "rows.jsonl"))
    except InputError as error:
        assert "two corpora" in str(error)  # noqa: PT017 - the only way in which good rows may be refused
        return
    counts = info["counts"][str(folder / "rows.jsonl")]
    assert counts["rows"] == 1 + sum(bool(line.strip()) for line in lines)
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["rows"]
    assert counts["kept"] == len(kept) >= 1


def test_the_ledger_file_settles_every_input_row(tmp_path):
    rows = [dialogue("hi", "ho"), {"x": 1}, dialogue("hi", "ho"), dialogue("a", "b")]
    path = write(tmp_path / "rows.jsonl", rows)
    run(tmp_path / "out", path)
    ledger = pq.read_table(tmp_path / "out/ledger.parquet").to_pylist()
    assert [row["outcome"] for row in ledger] == ["kept", "no known column", "exact duplicate", "kept"]
    assert [row["source_row"] for row in ledger] == [0, 1, 2, 3]
    assert ledger[2]["repeats_row"] == 0
    assert sorted(row["row"] for row in ledger if row["row"] is not None) == [0, 1]


def workers_end_with_it(pids):
    assert pids
    deadline = time.monotonic() + 60
    while any("prepare" in Path(f"/proc/{pid}/cmdline").read_text() or "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
              for pid in pids if Path(f"/proc/{pid}").exists()):  # fmt: skip
        assert time.monotonic() < deadline, "workers outlive the command that was killed"
        time.sleep(0.05)


def test_preparation_killed_and_resumed_gives_the_same_corpus(tmp_path):
    path = write(tmp_path / "rows.jsonl", many_dialogues(60_000))
    arguments = [sys.executable, "-c", "from fastcache.pipeline.cli import main; main()", "prepare", "--source", path]
    process = subprocess.Popen([*arguments, "--out", str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    staged = tmp_path / "killed/.work/staged"
    while not list(staged.glob("*.json")) and process.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    workers_end_with_it(children)
    first = {chunk.name: chunk.stat().st_mtime_ns for chunk in staged.glob("*.json")}
    assert first
    assert not (tmp_path / "killed/corpus.json").exists()
    subprocess.run([*arguments, "--out", str(tmp_path / "killed")], check=True, capture_output=True)
    whole, _ = run(tmp_path / "whole", path)
    assert json.loads((tmp_path / "killed/corpus.json").read_text())["fingerprint"] == whole["fingerprint"]
    assert not (tmp_path / "killed/.work").exists()


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


BAD_LINES = {
    b"{not json": "not JSON",
    b"[1]": "not an object",
    b'{"other": 1}': "no known column",
    b'{"messages": []}': "no turns",
    b'{"messages": [1]}': "turn is not an object",
    b'{"messages": [{"role": "user"}]}': "turn without content",
    b'{"messages": [{"content": "x"}]}': "turn without role",
    b'{"messages": [{"role": "wizard", "content": "x"}]}': "unknown role",
    b'{"messages": [{"role": "", "content": "x"}]}': "turn without role",
    b'{"messages": [{"role": "user", "content": " "}]}': "empty turn",
    b'{"messages": [{"role": "system", "content": "x"}]}': "system turns only",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}': "invalid Unicode",
    b'{"text": "  "}': "empty text",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items())
def test_bad_rows_are_counted_with_their_reason(line, reason, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(dialogue("good", "one")).encode() + b"\n" + line + b"\n")
    info, kept = run(tmp_path / "out", str(path))
    assert info["counts"][str(path)] == {"rows": 2, "kept": 1, "dropped": {reason: 1}}
    assert kept[0].messages == dialogue("good", "one")["messages"]


@pytest.mark.parametrize("line", BAD_LINES)
def test_strict_stops_at_a_bad_row(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(dialogue("good", "one")).encode() + b"\n" + line + b"\n")
    with pytest.raises(InputError, match=r"strict"):
        run(tmp_path / "out", str(path), strict=True)


def test_an_empty_corpus_is_an_error_that_says_why(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"other": 1}] * 3)
    with pytest.raises(InputError, match="3 x no known column"):
        run(tmp_path / "out", path)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_gz_is_an_error_that_names_the_place(tmp_path, damage):
    rng = random.Random(0)
    rows = [dialogue(f"{rng.random()} {rng.random()}", str(rng.random())) for _ in range(2000)]
    data = bytearray(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    if damage == "flipped":
        data[len(data) // 2] ^= 255
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    with pytest.raises(InputError, match=r"rows\.jsonl\.gz breaks off or is damaged after line"):
        run(tmp_path / "out", str(path))


def test_the_same_rows_in_any_container_give_the_same_dialogues(tmp_path):
    rows = [dialogue(f"q{i}", f"a{i}") for i in range(30)]
    table = pa.Table.from_pylist(rows)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    with pa.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as file:
        file.write(text)
    (tmp_path / "d.json").write_text(json.dumps(rows))
    pq.write_table(table, tmp_path / "e.parquet")
    with pa.ipc.new_stream(str(tmp_path / "f.arrow"), table.schema) as file:
        file.write_table(table)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/g.jsonl").write_bytes(text)
    found = []
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.json", "e.parquet", "f.arrow", "folder"):
        found.append([row.messages for row in run(tmp_path / f"out-{name}", str(tmp_path / name))[1]])
    assert all(one == found[0] for one in found)
    assert len(found[0]) == 30


@pytest.mark.parametrize("name", ["wildchat", "infinity-instruct", "tulu-3", "orca-agentinstruct", "lmsys-chat"])
def test_a_local_copy_of_a_known_set_uses_its_column(tmp_path, name):
    column = {"wildchat": "conversation", "lmsys-chat": "conversation", "infinity-instruct": "conversations"}.get(
        name, "messages"
    )
    rows = [{column: dialogue("q", "a")["messages"], "text": "not this"}]
    info, kept = run(tmp_path / "out", f"{name}={write(tmp_path / 'rows.jsonl', rows)}")
    assert kept[0].messages == dialogue("q", "a")["messages"]
    assert list(info["counts"]) == [name]


def test_schemas_of_other_names_become_one():
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "system", "value": ""}]
    assert to_messages(sharegpt) == dialogue("a", "b")["messages"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "response": "b"}, ["a", "b"]),
        ({"instruction": "a", "input": "", "output": "b"}, ["a", "b"]),
        ({"instruction": "a", "input": "x", "output": "b"}, ["a\n\nx", "b"]),
        ({"messages": json.dumps(dialogue("a", "b")["messages"])}, ["a", "b"]),
    ],
)
def test_questions_with_answers_become_dialogues(row, expected):
    messages = usable(row, None, False, 0)["messages"]
    assert [message["content"] for message in messages] == expected


def test_turns_that_do_not_alternate_are_dropped_on_request(tmp_path):
    rows = [dialogue("a", "b"), {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert len(run(tmp_path / "a", path)[1]) == 2
    info, _ = run(tmp_path / "b", path, alternating=True)
    assert info["counts"][path]["dropped"] == {"turns don't alternate": 1}


def test_over_long_turns_are_dropped_on_request(tmp_path):
    path = write(tmp_path / "rows.jsonl", [dialogue("a", "b"), dialogue("a" * 10_000_000, "b")])
    assert len(run(tmp_path / "a", path)[1]) == 2
    info, _ = run(tmp_path / "b", path, max_turn_chars=1000)
    assert info["counts"][path]["dropped"] == {"over-long turn": 1}


def test_a_dialogue_with_an_empty_answer_is_unusable():
    with pytest.raises(Unusable, match="empty turn"):
        to_messages(dialogue("a", "")["messages"])


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
    monkeypatch.setattr(staging, "CHUNK_ROWS", 100)
    good = write(tmp_path / "a.jsonl", many_dialogues(250))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": 1}' * 1000)[:30])
    with pytest.raises(InputError, match="breaks off"):
        run(tmp_path / "out", good, str(tmp_path / "b.jsonl.gz"), workers=1)
    assert len(list((tmp_path / "out/.work/staged").glob("*.json"))) >= 1


def test_rows_with_the_same_id_are_all_read(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"id": 7, **dialogue(f"q{i}", "a")} for i in range(3)])
    assert len(run(tmp_path / "out", path)[1]) == 3


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_the_number_of_rows_is_estimated(tmp_path, suffix):
    rng = random.Random(0)
    rows = [dialogue(" ".join(str(rng.random()) for _ in range(100)), "a") for _ in range(5000)]  # 9 MB
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        with pa.output_stream(str(path), compression=kind) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    assert estimate_rows(Source("x", str(path))) == pytest.approx(5000, rel=0.15)


def test_a_set_on_the_hub_that_cannot_be_had_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"accept its terms at https://huggingface\.co/datasets/lmsys/lmsys-chat-1m"):
        run(tmp_path / "out", "lmsys-chat")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        run(tmp_path / "out", str(tmp_path / "none.jsonl"))


FIXTURES = [
    "infinity_instruct_7m",
    "lmsys_chat_1m",
    "orca_agentinstruct_1m_v1_cleaned",
    "tulu_3_sft_mixture",
    "wildchat_1m_full",
]


@pytest.mark.parametrize("name", FIXTURES)
def test_the_five_sft_sets_are_read_and_their_counts_add_up(testdata, name, tmp_path):
    path = str(testdata / f"sft/fixtures/{name}.parquet")
    info, kept = run(tmp_path / "out", path)
    counts = info["counts"][path]
    assert counts["rows"] == 300
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["rows"]
    assert counts["kept"] == len(kept) > 100


REAL_SETS = ["multi/moss", "multi/glaive_toolcall", "multi/fastchat_dummy_conversation", "multi/topical_chat"]
REAL_SETS += ["single/gpteacher_codegen", "single/codealpaca_new", "single/gpteacher_roleplay", "single/gsm8k_train"]


def test_real_dialogues_are_those_that_algorithm_1_keeps(testdata, tmp_path):
    paths = [str(testdata / f"sft/{name}.jsonl") for name in REAL_SETS]
    info, kept = run(tmp_path / "out", *paths, exact=False)
    ledger = pq.read_table(tmp_path / "out/ledger.parquet").to_pylist()
    assert len(ledger) == sum(counts["rows"] for counts in info["counts"].values())
    assert all(c["kept"] + sum(c["dropped"].values()) == c["rows"] for c in info["counts"].values())
    samples, rows = [], []
    for path in paths:
        with Path(path).open() as file:
            for number, line in enumerate(file):
                try:
                    messages = to_messages(json.loads(line)["messages"])
                except Unusable:
                    continue
                samples.append([m["content"] for m in messages if m["role"] != "system"])
                rows.append((path, number))
    expected = {rows[index] for index in kept_by_algorithm_1(samples, 20, "word")}
    assert {(row["source"], row["source_row"]) for row in ledger if row["outcome"] == "kept"} == expected
    assert len(kept) == len(expected) < len(samples)


def test_the_same_set_twice_is_found_row_for_row(testdata, tmp_path):
    first, second = (str(testdata / f"sft/single/{name}.jsonl") for name in ("gpteacher_codegen", "codealpaca_new"))
    info, _ = run(tmp_path / "out", first, second)
    assert info["counts"][second]["kept"] == 0
