"""Held-out metrics against brute force and known answers."""

import math

import numpy as np
import pytest
import torch
from conftest import edit_manifest, run_extract

import fastcache
from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import SPLITS, TurnRole, select, turn_roles
from fastcache.errors import InputError, MismatchError
from fastcache.progress import Silent
from fastcache.sae.architectures import StandardSae
from fastcache.sae.bootstrap import interval, resampled
from fastcache.sae.init import initialise
from fastcache.sae.metrics import Metrics
from fastcache.sae.storage import save_sae
from fastcache.stages.evaluate.config import EvaluateConfig
from fastcache.stages.evaluate.run import evaluate


def provenance(cache):
    identity = fastcache.open_cache(cache).manifest.identity
    return {
        "hook_point": "resid_post.1",
        "model": identity["model"],
        "tokenizer": identity["tokenizer"],
        "method": identity["method"],
        "training": {"batch_size": 1},
    }


@pytest.fixture
def saved(tmp_path, small_cache):
    def save(sae, name="sae", **changes):
        save_sae(tmp_path / name, sae, {**provenance(small_cache), **changes})
        return str(tmp_path / name)

    return save


def trained_like(d_in=32, d_sae=64):
    sae = StandardSae(d_in, d_sae)
    initialise(sae, torch.zeros(d_in), torch.Generator().manual_seed(3))
    return sae


def test_metrics_equal_brute_force(saved, held_out_cache):
    sae = trained_like()
    result = evaluate(EvaluateConfig(sae=(saved(sae),), cache=str(held_out_cache)), Silent())[0]
    cache = fastcache.open_cache(held_out_cache)
    instances = [(i.token_types, torch.from_numpy(i.residuals("resid_post.1"))) for i in cache.instances()]
    for split in SPLITS:
        means, errors, actives, rows = [], [], [], []
        for types, x in instances:
            mask = torch.from_numpy(select(types, split))
            if not mask.any():
                continue
            latent_acts = sae.encode(x)[mask]
            squared = (sae(x)[mask] - x[mask]).double() ** 2
            means.append(squared.mean(1).mean())
            errors += squared.sum(1).tolist()
            actives += (latent_acts > 0).sum(1).tolist()
            rows.append(x[mask].double())
        all_rows = torch.cat(rows)
        variance = ((all_rows - all_rows.mean(0)) ** 2).sum()
        found = result["splits"][split]
        assert found["mse"] == pytest.approx(float(torch.stack(means).mean()), rel=1e-6)
        assert found["log2_mse"] == pytest.approx(math.log2(found["mse"]))
        assert found["mse_pooled"] == pytest.approx(np.mean(errors) / 32, rel=1e-6)
        assert found["fvu"] == pytest.approx(sum(errors) / float(variance), rel=1e-6)
        assert found["l0"] == pytest.approx(np.mean(actives))
        assert found["n_tokens"] == len(errors)


def test_turns_of_each_role_and_position_0_are_measured(saved, held_out_cache):
    result = evaluate(EvaluateConfig(sae=(saved(trained_like()),), cache=str(held_out_cache)), Silent())[0]
    types = np.concatenate([instance.token_types for instance in fastcache.open_cache(held_out_cache).instances()])
    for role in ("user", "assistant"):
        assert result["splits"][role]["n_tokens"] == (turn_roles(types) == TurnRole[role.upper()]).sum() > 0
    first = result["splits"]["first"]
    assert first["n_tokens"] == first["n_dialogues"] == result["splits"]["all"]["n_dialogues"]
    assert 0 < first["share_of_squared_error"] < 1
    assert result["splits"]["tool"] == {"n_tokens": 0}


def test_cosine_and_relative_norm_equal_brute_force():
    x, sae = torch.randn(50, 32) + 1, trained_like()
    found, recon = metrics_of(sae, x)["splits"]["all"], sae(x).double()
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(recon, x.double()).mean()), rel=1e-6)
    assert found["relative_norm"] == pytest.approx(float((recon.norm(dim=1) / x.double().norm(dim=1)).mean()), rel=1e-6)


