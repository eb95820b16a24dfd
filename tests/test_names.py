"""Default names are unique, and corpora that commands share are waited for, never taken for another's."""

import shlex
import time
from pathlib import Path

import pytest
from corpora import dialogue, write
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from processes import kill, start, wait_for

from fastcache.config import from_mapping
from fastcache.errors import MismatchError
from fastcache.pipeline.names import model_name, output_name, slug, source_name, study_name
from fastcache.pipeline.places import cache_place, corpus_place, find_corpus
from fastcache.progress import Silent
from fastcache.rundir import output_directory
from fastcache.stages.extract.config import ExtractConfig
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.run import prepare

paths = st.text(st.sampled_from("abAB01-_./ \u00e4\u65e5"), min_size=1, max_size=8)


class Log(Silent):
    def __init__(self, path):
        self.path = path

    def say(self, text):
        with self.path.open("a") as file:
            file.write(text + "\n")


@settings(deadline=None)
@given(paths, paths)
def test_two_sources_have_two_names(first, second):
    assume(str(Path(first)) != str(Path(second)) and first.lower() != second.lower())
    assert source_name(first) != source_name(second)
    assert source_name(first, second) not in (source_name(second, first), source_name(f"{first}-{second}"))
    for name in (source_name(first), source_name(first, second)):
        assert "/" not in name
        assert name.strip(".")


@settings(deadline=None)
@given(paths)
def test_a_slug_is_a_part_of_a_file_name_that_stays_as_it_is(text):
    assert slug(slug(text)) == slug(text)
    assert not set(slug(text)) & set("/ _")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("demo", "demo"), ("tulu-3", "tulu-3"), ("chats.jsonl", "chats.jsonl"), ("a-b.jsonl", "a-b.jsonl"),
        ("allenai/tulu-3-sft-mixture", "allenai--tulu-3-sft-mixture"),
        ("\u0434\u0438\u0430\u043b\u043e\u0433\u0438.jsonl",) * 2,
        ("\U0001f600.jsonl", "\U0001f600.jsonl"),
    ],
)  # fmt: skip
def test_names_say_what_they_are_of(source, name):
    assert source_name(source) == name


def test_models_of_one_basename_have_caches_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a/m", "b/m"):
        (tmp_path / folder).mkdir(parents=True)
    models = ["org1/m", "org2/m", "a/m", "b/m", str(tmp_path / "a/m"), "m", "org1/M_x", "org1/m-x"]
    assert len({model_name(model) for model in models}) == len(models)
    values = [
        {"model": "demo", "layer": layers, "split": split}
        for layers in ((1,), (2,), (1, 2), (12,))
        for split in ("train", "eval")
    ]
    assert len({cache_place(from_mapping(ExtractConfig, each, "x")) for each in values}) == len(values)
    corpora = [None, "a/b.jsonl", "a-b.jsonl", "org/set", "demo-text", "tulu-3"]
    configs = [
        from_mapping(ExtractConfig, {"model": "demo", "layer": (1,), "corpus": corpus}, "x") for corpus in corpora
    ]
    assert len({cache_place(config) for config in configs}) == len(corpora)
    usual = from_mapping(ExtractConfig, {"model": "demo", "layer": (1,), "corpus": "demo"}, "x")
    assert cache_place(usual) == cache_place(configs[0])
    config = from_mapping(ExtractConfig, {"model": "Qwen/Qwen2.5-7B-Instruct", "layer": (18,)}, "x")
    assert cache_place(config).name == "cache-qwen2.5-7b-instruct-fast-train-layer-18"


def test_outputs_of_one_basename_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = ["cache-x", "demo/sae-fast/jumprelu", "demo/sae-bt-f/jumprelu", "demo--sae-fast/jumprelu"]
    places = [f"fastcache-runs/{name}" for name in inside] + [
        "my-sae",
        "My-SAE",
        "cache-x",
        "/elsewhere/my-sae",
        "s3://b/my-sae",
        "s3://c/my-sae",
    ]
    assert len({output_name(place) for place in places}) == len(places)
    assert output_name("my-sae") == output_name(str(tmp_path / "my-sae")) == "my-sae"
    assert output_name("fastcache-runs/cache-x") == "cache-x"
    assert study_name(Path("a/x.yaml")) != study_name(Path("b/x.yaml")) != study_name(Path("x.yaml")) == "x"


