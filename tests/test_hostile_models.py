"""Model folders that are damaged or made to do harm: each is one paragraph, before anything of their sizes is allocated."""

import json
import os
import pickle
import re
import shutil
import struct

import pytest

from fastcache.assets import DEMO
from fastcache.pipeline.cli import main


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(DEMO, tmp_path / "model", ignore=shutil.ignore_patterns("*.gz", "README.md"))


@pytest.fixture
def refused(model, chat_corpus, tmp_path, capsys):
    """Extract with the model; returns the error, which is one paragraph."""

    def extract():
        arguments = [
            "extract",
            "--model",
            model,
            "--layer",
            1,
            "--corpus",
            chat_corpus,
            "--tokens",
            2000,
            "--parity",
            1,
        ]
        texts = [str(argument) for argument in [*arguments, "--out", tmp_path / "cache"]]
        with pytest.raises(SystemExit) as caught:
            main(texts)
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert error.startswith("Error: ")
        assert len(error) < 1500
        assert not (tmp_path / "cache/parts.jsonl").exists()
        return " ".join(error.split())

    return extract


def change_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": -3}, "can't be loaded: .*-3"),
        ({"num_hidden_layers": -3, "layer_types": None}, "can't be loaded: .*-3|num_hidden_layers is -3"),
        ({"num_hidden_layers": 0, "layer_types": []}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 4}, "layer_types"),
        ({"num_hidden_layers": 10**6, "layer_types": None}, "num_hidden_layers is 1000000"),
        ({"num_hidden_layers": "6"}, "expected int, got str"),
        ({"num_hidden_layers": None}, "expected int, got NoneType"),
        ({"hidden_size": "x"}, "expected int, got str"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000"),
        ({"hidden_size": 80}, "can't be loaded|has shape"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": -1}, "num_attention_heads is -1"),
        ({"num_attention_heads": 10**9}, "num_attention_heads is 1000000000"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"head_dim": 10**9}, "head_dim is 1000000000"),
        ({"vocab_size": 10}, "gives the token [0-9]+, but its configuration has embeddings for 10 tokens"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ({"intermediate_size": 10**12}, "more memory"),
        ({"dtype": "evil"}, "no attribute 'evil'"),
        ({"dtype": "os"}, "can't be loaded"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"max_position_embeddings": -5}, "max_position_embeddings is -5"),
        ({"max_position_embeddings": 1.5}, "can't be loaded"),
        ({"layer_types": ["evil"] * 6}, "layer_types"),
        ({"rope_parameters": "x"}, "can't be loaded"),
        ({"hidden_act": "evil"}, "evil"),
        ({"model_type": "evil"}, "evil"),
        ({"model_type": ["qwen2"]}, "can't be loaded"),
        ({"quantization_config": "x"}, "can't be loaded"),
        ({"eos_token_id": "x" * 10**5}, "can't be loaded"),
    ],
)
def test_configurations_that_no_model_has_are_refused(changes, message, model, refused):
    change_json(model / "config.json", **changes)
    assert re.search(message, refused())


BROKEN_JSON = {
    "empty": b"", "list": b"[]", "null": b"null", "torn": b"{", "binary": b"\xff\xfe\0", "deep": b"[" * 100_000,
    "deep value": b'{"model": ' + b"[" * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("data", BROKEN_JSON.values(), ids=BROKEN_JSON)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_not_the_json_they_should_be_are_refused(name, data, model, refused):
    (model / name).write_bytes(data)
    assert "can't be loaded" in refused()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "dangling link"])
def test_what_is_no_file_is_not_waited_for(name, kind, model, refused):
    (model / name).unlink()
    if kind == "pipe":
        os.mkfifo(model / name)
    elif kind == "folder":
        (model / name).mkdir()
    else:
        (model / name).symlink_to(model / "nothing")
    assert name in refused()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_a_file_of_a_gigabyte_is_not_read(name, model, refused):
    os.truncate(model / name, 2**30)  # sparse: takes no space
    assert f"{name} has 1,073,741,824 bytes" in refused()


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": 7},
        {"added_tokens_decoder": {"x": {"content": 5}}},
        {"eos_token": {"x": 1}},
        {"extra_special_tokens": 5},
    ],
)
def test_tokenizer_settings_of_wrong_types_are_refused(changes, model, refused):
    change_json(model / "tokenizer_config.json", **changes)
    assert "The tokenizer of model" in refused()


def test_a_tokenizer_without_its_vocabulary_is_refused(model, refused):
    """transformers makes up an empty one, of which every token is unknown."""
    (model / "tokenizer.json").unlink()
    assert "has no vocabulary" in refused()


def with_huge_ids(raw):
    raw["model"]["vocab"] = {text: number + 10**9 for text, number in raw["model"]["vocab"].items()}


def without_tokens(raw):
    raw["model"]["vocab"] = {}


def with_a_bad_regex(raw):
    raw["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(((("}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_huge_ids, "no model has so many"),
        (without_tokens, "can't be loaded|has no vocabulary"),
        (with_a_bad_regex, "can't be loaded"),
    ],
)
def test_vocabularies_that_make_no_sense_are_refused(change, message, model, refused):
    raw = json.loads((model / "tokenizer.json").read_text())
    change(raw)
    (model / "tokenizer.json").write_text(json.dumps(raw))
    assert re.search(message, refused())


@pytest.mark.parametrize("size", [0, 7, 1000, -100])
def test_torn_weights_are_refused(size, model, refused):
    path = model / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    assert "The weights of model" in refused()


def test_a_header_that_claims_an_exabyte_is_refused(model, refused):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "The weights of model" in refused()


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{}",
        json.dumps({"weight_map": {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}}),
        json.dumps({"weight_map": {"model.embed_tokens.weight": "../../../../etc/passwd"}}),
        "{",
    ],
)
def test_missing_shards_are_refused(index, model, refused):
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text(index)
    assert "The weights of model" in refused()


class Harmful:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["torch", "pickle", "junk"])
def test_a_pickle_is_not_run_and_no_one_is_told_to_run_it(kind, model, refused, tmp_path):
    import torch

    (model / "model.safetensors").unlink()
    if kind == "torch":
        torch.save({"a": Harmful(tmp_path / "harm")}, model / "pytorch_model.bin")
    else:
        data = pickle.dumps(Harmful(tmp_path / "harm")) if kind == "pickle" else b"junk" * 100
        (model / "pytorch_model.bin").write_bytes(data)
    error = refused()
    assert "The weights of model" in error
    assert "weights_only" not in error
    assert not (tmp_path / "harm").exists()


def test_an_error_in_our_own_code_stays_one(model, chat_corpus, tmp_path, monkeypatch):
    """Only what libraries raise becomes an error of the user's."""

    def broken(*_given):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("fastcache.stages.extract.job.model_identity", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        main(
            [
                "extract",
                "--model",
                str(model),
                "--layer",
                "1",
                "--corpus",
                str(chat_corpus),
                "--out",
                str(tmp_path / "c"),
            ]
        )