def firing(pattern):
    """Metrics of an SAE whose latents are active where `pattern` `[n, d_sae]` says so; each token is a dialogue."""
    d_sae = pattern.shape[1]
    sae = StandardSae(d_sae, d_sae)
    sae.W_enc.copy_(torch.eye(d_sae))
    metrics = Metrics(("all",), d_sae, d_sae)
    for batch in pattern.float().split(7):
        metrics.update(sae, batch, torch.ones(1, len(batch), dtype=torch.bool), torch.arange(len(batch)))
    return metrics.result()


def test_l0_quantiles_equal_numpys():
    pattern = torch.rand(200, 20, generator=torch.Generator().manual_seed(0)) < 0.3
    l0 = pattern.sum(1).numpy()
    found = firing(pattern)["splits"]["all"]["l0_quantiles"]
    assert found == {f"{q:g}": np.quantile(l0, q, method="inverted_cdf") for q in (0.05, 0.25, 0.5, 0.75, 0.95)}


def test_a_latent_is_dead_in_the_windows_before_it_first_fires(monkeypatch):
    monkeypatch.setattr("fastcache.sae.metrics.WINDOWS", (10, 20))
    pattern = torch.zeros(30, 4, dtype=torch.bool)
    pattern[9, 0] = pattern[10, 1] = pattern[29, 2] = True
    assert firing(pattern)["dead_by_window"] == {"10": 3, "20": 2, "30": 1}


def test_the_density_histogram_counts_every_latent_that_fires():
    pattern = torch.zeros(100, 5, dtype=torch.bool)
    pattern[:1, 0] = pattern[:10, 1] = pattern[:, 2] = pattern[:, 3] = True
    density = firing(pattern)["density"]
    edges, counts = density["log10_edges"], density["counts"]
    assert [(edges[i], count) for i, count in enumerate(counts) if count] == [(-2.0, 1), (-1.0, 1), (-0.25, 2)]


def test_equal_dialogues_leave_no_doubt():
    x = torch.randn(5, 4).repeat(6, 1)
    found = metrics_of(trained_like(4, 8), x)["splits"]["all"]
    assert found["intervals"]["mse"] == pytest.approx([found["mse"]] * 2)
    assert found["intervals"]["l0"] == pytest.approx([found["l0"]] * 2)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        dialogues = rng.gamma(2.0, 1.0, size=(60, 1))
        low, high = interval(resampled(dialogues)[:, 0] / 60)
        covered += low <= 2.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_intervals_do_not_depend_on_how_many_samples_are_held(monkeypatch):
    sums = np.random.default_rng(0).random((30, 3))
    expected = resampled(sums)
    monkeypatch.setattr("fastcache.sae.bootstrap.MOST_WEIGHTS", 100)
    assert np.allclose(resampled(sums), expected)


