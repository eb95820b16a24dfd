"""Shuffle quality: the figures against brute force and known values, the order against what training gets."""

import math
import subprocess
import sys
from collections import Counter

import corpora
import numpy as np
import pytest
from conftest import make_dialogues, run_extract

import fastcache
from fastcache.corpus import Corpus
from fastcache.errors import InputError, MismatchError
from fastcache.pipeline.cli import main
from fastcache.progress import Silent
from fastcache.stages.train import shuffle
from fastcache.stages.train.config import ShuffleConfig, TrainConfig
from fastcache.stages.train.order import MixedOrder, rows_of_units
from fastcache.stages.train.run import train
from fastcache.stages.train.shuffle import RHO, Runs, compare, drift, enough_buffer, runs_of, tenths, variance_inflation
from fastcache.stages.train.stream import MixingBuffer


def units_of(n_rows, unit):
    starts = np.arange(0, n_rows, unit)
    return np.stack([starts, np.minimum(starts + unit, n_rows)], axis=1)


def instances_of(lengths):
    return Runs(np.cumsum([0, *lengths[:-1]]), np.arange(len(lengths)), int(np.sum(lengths)))


def compared(lengths, unit, buffer, batch_size, seed=0):
    instances = instances_of(lengths)
    n = instances.n_rows
    order = MixedOrder(units_of(n, unit), buffer, batch_size, seed)
    return compare(order, instances, {"place": tenths(n)}, batch_size, seed, Silent())


def inspect(capsys, *arguments):
    """Exit code and output of `fastcache inspect`."""
    code = 0
    try:
        main(["inspect", *map(str, arguments)])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


@pytest.fixture
def measured(monkeypatch):
    """The batches that are measured: a list for training's order, one for the permutation, one for sequential reading."""
    lists, measure = [], shuffle.measure

    def recorded(batches, *rest):
        lists.append(list(batches))
        return measure(lists[-1], *rest)

    monkeypatch.setattr(shuffle, "measure", recorded)
    return lists


LENGTHS = np.random.default_rng(0).integers(5, 200, 2000)


def test_variance_inflation_is_that_of_the_covariance_matrix():
    instance = np.array([0, 0, 0, 1, 2, 2, 5])
    covariance = np.where(instance[:, None] == instance[None, :], RHO, 0.0)
    np.fill_diagonal(covariance, 1.0)
    weights = np.full(len(instance), 1 / len(instance))
    counts = np.unique(instance, return_counts=True)[1]
    assert variance_inflation(counts) == pytest.approx(weights @ covariance @ weights * len(instance))


def test_rows_of_different_instances_are_not_inflated():
    assert variance_inflation(np.ones(4096, np.int64)) == 1


def test_drift_is_the_total_variation_distance():
    assert drift(np.array([0, 0, 1, 2]), np.array([0.5, 0.25, 0.25])) == 0
    assert drift(np.array([0, 0, 0, 0]), np.array([0.5, 0.25, 0.25])) == pytest.approx(0.5)
    assert drift(np.array([2, 2]), np.array([1.0, 0.0, 0.0])) == 1


def test_sequential_reading_of_equal_instances_is_known_exactly():
    quality = compared([8] * 5000, 16, 400, batch_size=32).sequential
    assert quality.distinct == 4
    assert quality.inflation == pytest.approx(1 + RHO * (8 - 1))
    assert quality.drift["place"] == pytest.approx(0.9)


def test_a_global_permutation_has_its_expected_distinct_instances():
    n, batch = int(LENGTHS.sum()), 512
    expected = sum(1 - math.comb(n - length, batch) / math.comb(n, batch) for length in LENGTHS.tolist())
    rows_of_a_pair = (LENGTHS * (LENGTHS - 1.0)).sum() / (n * (n - 1))
    comparison = compared(LENGTHS, 256, 10**9, batch)
    assert comparison.permutation.distinct == pytest.approx(expected, rel=0.01)
    assert comparison.permutation.inflation == pytest.approx(1 + RHO * (batch - 1) * rows_of_a_pair, rel=0.01)
    # A buffer that holds everything is one.
    assert comparison.mixed.distinct == pytest.approx(expected, rel=0.01)
    assert comparison.good


def test_smaller_units_and_larger_buffers_mix_better():
    figures = [compared(LENGTHS, unit, buffer, 512).mixed for unit, buffer in ((512, 4000), (64, 4000), (64, 32000))]
    assert figures[0].distinct < figures[1].distinct < figures[2].distinct
    assert figures[0].inflation > figures[1].inflation > figures[2].inflation
    assert figures[0].drift["place"] > figures[2].drift["place"]


def test_the_measured_batches_are_spread_over_the_epoch(measured):
    compared([10] * 10_000, 64, 1000, 100)
    mixed, permutation, sequential = measured
    assert len(mixed) == len(permutation) == len(sequential) == 64
    gaps = np.diff([batch[0] for batch in sequential])
    assert set(gaps) <= {1500, 1600}
    assert len(np.unique(np.concatenate(mixed))) == 6400
    assert all(len(np.unique(batch)) == 100 for batch in permutation)


