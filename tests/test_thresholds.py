"""The threshold that a BatchTopK or Matryoshka SAE is saved with gives its k on the rows that it was trained on."""

import numpy as np
import pytest
import torch

import fastcache
from fastcache.progress import Silent
from fastcache.sae.architectures import BatchTopKSae, MatryoshkaSae, StandardSae
from fastcache.sae.storage import load_sae
from fastcache.stages.train import stream
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.run import train
from fastcache.stages.train.selection import Selection, select_rows
from fastcache.stages.train.stream import MixingBuffer

HOOK = "resid_post.1"


def random_batchtopk(k=7, d_in=16, d_sae=64, cls=BatchTopKSae):
    generator = torch.Generator().manual_seed(1)
    sae = cls(d_in, d_sae, k)
    for value in sae.parameters():
        value.copy_(torch.randn(value.shape, generator=generator))
    return sae


def l0_and_fvu(sae, x):
    """Of the activations `x` `[n, d_in]`, in float64."""
    recon = sae(x).double()
    spread = (x.double() - x.double().mean(0)).square().sum()
    return float((sae.encode(x) > 0).sum(1).double().mean()), float((recon - x).square().sum() / spread)


def exact_threshold(sae, x, k):
    """By sorting everything."""
    acts = sae.pre_acts(x).flatten().sort(descending=True).values
    return float(acts[k * len(x) - 1 : k * len(x) + 1].mean())


@pytest.mark.parametrize("arch", ["batchtopk", "matryoshka"])
@pytest.mark.parametrize(("k", "steps", "batch_size"), [(16, 234, 64), (10, 156, 96), (3, 100, 64)])
def test_a_short_run_is_saved_with_the_threshold_that_gives_k(small_cache, tmp_path, arch, k, steps, batch_size):
    config = TrainConfig(
        cache=str(small_cache), arch=arch, layer=1, k=k, batch_size=batch_size, tokens=steps * batch_size, lr=2e-3
    )
    train(config, tmp_path / "sae", Silent())
    sae, _ = load_sae(tmp_path / "sae")
    cache = fastcache.open_cache(small_cache)
    x = torch.from_numpy(cache.residuals(HOOK, 0, cache.n_tokens))
    l0, fvu = l0_and_fvu(sae, x)
    sae.threshold.fill_(exact_threshold(sae, x, k))
    assert l0 == pytest.approx(k, rel=0.02)
    assert fvu == pytest.approx(l0_and_fvu(sae, x)[1], rel=0.02)


def test_the_rows_that_were_trained_on_set_the_threshold(small_cache, tmp_path):
    options = {"tokens_of": "content", "skip_first_position": True, "norm_filter": "1.1x-median"}
    config = TrainConfig(cache=str(small_cache), arch="batchtopk", layer=1, k=8, batch_size=64, tokens=6400, **options)
    train(config, tmp_path / "sae", Silent())
    sae, _ = load_sae(tmp_path / "sae")
    cache = fastcache.open_cache(small_cache)
    selection = select_rows(cache, HOOK, config)
    x = cache.residuals(HOOK, 0, cache.n_tokens)[selection.mask]
    x = torch.from_numpy(x[np.linalg.norm(x, axis=1) <= selection.largest_norm])
    assert 0 < len(x) < selection.n_kept < cache.n_tokens
    assert l0_and_fvu(sae, x)[0] == pytest.approx(8, rel=0.001)


@pytest.mark.parametrize("cls", [BatchTopKSae, MatryoshkaSae])
def test_calibration_equals_sorting_all_activations(cls, monkeypatch):
    monkeypatch.setattr("fastcache.sae.architectures.batchtopk.CALIBRATION_ROWS", 100)
    sae, x = random_batchtopk(cls=cls), torch.randn(1234, 16, generator=torch.Generator().manual_seed(2))
    sae.calibrate(x)
    assert float(sae.threshold) == pytest.approx(exact_threshold(sae, x, 7), rel=1e-6)
    assert int((sae.encode(x) > 0).sum()) == 7 * 1234


def test_rows_of_massive_norm_that_come_last_are_counted(monkeypatch):
    monkeypatch.setattr("fastcache.sae.architectures.batchtopk.CALIBRATION_ROWS", 100)
    sae, x = random_batchtopk(), torch.randn(1000, 16, generator=torch.Generator().manual_seed(2))
    x[-20:] *= 100
    sae.calibrate(x)
    assert int((sae.encode(x) > 0).sum()) == 7 * 1000


def test_where_fewer_are_positive_all_of_them_are_active():
    sae, x = random_batchtopk(), torch.randn(50, 16, generator=torch.Generator().manual_seed(2))
    sae.b_enc.fill_(-12.0)
    sae.calibrate(x)
    assert float(sae.threshold) == 0
    assert 0 < int((sae.encode(x) > 0).sum()) < 7 * 50


def test_calibration_leaves_what_is_learnt_alone():
    for sae in (random_batchtopk(), StandardSae(16, 64)):
        before = {name: value.clone() for name, value in sae.named_parameters()}
        sae.calibrate(torch.randn(50, 16))
        assert all(torch.equal(value, before[name]) for name, value in sae.named_parameters())


def test_a_training_step_leaves_the_threshold_alone():
    sae = random_batchtopk()
    sae.calibrate(torch.randn(50, 16))
    before = float(sae.threshold)
    sae.training_acts(torch.randn(20, 64))
    assert float(sae.threshold) == before


def buffer_of(small_cache, seed=0, selection=None):
    return MixingBuffer(fastcache.open_cache(small_cache), HOOK, 500, 50, seed, selection=selection)


def test_of_a_small_cache_every_row_is_in_the_sample(small_cache):
    cache = fastcache.open_cache(small_cache)
    sample = buffer_of(small_cache).spread_rows
    everything = cache.gather(HOOK, np.arange(cache.n_tokens))
    assert np.array_equal(np.sort(sample.view("V64")[:, 0]), np.sort(everything.view("V64")[:, 0]))


def test_the_sample_does_not_depend_on_where_the_stream_stands(small_cache, monkeypatch):
    monkeypatch.setattr(stream, "SPREAD_ROWS", 300)
    early, late = buffer_of(small_cache), buffer_of(small_cache)
    for _ in range(50):
        late.next_batch()
    assert np.array_equal(early.spread_rows, late.spread_rows)
    assert not np.array_equal(early.spread_rows, buffer_of(small_cache, seed=1).spread_rows)


def test_the_sample_takes_equally_many_rows_of_each_unit(small_cache, monkeypatch):
    cache = fastcache.open_cache(small_cache)
    n_units = len(cache.units())
    monkeypatch.setattr(stream, "SPREAD_ROWS", 7 * n_units)
    assert len(buffer_of(small_cache).spread_rows) == 7 * n_units
    monkeypatch.setattr(stream, "SPREAD_UNITS", 3)
    monkeypatch.setattr(stream, "SPREAD_ROWS", 33)
    assert len(buffer_of(small_cache).spread_rows) == 33


def test_the_sample_has_only_rows_that_are_trained_on(small_cache):
    cache = fastcache.open_cache(small_cache)
    mask = np.zeros(cache.n_tokens, bool)
    mask[::9] = True
    selection = Selection(cache.n_tokens, mask, {"others": int((~mask).sum())})
    sample = buffer_of(small_cache, selection=selection).spread_rows
    everything = cache.gather(HOOK, np.flatnonzero(mask))
    assert np.array_equal(np.sort(sample.view("V64")[:, 0]), np.sort(everything.view("V64")[:, 0]))
