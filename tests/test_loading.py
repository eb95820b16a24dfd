"""Models are loaded by their own class and cut; what a checkpoint lacks is named; the reference shares nothing with that."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import N_LAYERS, change_weights, make_checkpoint, make_sequences, plain_residuals

from fastcache.errors import MismatchError, ModelError
from fastcache.files import fingerprint
from fastcache.llm import loading, reference
from fastcache.llm.decoder import unknown_weights
from fastcache.llm.loading import (
    ModelSource,
    load_config,
    load_decoder,
    load_language_model,
    model_identity,
)
from fastcache.llm.parity import check_parity
from fastcache.llm.reference import Reference
from fastcache.llm.sizes import count_by_layer, count_parameters
from fastcache.llm.splicing import SplicedModel
from fastcache.llm.transformers_backend import TransformersBackend
from fastcache.stages.extract import memory

KINDS = ("gemma3", "llava", "gemma4_text", "gemma3n_text", "nemotron_h", "rwkv")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Makes a checkpoint of a kind; that of a kind is made once."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = make_checkpoint(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [(0, 1), (N_LAYERS - 1,)])
def test_a_cut_model_gives_the_bits_of_the_whole(kind, layers, checkpoint):
    folder, sequences = checkpoint(kind), make_sequences()
    hooks = [f"resid_post.{layer}" for layer in layers]
    backend = TransformersBackend(ModelSource(str(folder)), hooks, "float32", "cpu")
    plain = plain_residuals(folder, layers, sequences)
    for found, expected in zip(backend.residuals(sequences), plain, strict=True):
        for hook, values in zip(hooks, expected, strict=True):
            assert np.array_equal(found[hook], values)


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("kind", ["gemma3", "gemma4_text", "qwen3_moe"])
def test_the_reference_is_the_plain_model_also_layer_by_layer(kind, by_layer, checkpoint):
    folder, sequences = checkpoint(kind), make_sequences((5, 40, 1))
    found = Reference(ModelSource(str(folder)), ["resid_post.0", "resid_post.2"], by_layer).residuals(sequences)
    for residuals, expected in zip(found, plain_residuals(folder, (0, 2), sequences), strict=True):
        assert np.array_equal(residuals["resid_post.0"], expected[0])
        assert np.array_equal(residuals["resid_post.2"], expected[1])


def test_the_reference_does_not_use_the_loader(checkpoint, monkeypatch):
    def poisoned(*_given, **_keywords):
        raise AssertionError("the reference asked the loader")

    for name in ("load_decoder", "cut_class", "checkpoint_class", "load_language_model"):
        monkeypatch.setattr(loading, name, poisoned)
    folder, sequences = checkpoint("gemma3"), make_sequences((9,))
    found = next(iter(Reference(ModelSource(str(folder)), ["resid_post.1"]).residuals(sequences)))
    assert np.array_equal(found["resid_post.1"], plain_residuals(folder, (1,), sequences)[0][0])


def test_a_loader_that_gives_random_weights_fails_the_parity_check(checkpoint, monkeypatch):
    source, honest = ModelSource(str(checkpoint("gemma3"))), loading.load_decoder

    def random_weights(*given):
        decoder = honest(*given)
        torch.manual_seed(5)
        for parameter in decoder.model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.2)
        return decoder

    monkeypatch.setattr("fastcache.llm.transformers_backend.load_decoder", random_weights)
    backend = TransformersBackend(source, ["resid_post.1"], "float32", "cpu")
    expected = Reference(source, ["resid_post.1"]).residuals(make_sequences((9,)))
    with pytest.raises(MismatchError, match="differs from the plain float32 model"):
        check_parity(backend, lambda _ids: next(expected), make_sequences((9,)), "float32")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("qwen3", "model.layers.1.self_attn.q_proj.weight"),
        ("gemma3", "language_model.model.layers.0.mlp.up_proj.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.2.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("load", [load_decoder, load_language_model, Reference])
def test_a_missing_weight_is_named(kind, name, load, tmp_path):
    source = ModelSource(str(make_checkpoint(kind, tmp_path)))
    change_weights(tmp_path, lambda weights: weights.pop(name))
    given = {load_decoder: (2, torch.float32, "cpu"), load_language_model: (torch.float32, "cpu")}
    with pytest.raises(ModelError, match="lacks weights") as caught:
        load(source, *given.get(load, (["resid_post.1"],)))
    assert ".".join(name.split(".")[-4:]) in str(caught.value)


def test_a_weight_of_another_shape_is_named(tmp_path):
    source = ModelSource(str(make_checkpoint("qwen3", tmp_path)))
    name = "model.layers.1.self_attn.q_proj.weight"
    change_weights(tmp_path, lambda weights: weights.update({name: torch.ones(3, 5)}))
    with pytest.raises(ModelError, match=r"q_proj\.weight has shape \(3, 5\).* asks for \(32, 32\)"):
        load_decoder(source, 2, torch.float32, "cpu")


def test_weights_past_the_captured_layer_are_not_needed(tmp_path):
    source = ModelSource(str(make_checkpoint("gemma3", tmp_path)))

    def leave_out(weights):
        for name in [name for name in weights if "vision" in name or "layers.2." in name or "layers.3." in name]:
            del weights[name]

    change_weights(tmp_path, leave_out)
    decoder = load_decoder(source, 2, torch.float32, "cpu")
    assert len(decoder.layers) == 2
    assert not decoder.unknown_weights


def test_weights_that_belong_nowhere_are_told(tmp_path):
    source = ModelSource(str(make_checkpoint("qwen3", tmp_path)))
    strange = {"model.layers.1.self_attn.spice.weight": torch.ones(3)}
    known = {"mtp.fc.weight": torch.ones(1), "model.layers.4.mlp.up_proj.weight": torch.ones(1)}  # further tokens
    change_weights(tmp_path, lambda weights: weights.update({**strange, **known}))
    backend = TransformersBackend(source, ["resid_post.1"], "float32", "cpu")
    assert (
        "holds 1 weights that belong to no part of this model, such as model.layers.1.self_attn.spice" in backend.note
    )


def test_unknown_weights_are_those_of_no_layer_and_no_other_part():
    omitted = {"model.language_model.layers.3.mlp.weight", "model.vision_tower.x"}
    unexpected = {
        "language_model.layers.3.mlp.weight",
        "mlp.weight",
        "visual.patch.weight",
        "h.7.attn.bias",
        "score.weight",
    }
    assert unknown_weights(unexpected, omitted, 4) == ["score.weight"]


def test_other_lists_of_as_many_modules_do_not_matter(checkpoint):
    """Gemma 3n has lists of three projections beside its layers."""
    source = ModelSource(str(checkpoint("gemma3n_text")))
    assert [type(layer).__name__ for layer in load_decoder(source, 3, torch.float32, "cpu").layers] == [
        "Gemma3nTextDecoderLayer"
    ] * 3


def test_several_streams_are_refused_with_the_reason(checkpoint):
    with pytest.raises(ModelError, match="several residual streams"):
        TransformersBackend(ModelSource(str(checkpoint("deepseek_v4"))), ["resid_post.1"], "float32", "cpu")


def test_infinite_numbers_in_a_configuration_do_not_matter(checkpoint):
    folder = checkpoint("nemotron_h")
    source = ModelSource(str(folder))
    config = load_config(source)
    config.time_step_limit = [0.0, float("inf")]
    infinite = model_identity(source, config)["config_sha256"]
    config.time_step_limit = [0.0, 1e30]
    finite = model_identity(source, config)["config_sha256"]
    assert infinite != finite
    settings = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
    assert finite == fingerprint(settings)  # what it was before infinities were known


@pytest.mark.parametrize("kind", ["gemma3", "gemma3n_text"])
def test_a_splice_that_changes_nothing_changes_nothing(kind, checkpoint):
    model = SplicedModel(ModelSource(str(checkpoint(kind))), ["resid_post.1"], torch.float32, "cpu")
    token_ids = make_sequences((12,))[0]
    plain = model.log_probs(token_ids)
    assert torch.equal(model.log_probs(token_ids, ("resid_post.1", lambda rows: rows.clone())), plain)
    assert not torch.allclose(model.log_probs(token_ids, ("resid_post.1", lambda rows: rows * 0.5)), plain)


def test_parameters_are_counted_of_what_is_loaded(checkpoint):
    source = ModelSource(str(checkpoint("gemma3")))
    decoder = load_decoder(source, 2, torch.float32, "cpu")
    assert count_parameters(source, 2) == sum(p.numel() for p in decoder.model.parameters())
    whole = load_language_model(source, torch.float32, "cpu")
    assert count_parameters(source, None) == sum(p.numel() for p in whole.parameters())
    outside, largest = count_by_layer(source)
    assert outside + largest == count_parameters(source, 1)  # all layers have one size here


def test_widths_of_mlps_may_be_a_list(checkpoint):
    config = load_config(ModelSource(str(checkpoint("gemma3n_text"))))
    assert memory.mlp_width(config) == 64
    assert memory.mlp_width(SimpleNamespace(hidden_size=8, intermediate_size=None)) == 32


def test_the_reference_is_read_by_layer_where_the_whole_does_not_fit(tiny_qwen, chat_corpus, tmp_path, monkeypatch):
    from fastcache.progress import Silent
    from fastcache.stages.extract.config import ExtractConfig
    from fastcache.stages.extract.run import extract

    honest, said = memory._needs, []

    def needs(use, sample, by_layer):  # as if everything else needed nothing
        return replace(honest(use, sample, by_layer), total=10 if by_layer else 10**18)

    monkeypatch.setattr(memory, "_needs", needs)
    monkeypatch.setattr(Silent, "say", lambda _self, text: said.append(text))
    asked = []
    monkeypatch.setattr(reference._InStep, "_read_next", spied(reference._InStep._read_next, asked))
    config = ExtractConfig(model=str(tiny_qwen), layer=(1,), parity=2, tokens=500, dtype="float32")
    cache = extract(config, lambda: chat_corpus, tmp_path / "cache", Silent())
    assert len(asked) == 2  # layers 0 and 1, each once for both sequences
    assert any("layer by layer" in text for text in said)
    assert cache.manifest.parity["hook_points"]["resid_post.1"]["max_abs_difference"] == 0.0


def spied(method, calls):
    def call(self):
        calls.append(1)
        return method(self)

    return call


def test_a_failure_in_one_sequence_ends_the_reading_by_layer(checkpoint):
    reading = Reference(ModelSource(str(checkpoint("qwen3"))), ["resid_post.1"], by_layer=True)
    with pytest.raises(IndexError):
        reading.residuals([*make_sequences((5, 9)), np.array([10**6], np.int32)])


def test_configurations_name_their_class_or_have_a_usual_one(tmp_path):
    source = ModelSource(str(make_checkpoint("qwen3", tmp_path)))
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "architectures": ["BertModel"]}))
    assert type(load_decoder(source, 1, torch.float32, "cpu").model).__name__ == "Qwen3Model"