def test_inspect_measures_the_batches_that_training_gets(small_cache, tmp_path, monkeypatch, measured, capsys):
    given, next_batch = [], MixingBuffer.next_batch

    def recorded(buffer):
        numbers, rows = next_batch(buffer)
        given.append(numbers)
        return numbers, rows

    monkeypatch.setattr(MixingBuffer, "next_batch", recorded)
    settings = {"layer": 1, "batch_size": 64, "buffer_tokens": 700, "seed": 9}
    train(
        TrainConfig(cache=str(small_cache), arch="standard", recipe="fast-paper", **settings),
        tmp_path / "sae",
        Silent(),
    )
    inspect(capsys, small_cache, "--shuffle", "--batch-size=64", "--buffer-tokens=700", "--seed=9")
    n_batches = fastcache.open_cache(small_cache).n_tokens // 64
    assert len(given) == n_batches
    in_training = {batch.tobytes(): index for index, batch in enumerate(given)}
    places = [in_training[batch.tobytes()] for batch in measured[0]]
    assert places == sorted(places)
    assert len(set(places)) == min(64, n_batches)


def test_a_buffer_that_is_too_small_is_told_which_would_do(small_cache, capsys):
    cache = fastcache.open_cache(small_cache)
    config = ShuffleConfig(batch_size=100, buffer_tokens=200, seed=0)
    code, text = inspect(capsys, small_cache, "--shuffle", "--batch-size=100", "--buffer-tokens=200", "--seed=0")
    enough = enough_buffer(cache, config, runs_of(cache)[0], Silent())
    assert code == 0
    assert "Not good: 0." in text
    assert f"Train with --buffer-tokens {enough:,}." in text
    _, text = inspect(capsys, small_cache, "--shuffle", "--batch-size=100", f"--buffer-tokens={enough}", "--seed=0")
    assert "Good: " in text


def test_shuffle_needs_no_torch_and_no_residuals(small_cache, tmp_path):
    import shutil

    shutil.copytree(small_cache, tmp_path / "cache")
    for shard in (tmp_path / "cache/parts").glob("*/resid_post.*/c/0/0"):
        shard.write_bytes(bytes(shard.stat().st_size))  # damaged, but for its size
    code = (
        "import sys; from fastcache.pipeline.cli import main\n"
        "main(['inspect', sys.argv[1], '--shuffle', '--batch-size', '100'])\n"
        "sys.exit(str({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "cache")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.stderr.strip() == "set()"
    assert "Good: " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "1"], "go with --shuffle only"),
        (["--shuffle", "--batch-size", "1,000,000"], "fewer than one batch of 1,000,000"),
        (["--shuffle", "--buffer-tokens", "0"], "expected a number from 1 to"),
    ],
)
def test_wrong_options_are_refused(small_cache, capsys, arguments, message):
    code, text = inspect(capsys, small_cache, *arguments)
    assert code == 2
    assert message in text


def test_only_a_cache_has_a_shuffle(chat_corpus, capsys):
    code, text = inspect(capsys, chat_corpus, "--shuffle")
    assert code == 2
    assert "is no cache" in text


@pytest.fixture(scope="module")
def two_sources(tiny_qwen, tmp_path_factory):
    """A corpus of two files, and a cache of blocks: its documents begin and end anywhere in them."""
    folder = tmp_path_factory.mktemp("two-sources")
    paths = []
    for name, count in (("a", 30), ("b", 10)):
        rows = [{"messages": messages} for messages in make_dialogues(count, seed=ord(name))]
        paths.append(corpora.write(folder / f"{name}.jsonl", rows))
    corpora.run(folder / "corpus", *paths)
    run_extract(tiny_qwen, folder / "corpus", folder / "cache", method="bt-f", block_size=64)
    return Corpus(folder / "corpus"), fastcache.open_cache(folder / "cache")


def test_sources_are_those_of_the_corpus(two_sources):
    corpus, cache = two_sources
    source_of = {row.row: row.source for row in corpus.rows("train")}
    counts = Counter()
    by_row = {}
    for index, part in enumerate(cache.parts):
        offsets = part.tokens["document_offsets"].tolist()
        for document, start, stop in zip(part.tokens["document_ids"].tolist(), offsets[:-1], offsets[1:], strict=True):
            counts[source_of[document]] += stop - start
            by_row.update({row + cache.first_row(index): source_of[document] for row in range(start, stop)})
    instances, groupings = runs_of(cache, corpus)
    found = groupings["source"].of(np.arange(cache.n_tokens))
    pairs = set(zip(found.tolist(), (by_row[row] for row in range(cache.n_tokens)), strict=True))
    assert len(pairs) == len(counts) == 2
    assert sorted(groupings["source"].shares()) == pytest.approx(sorted(n / cache.n_tokens for n in counts.values()))
    starts = [instance.rows.start for instance in cache.instances()]
    assert instances.starts.tolist() == starts


def test_drift_by_source_is_shown_where_the_corpus_is_given(two_sources, capsys):
    corpus, cache = two_sources
    _, text = inspect(capsys, cache.path, "--shuffle", "--batch-size", 100, "--corpus", corpus.path)
    assert "drift by" in text
    assert "source" in text


def test_another_corpus_is_refused(two_sources, small_cache):
    with pytest.raises(MismatchError, match="made from the corpus"):
        runs_of(fastcache.open_cache(small_cache), two_sources[0])


def test_a_row_that_the_split_has_not_is_refused(two_sources):
    with pytest.raises(InputError, match="hasn't all the rows"):
        two_sources[0].source_numbers("train", np.array([10**6]))


def test_token_arrays_of_the_parts_do_not_stay_in_memory(small_cache):
    cache = fastcache.open_cache(small_cache)
    runs_of(cache)
    assert not any("tokens" in vars(part) for part in cache.parts)


def test_units_are_numbered_over_the_whole_cache(small_cache):
    cache = fastcache.open_cache(small_cache)
    units = rows_of_units(cache)
    assert units[0, 0] == 0
    assert units[-1, 1] == cache.n_tokens
    assert np.array_equal(units[1:, 0], units[:-1, 1])
