"""Preparation: the paper's deduplication against a plain reference, and every input row accounted for."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcache.corpus import Corpus
from fastcache.errors import InputError, MismatchError
from fastcache.progress import Silent
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.dedup import Deduplicator
from fastcache.stages.prepare.run import prepare
from fastcache.stages.prepare.schema import Unusable, to_messages


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def dialogue(*texts):
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def run(out, *sources, **options):
    info = prepare(PrepareConfig(source=sources, **options), out, Silent())
    return info, [row for split in ("train", "eval") if info["splits"][split] for row in Corpus(out).rows(split)]


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


turns = st.lists(st.text(alphabet="ab \n", max_size=30), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.lists(turns, max_size=12), st.integers(1, 5), st.sampled_from(["word", "character"]))
def test_deduplication_equals_algorithm_1(samples, n, unit):
    deduplicator = Deduplicator(n, unit, exact=False)
    kept = [i for i, sample in enumerate(samples) if deduplicator.verdict(sample, repr((i, sample))) is None]
    assert kept == kept_by_algorithm_1(samples, n, unit)


def test_a_dropped_sample_adds_nothing_to_the_seen_set():
    deduplicator = Deduplicator(2, "word")
    verdicts = [deduplicator.verdict([text], text) for text in ("a b", "a b c d", "c d")]
    assert verdicts == [None, "n-gram duplicate", None]


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


def test_a_truncated_gz_keeps_the_rows_before_the_break(tmp_path):
    import random

    rng = random.Random(0)
    rows = [dialogue(f"{rng.random()} {rng.random()}", str(rng.random())) for _ in range(2000)]
    data = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(data[: len(data) // 2])
    info, kept = run(tmp_path / "out", str(path))
    dropped = info["counts"][str(path)]["dropped"]
    assert dropped["unreadable file"] == 1
    assert 100 < len(kept) < 2000


def test_schemas_of_other_names_become_one():
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "system", "value": ""}]
    assert to_messages(sharegpt) == dialogue("a", "b")["messages"]


def test_a_dialogue_with_an_empty_answer_is_unusable():
    with pytest.raises(Unusable, match="empty turn"):
        to_messages(dialogue("a", "")["messages"])


def test_the_permutation_is_seeded_and_the_splits_disjoint(tmp_path):
    path = write(tmp_path / "rows.jsonl", [dialogue(f"q{i}", f"a{i}") for i in range(100)])
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        info, rows = run(tmp_path / name, path, seed=seed)
        assert info["splits"] == {"eval": 10, "train": 90}
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
