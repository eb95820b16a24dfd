"""Models and corpora go by names that mean something elsewhere, not by paths and hashes of this machine."""

import json

import pytest

import fastcache
from fastcache.origins import corpus_sources, model_title
from fastcache.pipeline.cli import main


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("demo", "demo"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("/data/models/gemma-3-270m", "gemma-3-270m"),
        ("./gemma-3-270m/", "gemma-3-270m"),
        ("/home/a/.cache/huggingface/hub/models--google--gemma-3-270m/snapshots/9b0c", "google/gemma-3-270m"),
    ],
)
def test_a_model_in_a_folder_is_called_by_its_name(name, title):
    assert model_title(name) == title


@pytest.mark.parametrize(
    ("known", "title"), [("google/gemma-3-270m", "google/gemma-3-270m"), ("/tmp/x", "m"), (7, "m")]
)
def test_the_configuration_knows_the_name_on_the_hub(tmp_path, known, title):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps({"_name_or_path": known}))
    assert model_title(str(tmp_path / "m")) == title


def test_an_export_names_model_and_data(small_cache, tiny_qwen, chat_file, tmp_path, capsys):
    main(["train", "--cache", str(small_cache), "--layer", "1", "--arch", "topk", "--k", "4", "--tokens", "1280",
          "--batch-size", "64", "--out", str(tmp_path / "sae")])  # fmt: skip
    main(["export", "--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "out")])
    metadata = json.loads((tmp_path / "out/cfg.json").read_text())["metadata"]
    assert (metadata["model_name"], metadata["dataset_path"]) == (tiny_qwen.name, chat_file.name)
    capsys.readouterr()
    main(["inspect", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "Unfinished" not in printed
    assert f"data          {chat_file.name}" in printed
    main(["inspect", str(small_cache)])
    assert f"{chat_file.name} (" in capsys.readouterr().out


def test_another_corpus_is_not_taken_for_that_of_a_cache(small_cache):
    identity = fastcache.open_cache(small_cache).manifest.identity
    assert corpus_sources(small_cache, identity["corpus"]["fingerprint"])
    assert corpus_sources(small_cache, "0" * 64) == []
    assert corpus_sources("s3://bucket/cache", identity["corpus"]["fingerprint"]) == []
