"""Held-out metrics against brute force and known answers."""

import math

import numpy as np
import pytest
import torch
from conftest import edit_manifest, run_extract

import fastcache
from fastcache.cache_format.schema import SPLITS, select
from fastcache.errors import InputError, MismatchError
from fastcache.progress import Silent
from fastcache.sae.architectures import StandardSae
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
