"""Commands that are run from another directory, or on folders that were moved together, find what they were made from."""

import shutil
from pathlib import Path

import pytest
from conftest import run_extract
from test_cli import fails

from fastcache.errors import InputError, ModelError
from fastcache.llm.loading import place_of
from fastcache.pipeline.cli import main
from fastcache.progress import Silent
from fastcache.rundir import new_run, stored_path
from fastcache.stages.extract.repair import repair


@pytest.fixture
def project(tiny_qwen, chat_corpus, tmp_path, monkeypatch):
    """A cache whose model and corpus were named by relative paths; the current directory is another one."""
    folder = tmp_path / "project"
    shutil.copytree(tiny_qwen, folder / "models/tiny")
    shutil.copytree(chat_corpus, folder / "runs/corpus")
    monkeypatch.chdir(folder)
    run_extract(Path("models/tiny"), Path("runs/corpus"), Path("runs/cache"), parity=0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def damage(cache):
    shard = next(cache.glob("parts/00000000/resid_post.1/c/*/*"))
    data = shard.read_bytes()
    shard.write_bytes(bytes([data[0] ^ 1]) + data[1:])


def test_repair_finds_model_and_corpus_from_another_directory(project):
    damage(project / "runs/cache")
    assert repair(project / "runs/cache", Silent()) == [0]


def test_repair_finds_what_was_moved_together(project, tmp_path):
    moved = tmp_path / "moved"
    project.rename(moved)
    damage(moved / "runs/cache")
    assert repair(moved / "runs/cache", Silent()) == [0]


def test_repair_says_what_to_pass(project, tmp_path):
    damage(project / "runs/cache")
    (project / "runs/corpus").rename(tmp_path / "corpus")
    with pytest.raises(InputError, match="Say where it is with --corpus DIR"):
        repair(project / "runs/cache", Silent())
    (project / "models").rename(tmp_path / "models")
    with pytest.raises(ModelError, match="with --model DIR"):
        repair(project / "runs/cache", Silent(), str(tmp_path / "corpus"))
    made = repair(project / "runs/cache", Silent(), str(tmp_path / "corpus"), model=str(tmp_path / "models/tiny"))
    assert made == [0]


def test_a_layer_is_added_from_another_directory(project, capsys):
    main(["extract", "--add-layer", "2", "--cache", str(project / "runs/cache"), "--parity", "0"])
    assert "resid_post.2" in capsys.readouterr().out


def test_a_steered_model_is_found_from_another_directory(project, capsys, monkeypatch):
    cache, sae = project / "runs/cache", project / "runs/sae"
    monkeypatch.chdir(project)
    main(["train", "--cache", str(cache), "--arch", "standard", "--tokens", "640", "--out", str(sae)])
    monkeypatch.chdir(project / "..")
    steer = [
        "steer",
        "--sae",
        sae,
        "--latent",
        1,
        "--alpha",
        1,
        "--prompt",
        "the cat",
        "--max-new-tokens",
        2,
        "--out",
        "s",
    ]
    main([str(argument) for argument in steer])
    assert "the cat" in capsys.readouterr().out
    (project / "models").rename(project / "models-away")
    assert "--model" in fails(capsys, *steer, "--fresh")


def test_a_cache_of_an_earlier_version_is_looked_up_as_it_stands(tmp_path):
    assert stored_path({"settings": {}}, "corpus", tmp_path) == Path("corpus")
    assert stored_path({"started_in": 7, "output": []}, "corpus", tmp_path) == Path("corpus")
    assert place_of("demo", tmp_path) is None
    assert place_of("a/b", "s3://bucket/cache") is None
    assert place_of("a/b", tmp_path) is None


def test_run_json_says_where_it_was_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = new_run("extract", {}, Path("out"))
    assert (run["started_in"], run["output"]) == (str(tmp_path), str(tmp_path / "out"))
    assert new_run("extract", {}, "s3://bucket/x")["output"] == "s3://bucket/x"
