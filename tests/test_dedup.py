"""Deduplication: equal to the paper's Algorithm 1, written out again as a plain set, on any input and on real sets."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpora import dialogue, run, write
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcache.stages.prepare import kernels
from fastcache.stages.prepare.conflicts import N_BUCKETS, GramFile, PairFile, find_pairs, owners, resolve, write_grams
from fastcache.stages.prepare.ngrams import Grams, Turns, ngram_hashes
from fastcache.stages.prepare.schema import Unusable, to_messages


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


def hashed(turns, n, unit):
    """All n-grams of `turns`; the row of each is the number of its turn."""
    pieces = ngram_hashes(
        Turns.join([turn.encode() for turn in turns]), np.arange(len(turns), dtype=np.uint32), n, unit
    )
    return Grams(*(np.concatenate(column) for column in zip(*pieces, strict=True)))


def kept_by_ours(samples, n, unit, folder, chunk, n_ranges, bucket, n_given=0):
    """The same through files: n-grams by chunks, pairs by ranges of hashes, rows by buckets."""
    files = []
    for first in range(0, len(samples), chunk):
        part = samples[first : first + chunk]
        rows = np.repeat(np.arange(len(part), dtype=np.uint32), [len(sample) for sample in part])
        turns = Turns.join([turn.encode() for sample in part for turn in sample])
        files.append(GramFile(folder / f"{first}.grams", first))
        write_grams(files[-1].path, list(ngram_hashes(turns, rows, n, unit)))
    pair_files, n_groups = [], 0
    edges = [N_BUCKETS * index // n_ranges for index in range(n_ranges + 1)]
    for index in range(n_ranges):
        pairs, count = find_pairs(files, edges[index], edges[index + 1])
        pair_files.append(PairFile(folder / f"{index}.pairs", n_groups))
        pairs.tofile(pair_files[-1].path)
        n_groups += count
    blame = resolve(pair_files, len(samples), n_groups, bucket, n_given)
    return blame, owners(pair_files, blame, bucket)


texts = st.text(alphabet="ab \n\x1c\x85\u2003\u00fc\u20ac", max_size=30)
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
    grams = hashed(turns, n, unit)
    assert grams.rows.tolist() == [index for index, _ in expected]
    hashes = list(zip(grams.hashes.tolist(), grams.checks.tolist(), strict=True))
    assert (
        len(set(hashes))
        == len({gram for _, gram in expected})
        == len(set(zip(hashes, (g for _, g in expected), strict=True)))
    )


def test_ngrams_do_not_depend_on_what_else_is_hashed():
    long = " ".join(f"w{i}" for i in range(60_000))  # more than a batch
    alone = hashed([long], 20, "word")
    together = hashed(["a b c", long, "", "d"], 20, "word")
    assert np.array_equal(alone.hashes, together.hashes)
    assert np.array_equal(alone.checks, together.checks)


def mixed(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def word_hash(word):
    """Both hashes of a word in plain Python: the definition in `kernels.py`, written out again."""
    a = len(word) * 0x9E3779B97F4A7C15 % 2**64
    b = a ^ (2**64 - 1)
    pieces = [word[i : i + 8] for i in range(0, len(word), 8)]
    for piece in [*pieces[:-1], pieces[-1].rjust(8, b"\0")]:
        x = int.from_bytes(piece, "little")
        a = (a ^ x) * 0xD6E8FEB86659FD93 % 2**64
        b = (b + x) * 0xC2B2AE3D27D4EB4F % 2**64
        a, b = a ^ a >> 32, b ^ b >> 29
    return mixed(a), mixed(b)


def gram_hash(units):
    """The hash of an n-gram from one hash of each unit: halves of 2^k units are joined, then these to one another."""

    def run(first, length):
        if length == 1:
            return units[first]
        half = length // 2
        return mixed((run(first, half) * 0x9FB21C651E98DF25 + run(first + half, half)) % 2**64)

    result, covered = None, 0
    for bit in range(len(units).bit_length()):
        if len(units) >> bit & 1:
            mine = run(covered, 1 << bit)
            result = mine if result is None else mixed((result * 0xA24BAED4963EE407 + mine) % 2**64)
            covered += 1 << bit
    return result


@settings(max_examples=200, deadline=None)
@given(
    turn=st.text(alphabet="ab \u00fc\u4e2d\U0001f600", max_size=60), n=st.integers(1, 21),
    unit=st.sampled_from(["word", "character"]),
)  # fmt: skip
def test_compiled_hashes_are_those_of_plain_python(turn, n, unit):
    units = [word_hash(u.encode()) for u in (turn.split() if unit == "word" else turn)]
    found = hashed([turn], n, unit)
    runs = [list(zip(*units[i : i + n], strict=True)) for i in range(len(units) - n + 1)]
    assert found.hashes.tolist() == [gram_hash(first) for first, _ in runs]
    assert found.checks.tolist() == [gram_hash(second) >> 32 for _, second in runs]


def test_white_space_is_what_python_splits_at():
    for point in set(range(sys.maxunicode + 1)) - set(range(0xD800, 0xE000)):
        if point < 0x3100 or point % 97 == 0:
            text = f"a{chr(point)}b"
            assert len(hashed([text], 1, "word").hashes) == len(text.split()), hex(point)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 1000])
def test_long_words_that_differ_anywhere_are_told_apart(length):
    words = {b"x" * i + b"y" + b"x" * (length - i - 1) for i in range(length)} | {b"x" * length, b"x" * (length + 1)}
    found = hashed([word.decode() for word in words], 1, "word")
    assert len(set(found.hashes.tolist())) == len(set(found.checks.tolist())) == len(words)


def test_hashes_are_the_same_where_compiled_code_cannot_be_kept(monkeypatch):
    def njit(cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba_njit(**options)

    numba_njit = kernels.numba.njit
    monkeypatch.setattr(kernels.numba, "njit", njit)
    mix = kernels.compiled(kernels._mixed.py_func)
    assert int(mix(np.uint64(12345))) == mixed(12345)


@pytest.mark.parametrize(
    "text", ["Some Words That Differ In Case Only", "\u00dcber \u0130zmir \u039f\u0394\u039f\u03a3 \u00e9t\u00c9"]
)
def test_case_matters_unless_it_is_asked_not_to(tmp_path, text):
    path = write(
        tmp_path / "rows.jsonl", [dialogue(f"{text} {i}", "yes") for i in "ab"] + [dialogue(text.lower(), "no")]
    )
    assert len(run(tmp_path / "a", path, ngram=4)[1]) == 2
    assert len(run(tmp_path / "b", path, ngram=4, lowercase=True)[1]) == 1


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
