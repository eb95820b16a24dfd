"""Stage two: the mixing buffer gives every row once, training learns, logs and resumes."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import edit_manifest, tree_bytes

import fastcache
from fastcache.errors import InputError, IntegrityError
from fastcache.progress import Silent
from fastcache.sae.storage import load_sae
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.run import train
from fastcache.stages.train.stream import MixingBuffer
from fastcache.stages.train.task import to_tensor

HOOK = "resid_post.1"


@pytest.fixture
def cache(small_cache):
    return fastcache.open_cache(small_cache)


def numbers_of(buffer, n_batches):
    return np.concatenate([buffer.next_batch()[0] for _ in range(n_batches)])


@pytest.mark.parametrize("capacity", [1, 300, 1000, 10**6])
@pytest.mark.parametrize("batch_size", [1, 64, 100])
def test_every_row_is_given_exactly_once_an_epoch(cache, capacity, batch_size):
    buffer = MixingBuffer(cache, HOOK, capacity, batch_size, seed=0)
    n_batches = cache.n_tokens // batch_size
    first = numbers_of(buffer, n_batches)
    assert len(np.unique(first)) == n_batches * batch_size
    # What made no whole batch comes next, then the second epoch: after three, each row was given three times.
    total = 3 * cache.n_tokens // batch_size
    given = np.bincount(np.concatenate([first, numbers_of(buffer, total - n_batches)]), minlength=cache.n_tokens)
    left = 3 * cache.n_tokens - total * batch_size
    assert (3 - given).sum() == left
    assert given.max() == 3
    assert given.min() >= 2


def test_rows_come_with_their_numbers(cache):
    buffer = MixingBuffer(cache, HOOK, 500, 50, seed=0)
    everything = cache.residuals(HOOK, 0, cache.n_tokens)
    for _ in range(60):
        numbers, rows = buffer.next_batch()
        assert np.array_equal(to_tensor(rows, "bfloat16", "cpu").numpy(), everything[numbers])


def test_epochs_and_seeds_are_shuffled_differently(cache):
    n_batches = cache.n_tokens // 50
    orders = []
    for seed in (0, 0, 1):
        buffer = MixingBuffer(cache, HOOK, 1000, 50, seed)
        orders.append((numbers_of(buffer, n_batches), numbers_of(buffer, n_batches)))
    assert np.array_equal(orders[0][0], orders[1][0])
    assert not np.array_equal(orders[0][0], orders[2][0])
    assert not np.array_equal(orders[0][0], orders[0][1])


def test_batches_mix_distant_rows(cache):
    buffer = MixingBuffer(cache, HOOK, 2000, 100, seed=0)
    numbers, _ = buffer.next_batch()
    assert np.abs(np.diff(numbers)).mean() > cache.n_tokens / 10


@pytest.mark.parametrize("n_before", [0, 1, 7, 33, 100])
def test_a_restored_buffer_goes_on_with_the_same_batches(cache, n_before):
    buffer = MixingBuffer(cache, HOOK, 900, 64, seed=5)
    numbers_of(buffer, n_before) if n_before else None
    scalars, arrays = buffer.state_dict()
    state = json.loads(json.dumps(scalars)), {name: array.copy() for name, array in arrays.items()}
    other = MixingBuffer(cache, HOOK, 900, 64, seed=5)
    other.load_state_dict(*state)
    for _ in range(150):
        (numbers, rows), (other_numbers, other_rows) = buffer.next_batch(), other.next_batch()
        assert np.array_equal(numbers, other_numbers)
        assert np.array_equal(rows, other_rows)


def config_for(cache, **settings):
    defaults = {
        "arch": "standard",
        "layer": 1,
        "recipe": "fast-paper",
        "batch_size": 64,
        "lr": 3e-3,
        "expansion": 4,
        "log_every": 10,
    }
    return TrainConfig(cache=str(cache), **{**defaults, **settings})


@pytest.mark.parametrize("arch", ["standard", "jumprelu"])
def test_training_lowers_the_error(small_cache, tmp_path, arch):
    train(config_for(small_cache, arch=arch, coefficient=0.01, tokens=30_000), tmp_path / "sae", Silent())
    lines = [json.loads(line) for line in (tmp_path / "sae/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["fvu"] < 0.5 * lines[0]["fvu"]


def test_the_sae_knows_where_it_comes_from(small_cache, tmp_path):
    train(config_for(small_cache, tokens=1000), tmp_path / "sae", Silent())
    sae, info = load_sae(tmp_path / "sae")
    assert (sae.d_in, sae.d_sae, info["hook_point"]) == (32, 128, HOOK)
    assert info["model"] == fastcache.open_cache(small_cache).manifest.identity["model"]


def test_training_is_reproducible(small_cache, tmp_path):
    for name in ("a", "b"):
        train(config_for(small_cache, tokens=3000), tmp_path / name, Silent())
    a, b = (load_sae(tmp_path / name)[0].state_dict() for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_trained_sae_is_left_alone(small_cache, tmp_path):
    train(config_for(small_cache, tokens=1000), tmp_path / "sae", Silent())
    before = tree_bytes(tmp_path / "sae")
    train(config_for(small_cache, tokens=1000), tmp_path / "sae", Silent())
    assert tree_bytes(tmp_path / "sae") == before


def test_several_layers_need_a_choice(small_cache, tmp_path):
    with pytest.raises(InputError, match=r"resid_post\.1, resid_post\.3; none was chosen"):
        train(config_for(small_cache, layer=None), tmp_path / "sae", Silent())


def test_a_missing_layer_is_named(small_cache, tmp_path):
    with pytest.raises(InputError, match=r"'resid_post\.2' was asked for"):
        train(config_for(small_cache, layer=2), tmp_path / "sae", Silent())


def test_held_out_rows_are_not_trained_on(held_out_cache, tmp_path):
    with pytest.raises(InputError, match="held-out"):
        train(config_for(held_out_cache), tmp_path / "sae", Silent())


def test_a_cache_smaller_than_a_batch_is_refused(small_cache, tmp_path):
    with pytest.raises(InputError, match="fewer than one batch"):
        train(config_for(small_cache, batch_size=10**6, tokens=10**6), tmp_path / "sae", Silent())


def test_an_unfinished_cache_is_refused(small_cache, tmp_path):

    shutil.copytree(small_cache, tmp_path / "cache")
    edit_manifest(tmp_path / "cache", state="writing")
    with pytest.raises(InputError, match="not complete"):
        train(config_for(tmp_path / "cache"), tmp_path / "sae", Silent())


@pytest.fixture
def damaged_cache(small_cache, tmp_path):
    """A cache whose first unit has a flipped bit."""
    shutil.copytree(small_cache, tmp_path / "damaged")
    shard = tmp_path / "damaged/parts/00000000/resid_post.1/c/0/0"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(bytes(data))
    return tmp_path / "damaged"


def test_a_damaged_unit_stops_training_and_is_named(damaged_cache, tmp_path):
    with pytest.raises(IntegrityError, match="unit 0"):
        train(config_for(damaged_cache), tmp_path / "sae", Silent())


def test_a_damaged_unit_can_be_skipped_and_is_counted(damaged_cache, tmp_path):
    info = train(config_for(damaged_cache, on_corrupt="skip"), tmp_path / "sae", Silent())
    assert ["unit 0" in reason for reason in info["skipped_units"]] == [True]


def test_an_epoch_without_a_damaged_unit_has_all_other_rows_once(damaged_cache):
    cache = fastcache.open_cache(damaged_cache)
    buffer = MixingBuffer(cache, HOOK, 1000, 100, seed=0, on_corrupt="skip")
    given = np.concatenate([buffer.next_batch()[0] for _ in range(cache.n_tokens // 100)])
    stop = cache.units()[0, 2]
    assert (given >= stop).all()
    assert len(np.unique(given)) == len(given) >= cache.n_tokens - stop - 100


@pytest.mark.parametrize("n_before", [0, 3, 11])
def test_a_stream_that_skips_is_restored_with_the_same_batches(damaged_cache, n_before):
    cache = fastcache.open_cache(damaged_cache)
    one, two = (MixingBuffer(cache, HOOK, 600, 100, seed=0, on_corrupt="skip") for _ in range(2))
    for _ in range(n_before):
        one.next_batch()
    two.load_state_dict(*one.state_dict())
    for _ in range(10):
        (numbers, rows), (same_numbers, same_rows) = one.next_batch(), two.next_batch()
        assert np.array_equal(numbers, same_numbers)
        assert np.array_equal(rows, same_rows)


def test_a_batch_of_one_row_trains(small_cache, tmp_path):
    train(config_for(small_cache, batch_size=1, tokens=30), tmp_path / "sae", Silent())
    lines = [json.loads(line) for line in (tmp_path / "sae/metrics.jsonl").read_text().splitlines()]
    assert [line["fvu"] for line in lines[:-1]] == [None, None]
    assert lines[-1]["fvu"] > 0  # of many rows


def test_a_damaged_checkpoint_gives_way_to_the_one_before(small_cache, tmp_path):
    config = config_for(small_cache, tokens=3000, checkpoint_every=10)
    train(config, tmp_path / "whole", Silent())
    train(config, tmp_path / "sae", Silent())
    for name in ("sae.json", "sae.safetensors"):
        (tmp_path / "sae" / name).unlink()
    newest = sorted((tmp_path / "sae/checkpoints").glob("[0-9]*"))[-1]
    (newest / "state.safetensors").write_bytes(b"damage")
    train(config, tmp_path / "sae", Silent())
    assert (tmp_path / "sae/sae.safetensors").read_bytes() == (tmp_path / "whole/sae.safetensors").read_bytes()


class Dies(Silent):
    """Progress that ends the run after so many steps, as a kill would."""

    def __init__(self, after):
        self.left = after

    def advance(self, amount, note=""):
        self.left -= 1
        if not self.left:
            raise RuntimeError("killed")


RESUMED = {
    "standard": {"recipe": "modern"},
    "standard, paper": {"recipe": "fast-paper"},
    "jumprelu": {"recipe": "modern", "tokens_of": "content"},
    "jumprelu, paper": {"recipe": "fast-paper"},
    "topk": {"recipe": "modern", "norm_filter": "1.2x-median"},
    "batchtopk": {"recipe": "modern", "skip_first_position": True},
    "gated": {"recipe": "modern"},
    "matryoshka": {"recipe": "modern"},
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(small_cache, tmp_path, case):
    arch = case.partition(",")[0]
    config = config_for(small_cache, arch=arch, tokens=64 * 90, checkpoint_every=20, dead_window=10, **RESUMED[case])
    train(config, tmp_path / "whole", Silent())
    for steps in (33, 18, 29):
        with pytest.raises(RuntimeError, match="killed"):
            train(config, tmp_path / "sae", Dies(steps))
    train(config, tmp_path / "sae", Silent())
    for name in ("sae.safetensors", "sae.json", "metrics.jsonl"):
        assert (tmp_path / "sae" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_death_while_a_checkpoint_is_written_leaves_the_one_before(small_cache, tmp_path, monkeypatch):
    from fastcache import files
    from fastcache.stages.train import checkpoint

    config = config_for(small_cache, arch="batchtopk", recipe="modern", tokens=64 * 90, checkpoint_every=20)
    train(config, tmp_path / "whole", Silent())
    steps = [(checkpoint, "save_file"), (checkpoint, "write_file"), (files, "fsync_tree"), (files, "remove")]
    for module, name in [*steps, (files, "fsync_directory")]:
        with monkeypatch.context() as patch:

            def die(*_):
                raise RuntimeError("killed")

            patch.setattr(module, name, die)
            with pytest.raises(RuntimeError, match="killed"):
                train(config, tmp_path / "sae", Silent())
    train(config, tmp_path / "sae", Silent())
    assert (tmp_path / "sae/sae.safetensors").read_bytes() == (tmp_path / "whole/sae.safetensors").read_bytes()


@pytest.mark.parametrize("kept", [1, 3])
def test_so_many_checkpoints_are_kept(small_cache, tmp_path, kept):
    config = config_for(small_cache, tokens=64 * 90, checkpoint_every=20, keep_checkpoints=kept)
    train(config, tmp_path / "sae", Silent())
    found = sorted(int(path.name) for path in (tmp_path / "sae/checkpoints").iterdir())
    assert found == [20, 40, 60, 80][-kept:]


def test_a_checkpoint_says_what_its_bits_depend_on(small_cache, tmp_path):
    train(config_for(small_cache, tokens=64 * 30, checkpoint_every=20), tmp_path / "sae", Silent())
    state = json.loads((tmp_path / "sae/checkpoints/000000020/state.json").read_text())
    assert state["numerics"]["threads"] == torch.get_num_threads()
    assert {"torch", "device", "mkldnn_matmul"} <= set(state["numerics"])


def test_a_moved_cache_can_be_resumed_from(small_cache, tmp_path):

    train(config_for(small_cache, tokens=1000), tmp_path / "sae", Silent())
    shutil.copytree(small_cache, tmp_path / "moved")
    train(config_for(tmp_path / "moved", tokens=1000), tmp_path / "sae", Silent())