def test_a_corpus_of_another_source_is_never_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    for name in ("a/b.jsonl", "a-b.jsonl"):
        write(tmp_path / name, [dialogue(f"{name} {i}", "x") for i in range(30)])
    configs = [
        from_mapping(ExtractConfig, {"model": "demo", "layer": (1,), "corpus": name}, "x")
        for name in ("a/b.jsonl", "a-b.jsonl")
    ]
    first, second = (find_corpus(config, Silent()) for config in configs)
    assert first != second
    assert [find_corpus(config, Silent()) for config in configs] == [first, second]
    # Whatever stands there, no message says how to remove it.
    (tmp_path / second).rename(tmp_path / "kept")
    (tmp_path / first).rename(tmp_path / second)
    with pytest.raises(MismatchError, match=r"holds the corpus of a/b\.jsonl, not of a-b\.jsonl") as raised:
        find_corpus(configs[1], Silent())
    assert "--fresh" not in str(raised.value)
    with pytest.raises(MismatchError, match=r"source: .*choose another --out") as raised:
        prepare(PrepareConfig(source=("a-b.jsonl",)), tmp_path / second, Silent())
    assert "--fresh" not in str(raised.value)


def test_a_source_that_has_changed_is_prepared_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "it's.jsonl", [dialogue(f"{i}", "x") for i in range(30)])
    config = from_mapping(ExtractConfig, {"model": "demo", "layer": (1,), "corpus": "it's.jsonl"}, "x")
    find_corpus(config, Silent())
    write(tmp_path / "it's.jsonl", [dialogue(f"{i}", "y") for i in range(31)])
    with pytest.raises(MismatchError, match="has changed") as raised:
        find_corpus(config, Silent())
    assert "--fresh" not in str(raised.value)
    assert shlex.quote("it's.jsonl") in str(raised.value)


def hold(folder, seconds):
    with output_directory(folder, "prepare", {}, ()):
        (folder / "held").touch()
        time.sleep(seconds)


def find(folder, result):
    import os

    os.chdir(folder)
    config = from_mapping(ExtractConfig, {"model": "demo", "layer": (1,), "corpus": "rows.jsonl"}, "x")
    log = Log(result)
    log.say(f"found {find_corpus(config, log)}")


def test_processes_that_need_the_same_corpus_wait_for_the_one_that_prepares_it(tmp_path):
    write(tmp_path / "rows.jsonl", [dialogue(f"{i}", "x") for i in range(3000)])
    results = [tmp_path / f"result-{i}" for i in range(3)]
    processes = [start(find, tmp_path, result) for result in results]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    texts = [result.read_text() for result in results]
    assert all("found fastcache-runs/corpus-rows.jsonl" in text for text in texts)
    assert sum("Report: " in text for text in texts) == 1, "prepared once"
    assert sum("prepared before" in text for text in texts) == 2


def test_who_waits_goes_on_by_itself_when_the_other_is_killed(tmp_path):
    write(tmp_path / "rows.jsonl", [dialogue(f"{i}", "x") for i in range(30)])
    place = tmp_path / corpus_place("rows.jsonl")
    holder = start(hold, place, 600)
    wait_for((place / "held").exists, holder)
    (place / "run.json").unlink()  # as if it had been killed before it wrote this
    (place / "held").unlink()
    waiting = start(find, tmp_path, tmp_path / "result")
    result = tmp_path / "result"
    wait_for(lambda: result.exists() and "waiting for it" in result.read_text(), waiting)
    assert waiting.is_alive()
    kill(holder)
    waiting.join(120)
    assert waiting.exitcode == 0
    assert (place / "corpus.json").exists()
