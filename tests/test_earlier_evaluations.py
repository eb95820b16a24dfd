"""Earlier results of evaluate and `steer find` stay while they are valid; those that are dropped are reported."""

import json
import shutil

import pytest
import torch
from conftest import edit_manifest
from test_metrics import provenance, trained_like

import fastcache
from fastcache.progress import Silent
from fastcache.sae.storage import save_sae
from fastcache.stages.evaluate.config import EvaluateConfig
from fastcache.stages.evaluate.run import evaluate
from fastcache.stages.report.config import ReportConfig
from fastcache.stages.report.run import report_table
from fastcache.stages.steer.config import FindConfig
from fastcache.stages.steer.find import find


class Said(Silent):
    """Keeps what was said."""

    def __init__(self):
        self.text = ""

    def say(self, text):
        self.text += text + "\n"


@pytest.fixture
def sae(tmp_path, small_cache):
    save_sae(tmp_path / "sae", trained_like(), {**provenance(small_cache), "training": {"arch": "standard"}})
    return tmp_path / "sae"


def measure(sae, cache, **settings):
    """What stands in evaluation.json, which evaluate returns too, and what it said."""
    said = Said()
    (result,) = evaluate(EvaluateConfig(sae=(str(sae),), cache=str(cache), **settings), said)
    written = json.loads((sae / "evaluation.json").read_text())
    assert json.loads(json.dumps(result)) == written
    return written, said.text


def with_the_model(sae, cache, n=3, **settings):
    return measure(sae, cache, with_model=True, model_instances=n, **settings)[0]


def earlier(sae):
    return [json.loads(path.read_text()) for path in sorted(sae.glob("evaluation-*.json"))]


def test_figures_with_the_model_outlive_an_evaluation_without_it(sae, held_out_cache):
    first = with_the_model(sae, held_out_cache)
    again, said = measure(sae, held_out_cache)
    assert again == first
    assert "the figures with the model, of 3 dialogues, are kept" in said
    table = report_table(ReportConfig(sae=(str(sae),), format="markdown"))
    assert "LM loss recovered" in table
    assert str(first["with_model"]["splits"]["all"]["loss_recovered"])[:4] in table
    assert not earlier(sae)


def test_other_weights_drop_them_and_say_so(sae, small_cache, held_out_cache):
    with_the_model(sae, held_out_cache)
    other = trained_like()
    other.b_dec.add_(0.1)
    save_sae(sae, other, provenance(small_cache))  # the same sae.json
    result, said = measure(sae, held_out_cache)
    assert "with_model" not in result
    assert "is of other weights, with the figures with the model that it had (--with-model measures them again)" in said
    assert not earlier(sae)


def test_an_evaluation_that_names_no_weights_is_replaced_with_a_word(sae, held_out_cache):
    result = with_the_model(sae, held_out_cache)
    del result["sae_fingerprint"]
    (sae / "evaluation.json").write_text(json.dumps(result))
    result, said = measure(sae, held_out_cache)
    assert "with_model" not in result
    assert "doesn't say which weights it is of" in said


def other_cache(held_out_cache, folder):
    """The same rows under another identity."""
    shutil.copytree(held_out_cache, folder)
    identity = fastcache.open_cache(held_out_cache).manifest.identity
    edit_manifest(folder, identity={**identity, "tokens": 12345})
    return folder


def test_an_evaluation_on_another_cache_is_kept_beside(sae, held_out_cache, tmp_path):
    first = with_the_model(sae, held_out_cache)
    other, said = measure(sae, other_cache(held_out_cache, tmp_path / "other"))
    assert "with_model" not in other
    assert earlier(sae) == [first]
    assert (
        f"The earlier evaluation, on {first['held_out']['dialogues']} dialogues of {held_out_cache}, with the model"
        in said
    )
    back, _ = measure(sae, held_out_cache)
    assert back == first  # its figures with the model are there again
    assert {each["held_out"]["fingerprint"] for each in earlier(sae)} == {
        first["held_out"]["fingerprint"],
        other["held_out"]["fingerprint"],
    }
    for _ in range(2):  # going back and forth doesn't add files
        measure(sae, tmp_path / "other")
        measure(sae, held_out_cache)
    assert len(earlier(sae)) == 2


def test_an_evaluation_of_more_dialogues_is_kept_beside_one_of_fewer(sae, held_out_cache):
    first = with_the_model(sae, held_out_cache, 4)
    fewer, _ = measure(sae, held_out_cache, max_instances=2)
    assert earlier(sae) == [first]
    assert fewer["with_model"] == first["with_model"]
    with_the_model(sae, held_out_cache, 2, max_instances=2)
    assert [each["with_model"]["dialogues"] for each in earlier(sae)] == [4, 4]
    assert measure(sae, held_out_cache)[0] == first  # the most dialogues are taken over


def test_a_layer_that_the_cache_gets_changes_nothing(sae, held_out_cache, tmp_path):
    first = with_the_model(sae, held_out_cache)
    shutil.copytree(held_out_cache, tmp_path / "fewer")
    identity = fastcache.open_cache(held_out_cache).manifest.identity
    edit_manifest(tmp_path / "fewer", identity={**identity, "hook_points": ["resid_post.1"]})
    again, _ = measure(sae, tmp_path / "fewer")
    assert again["with_model"] == first["with_model"]
    assert again["held_out"]["fingerprint"] == first["held_out"]["fingerprint"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"held_out": 3, "sae_fingerprint": 1}'])
def test_a_damaged_evaluation_does_not_stop_a_new_one(sae, held_out_cache, content):
    (sae / "evaluation.json").write_text(content)
    assert measure(sae, held_out_cache)[0]["splits"]["all"]["n_tokens"] > 0


def test_a_table_of_special_tokens_is_kept_beside_another(sae, held_out_cache):
    out, said = sae / "special_tokens.csv", Said()
    find(FindConfig(sae=str(sae), cache=str(held_out_cache), max_instances=3), out, said)
    first = out.read_text()
    find(FindConfig(sae=str(sae), cache=str(held_out_cache), max_instances=3), out, said)
    assert not said.text
    find(FindConfig(sae=str(sae), cache=str(held_out_cache), max_instances=2, top=1), out, said)
    (kept,) = sae.glob("special_tokens-*.csv")
    assert kept.read_text() == first != out.read_text()
    assert f"kept in {kept}" in said.text


def test_fresh_training_removes_what_was_measured_on_the_sae_before(small_cache, held_out_cache, tmp_path):
    from fastcache.stages.train.config import TrainConfig
    from fastcache.stages.train.run import train

    config = TrainConfig(cache=str(small_cache), arch="topk", layer=1, tokens=2560)
    train(config, tmp_path / "sae", Silent())
    for n in (2, 3):
        measure(tmp_path / "sae", held_out_cache, max_instances=n)
    torch.manual_seed(0)
    train(config, tmp_path / "sae", Silent(), fresh=True)
    assert not list((tmp_path / "sae").glob("evaluation*"))
