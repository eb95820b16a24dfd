"""What SAEs do to the model's loss, against a loop that shares no code, and known answers."""

from functools import cache

import numpy as np
import pytest
import torch
from test_metrics import provenance, trained_like

import fastcache
from fastcache.cache_format.schema import SPLITS, select
from fastcache.errors import MismatchError
from fastcache.progress import Silent
from fastcache.sae.architectures import StandardSae
from fastcache.sae.storage import save_sae
from fastcache.stages.evaluate.config import EvaluateConfig
from fastcache.stages.evaluate.run import evaluate

LAYER, D_IN = 1, 32


@pytest.fixture
def measured(tmp_path, small_cache, held_out_cache):
    """The figures of SAEs with the model."""

    def measure(*saes, **settings):
        folders = []
        for number, sae in enumerate(saes):
            save_sae(tmp_path / str(number), sae, provenance(small_cache))
            folders.append(str(tmp_path / str(number)))
        config = EvaluateConfig(
            sae=tuple(folders), cache=str(held_out_cache), **{"with_model": True, "model_instances": 6, **settings}
        )
        return [result["with_model"] for result in evaluate(config, Silent())]

    return measure


def identity_sae():
    sae = StandardSae(D_IN, 2 * D_IN)
    sae.W_enc.copy_(torch.cat([torch.eye(D_IN), -torch.eye(D_IN)], 1))
    sae.W_dec.copy_(sae.W_enc.T)
    return sae


@cache
def plain_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def losses_by_hand(folder, ids, change):
    """Next-token losses, and log probabilities, with what enters the layer after the hook point changed."""
    model = plain_model(folder)

    def enter(_module, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    with model.model.layers[LAYER + 1].register_forward_pre_hook(enter, with_kwargs=True), torch.no_grad():
        log_probs = model(torch.tensor([ids.tolist()])).logits[0].double().log_softmax(-1)[:-1]
    return -log_probs[torch.arange(len(ids) - 1), torch.tensor(ids[1:].tolist())], log_probs


def test_figures_equal_an_independent_loop(measured, tiny_qwen, held_out_cache):
    sae = trained_like()
    found = measured(sae)[0]
    held_out = fastcache.open_cache(held_out_cache)
    rows = torch.cat([torch.from_numpy(one.residuals("resid_post.1")) for one in held_out.instances()])
    ways = {
        "loss": lambda x: x,
        "loss_zero": torch.zeros_like,
        "loss_mean": lambda x: rows.mean(0).expand_as(x),
        "loss_spliced": lambda x: sae(x[0])[None],
    }
    instances = [held_out.instance(index) for index in range(6)]
    for split in SPLITS:
        expected = {}
        for name, change in ways.items():
            by_dialogue = []
            for one in instances:
                losses, _ = losses_by_hand(tiny_qwen, one.token_ids, change)
                by_dialogue.append(losses[torch.from_numpy(select(one.token_types, split)[:-1])])
            expected[name] = float(torch.cat(by_dialogue).mean())
            assert found["splits"][split][name] == pytest.approx(expected[name], abs=1e-5), (split, name)
        recovered = (expected["loss_zero"] - expected["loss_spliced"]) / (expected["loss_zero"] - expected["loss"])
        assert found["splits"][split]["loss_recovered"] == pytest.approx(recovered, abs=1e-3)


def test_kl_equals_an_independent_loop(measured, tiny_qwen, held_out_cache):
    sae = trained_like()
    found = measured(sae, model_instances=2)[0]["splits"]["all"]["kl"]
    sums = []
    for index in range(2):
        ids = fastcache.open_cache(held_out_cache).instance(index).token_ids
        clean, spliced = (losses_by_hand(tiny_qwen, ids, way)[1] for way in (lambda x: x, lambda x: sae(x[0])[None]))
        sums.append((clean.exp() * (clean - spliced)).sum(1))
    assert found == pytest.approx(float(torch.cat(sums).mean()), abs=1e-5)


def test_an_identity_sae_recovers_all_a_zero_and_a_mean_sae_nothing(measured, held_out_cache):
    held_out = fastcache.open_cache(held_out_cache)
    mean = StandardSae(D_IN, 8)
    mean.b_dec.copy_(
        torch.from_numpy(np.concatenate([one.residuals("resid_post.1") for one in held_out.instances()]).mean(0))
    )
    whole, nothing, of_mean = (
        result["splits"]["all"] for result in measured(identity_sae(), StandardSae(D_IN, 8), mean)
    )
    assert whole["delta_loss"] == pytest.approx(0, abs=1e-6)
    assert whole["kl"] == pytest.approx(0, abs=1e-6)
    assert whole["loss_recovered"] == pytest.approx(1, abs=1e-5)
    assert nothing["loss_recovered"] == pytest.approx(0, abs=1e-6)
    assert of_mean["loss_recovered_from_mean"] == pytest.approx(0, abs=1e-4)


def test_many_saes_get_the_same_figures_as_each_alone(measured):
    together, alone = measured(identity_sae(), trained_like()), measured(trained_like())
    assert together[1] == alone[0]


def test_another_model_is_refused(measured):
    with pytest.raises(MismatchError, match="another model than 'demo'"):
        measured(trained_like(), model="demo")
