"""Which rows are trained on: by type and norm, each kept row once an epoch, counted, and the same after a resume."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastcache
from fastcache.cache_format.schema import TokenType, TurnRole, turn_roles
from fastcache.errors import InputError
from fastcache.progress import Silent
from fastcache.sae.storage import load_sae
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.order import MixedOrder
from fastcache.stages.train.run import train
from fastcache.stages.train.selection import norm_factor, select_rows
from fastcache.stages.train.stream import MixingBuffer

HOOK = "resid_post.1"


@pytest.fixture
def cache(small_cache):
    return fastcache.open_cache(small_cache)


def config_for(cache, **options):
    return TrainConfig(cache=str(cache), arch="topk", layer=1, expansion=4, log_every=10, **options)


def types_of(cache):
    return np.concatenate([instance.token_types for instance in cache.instances()])


def given_by(buffer, n_rows, kept):
    """How often each row was given in the batches of three epochs of `kept` rows."""
    numbers = np.concatenate([buffer.next_batch()[0] for _ in range(3 * kept // 32)])
    return np.bincount(numbers, minlength=n_rows)


@pytest.mark.parametrize("tokens_of", ["content", "special", "assistant"])
@pytest.mark.parametrize("skip_first", [False, True])
def test_kept_rows_are_those_of_the_asked_types(cache, tokens_of, skip_first):
    selection = select_rows(cache, HOOK, config_for("x", tokens_of=tokens_of, skip_first_position=skip_first))
    types = types_of(cache)
    wanted = {
        "content": types & TokenType.CONTENT != 0,
        "special": types & (TokenType.SPECIAL | TokenType.ROLE_WORD) != 0,
        "assistant": (types & TokenType.CONTENT != 0) & (turn_roles(types) == TurnRole.ASSISTANT),
    }[tokens_of]
    if skip_first:
        wanted &= types & TokenType.FIRST_POSITION == 0
    assert np.array_equal(selection.mask, wanted)
    assert selection.n_kept == wanted.sum()
    assert 0 < wanted.sum() < cache.n_tokens


def test_dropped_rows_are_counted_by_reason(cache):
    selection = select_rows(cache, HOOK, config_for("x", tokens_of="special", skip_first_position=True))
    types = types_of(cache)
    special = types & (TokenType.SPECIAL | TokenType.ROLE_WORD) != 0
    first = types & TokenType.FIRST_POSITION != 0
    assert selection.dropped == {"not special": (~special).sum(), "first position": (special & first).sum()}


@given(
    mask=st.lists(st.booleans(), min_size=40, max_size=200), unit=st.integers(1, 30), capacity=st.integers(1, 120),
    batch=st.integers(1, 16), seed=st.integers(0, 5),
)  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_every_kept_row_is_given_once_an_epoch_whatever_the_mask(mask, unit, capacity, batch, seed):
    mask = np.array(mask)
    n, kept = len(mask), int(mask.sum())
    if kept < batch:
        return
    starts = np.arange(0, n, unit)
    order = MixedOrder(np.stack([starts, np.minimum(starts + unit, n)], 1), capacity, batch, seed, mask)
    n_batches = 3 * kept // batch
    counts = np.bincount(np.concatenate([order.next_batch() for _ in range(n_batches)]), minlength=n)
    assert not counts[~mask].any()
    assert counts[mask].max() <= 3
    # What is missing waits for a whole batch, perhaps a row twice: drawn in neither of two epochs.
    assert (3 - counts[mask]).sum() == 3 * kept - n_batches * batch


@pytest.mark.parametrize("tokens_of", ["content", "special", "assistant"])
def test_the_buffer_gives_each_kept_row_once_an_epoch(cache, tokens_of):
    selection = select_rows(cache, HOOK, config_for("x", tokens_of=tokens_of))
    counts = given_by(MixingBuffer(cache, HOOK, 300, 32, 0, selection=selection), cache.n_tokens, selection.n_kept)
    assert not counts[~selection.mask].any()
    assert set(counts[selection.mask].tolist()) <= {2, 3}


def small_norm_filter(cache):
    """A selection whose norm limit drops about a tenth of the rows."""
    selection = select_rows(cache, HOOK, config_for("x", tokens_of="content", norm_filter="1.5x-median"))
    norms = np.linalg.norm(cache.residuals(HOOK, 0, cache.n_tokens), axis=1)
    selection.largest_norm = float(np.quantile(norms[selection.mask], 0.9))
    return selection, selection.mask & (norms <= selection.largest_norm)


def test_rows_of_massive_norm_are_left_out_and_counted(cache):
    selection, kept = small_norm_filter(cache)
    buffer = MixingBuffer(cache, HOOK, 300, 32, 0, selection=selection)
    while buffer.n_read < 2 * selection.n_kept:
        numbers, _ = buffer.next_batch()
        assert kept[numbers].all()
    assert buffer.n_too_large == pytest.approx(0.1 * buffer.n_read, rel=0.2)


def test_rows_within_the_norm_come_once_an_epoch(cache):
    selection, kept = small_norm_filter(cache)
    buffer = MixingBuffer(cache, HOOK, 300, 32, 0, selection=selection)
    given, n_batches = [], 2 * selection.n_kept // 32
    for _ in range(n_batches):
        given.append(buffer.next_batch()[0])
    counts = np.bincount(np.concatenate(given), minlength=cache.n_tokens)
    assert not counts[~kept].any()
    assert set(counts[kept].tolist()) <= {1, 2}


@pytest.mark.parametrize("n_before", [0, 3, 17, 60])
def test_a_selecting_buffer_is_restored_with_the_same_batches(cache, n_before):
    selection, _ = small_norm_filter(cache)
    one, two = (MixingBuffer(cache, HOOK, 300, 32, 4, selection=selection) for _ in range(2))
    for _ in range(n_before):
        one.next_batch()
    scalars, arrays = one.state_dict()
    two.load_state_dict(json.loads(json.dumps(scalars)), {name: array.copy() for name, array in arrays.items()})
    for _ in range(100):
        (numbers, rows), (same_numbers, same_rows) = one.next_batch(), two.next_batch()
        assert np.array_equal(numbers, same_numbers)
        assert np.array_equal(rows, same_rows)
    assert (one.n_read, one.n_too_large) == (two.n_read, two.n_too_large)


def test_a_buffers_state_holds_numbers_and_no_rows(cache):
    buffer = MixingBuffer(cache, HOOK, 300, 32, 0)
    buffer.next_batch()
    assert all(array.dtype == np.int64 and array.ndim == 1 for array in buffer.state_dict()[1].values())


def test_the_norm_limit_is_a_multiple_of_the_median(cache):
    selection = select_rows(cache, HOOK, config_for("x", norm_filter="10x-median"))
    norms = np.linalg.norm(cache.residuals(HOOK, 0, cache.n_tokens), axis=1)
    assert selection.largest_norm == pytest.approx(10 * np.median(norms), rel=0.05)


@pytest.mark.parametrize("text", ["10", "x-median", "1x-median", "0.5x-median", "10x-mean", "-3x-median"])
def test_a_norm_filter_that_makes_no_sense_is_refused(text):
    with pytest.raises(InputError, match="for example 10x-median"):
        norm_factor(text)


def test_counts_of_a_run_stand_in_its_file(small_cache, tmp_path):
    options = {"tokens_of": "content", "norm_filter": "1.2x-median", "batch_size": 64, "tokens": 6400}
    train(config_for(small_cache, **options), tmp_path / "sae", Silent())
    tokens = load_sae(tmp_path / "sae")[1]["tokens"]
    assert tokens["of"] == "content"
    assert tokens["kept_by_type"] + tokens["dropped_by_type"]["not content"] == tokens["rows"]
    assert 0 < tokens["dropped_by_norm"] < tokens["rows_read"]
    assert tokens["largest_norm"] == pytest.approx(1.2 * tokens["median_norm"])


def test_the_scale_is_that_of_the_kept_rows(small_cache, cache, tmp_path):
    scales = {}
    for tokens_of in ("special", "content"):
        config = config_for(small_cache, tokens_of=tokens_of, batch_size=64, tokens=640)
        train(config, tmp_path / tokens_of, Silent())
        scales[tokens_of] = load_sae(tmp_path / tokens_of)[1]["training"]["activation_scale"]
        rows = cache.residuals(HOOK, 0, cache.n_tokens)[select_rows(cache, HOOK, config).mask]
        assert scales[tokens_of] == pytest.approx((32 / np.square(rows).sum(1).mean()) ** 0.5, rel=0.05)
    assert scales["special"] != pytest.approx(scales["content"], rel=1e-3)


def test_a_saved_sae_works_on_activations_as_they_are(small_cache, cache, tmp_path):
    train(config_for(small_cache, tokens=60_000, batch_size=64, lr=3e-3), tmp_path / "sae", Silent())
    sae, info = load_sae(tmp_path / "sae")
    assert info["training"]["activation_scale"] != 1.0
    x = torch.from_numpy(cache.residuals(HOOK, 0, cache.n_tokens))
    fvu = (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    last = json.loads((tmp_path / "sae/metrics.jsonl").read_text().splitlines()[-1])
    assert float(fvu) == pytest.approx(last["fvu"], rel=0.3)
    assert float(fvu) < 0.5