def metrics_of(sae, x):
    metrics = Metrics(("all",), sae.d_in, sae.d_sae)
    metrics.update(sae, x, torch.ones(1, len(x), dtype=torch.bool), torch.arange(len(x)) // 5)
    return metrics.result()


def test_an_identity_sae_has_no_error():
    sae = StandardSae(4, 8)
    sae.W_enc.copy_(torch.cat([torch.eye(4), -torch.eye(4)], 1))
    sae.W_dec.copy_(sae.W_enc.T)
    result = metrics_of(sae, torch.randn(20, 4))
    assert result["splits"]["all"]["fvu"] < 1e-12
    assert result["splits"]["all"]["l0"] == 4


def test_a_zero_sae_has_the_second_moment_as_error_and_only_dead_latents():
    x = torch.randn(20, 4) + 3
    result = metrics_of(StandardSae(4, 8), x)
    assert result["splits"]["all"]["mse"] == pytest.approx(float((x**2).mean()))
    assert result["splits"]["all"]["fvu"] > 1
    assert result["dead_latents"] == 8


def test_a_mean_sae_explains_nothing():
    x = torch.randn(20, 4) + 3
    sae = StandardSae(4, 8)
    sae.b_dec.copy_(x.mean(0))
    assert metrics_of(sae, x)["splits"]["all"]["fvu"] == pytest.approx(1.0)


def test_many_saes_get_the_same_figures_as_each_alone(saved, held_out_cache):
    folders = tuple(saved(trained_like(d_sae=d_sae), str(d_sae)) for d_sae in (32, 64, 128))
    together = evaluate(EvaluateConfig(sae=folders, cache=str(held_out_cache)), Silent())
    alone = evaluate(EvaluateConfig(sae=folders[1:2], cache=str(held_out_cache)), Silent())
    assert together[1] == alone[0]


def test_training_rows_are_refused_unless_allowed(saved, small_cache):
    folder = saved(trained_like())
    with pytest.raises(InputError, match="--allow-train"):
        evaluate(EvaluateConfig(sae=(folder,), cache=str(small_cache)), Silent())
    assert evaluate(EvaluateConfig(sae=(folder,), cache=str(small_cache), allow_train=True), Silent())


def test_an_unfinished_cache_is_refused(saved, held_out_cache, tmp_path):
    import shutil

    shutil.copytree(held_out_cache, tmp_path / "cache")
    edit_manifest(tmp_path / "cache", state="writing")
    with pytest.raises(InputError, match="not complete"):
        evaluate(EvaluateConfig(sae=(saved(trained_like()),), cache=str(tmp_path / "cache")), Silent())


def test_an_sae_of_another_layer_is_refused(saved, held_out_cache):
    folder = saved(trained_like(), hook_point="resid_post.0")
    with pytest.raises(MismatchError, match=r"resid_post\.0"):
        evaluate(EvaluateConfig(sae=(folder,), cache=str(held_out_cache)), Silent())


def test_an_sae_of_another_model_is_refused(saved, held_out_cache):
    folder = saved(trained_like(), model={"name": "other"})
    with pytest.raises(MismatchError, match="name"):
        evaluate(EvaluateConfig(sae=(folder,), cache=str(held_out_cache)), Silent())


def test_an_sae_of_another_width_is_refused(saved, held_out_cache):
    with pytest.raises(MismatchError, match="d_in 16"):
        evaluate(EvaluateConfig(sae=(saved(trained_like(d_in=16)),), cache=str(held_out_cache)), Silent())


def test_blocks_are_refused(saved, tiny_qwen, chat_corpus, tmp_path):
    run_extract(tiny_qwen, chat_corpus, tmp_path / "blocks", method="bt-f", block_size=64, split="eval")
    with pytest.raises(InputError, match="blocks"):
        evaluate(EvaluateConfig(sae=(saved(trained_like()),), cache=str(tmp_path / "blocks")), Silent())


def test_24_saes_are_measured_in_one_reading_of_the_cache(saved, held_out_cache, monkeypatch):
    read, residuals = [], Cache.residuals

    def counting(self, hook_point, start, stop):
        read.append((hook_point, start, stop))
        return residuals(self, hook_point, start, stop)

    monkeypatch.setattr(Cache, "residuals", counting)
    hooks = ("resid_post.1", "resid_post.3")
    folders = tuple(saved(trained_like(), f"sae-{n}", hook_point=hooks[n % 2]) for n in range(24))
    evaluate(EvaluateConfig(sae=folders, cache=str(held_out_cache)), Silent())
    n_rows = fastcache.open_cache(held_out_cache).n_tokens
    for hook in hooks:
        ranges = sorted((start, stop) for at, start, stop in read if at == hook)
        assert [0, *(stop for _, stop in ranges)] == [*(start for start, _ in ranges), n_rows]
