"""Layers added to a cache: what one run with all layers would have made, whatever happens on the way."""

import json
import random
import shutil
import time
from concurrent.futures import Future

import numpy as np
import pytest
from conftest import edit_manifest, run_extract, tree_bytes
from processes import kill, start_command, wait_for
from safetensors.numpy import load_file, save_file

import fastcache
from fastcache.cache_format.storage import LocalStorage
from fastcache.cache_format.verify import verify
from fastcache.errors import InputError, MismatchError, NonFiniteError
from fastcache.progress import Silent
from fastcache.stages.extract.add_layer import add_layers
from fastcache.stages.extract.config import AddLayerConfig

UNIT = 1500


def add(cache, *layers, **given):
    return add_layers(cache, AddLayerConfig(layers, **given), Silent())


@pytest.fixture(scope="module")
def few(tiny_qwen, chat_corpus, tmp_path_factory):
    """A cache of layer 1."""
    out = tmp_path_factory.mktemp("few") / "cache"
    run_extract(tiny_qwen, chat_corpus, out, unit_tokens=UNIT, dtype="bfloat16")
    return out


@pytest.fixture(scope="module")
def all_at_once(tiny_qwen, chat_corpus, tmp_path_factory):
    """The files of a cache of layers 0, 1 and 3."""
    out = tmp_path_factory.mktemp("all") / "cache"
    run_extract(tiny_qwen, chat_corpus, out, unit_tokens=UNIT, dtype="bfloat16", layer=(0, 1, 3))
    return tree_bytes(out)


@pytest.fixture
def cache(few, tmp_path):
    """A copy of the cache of layer 1."""
    shutil.copytree(few, tmp_path / "cache")
    return tmp_path / "cache"


def problems(root):
    return [str(finding) for finding in verify(LocalStorage(root)) if not finding.is_note]


def notes(root):
    return [str(finding) for finding in verify(LocalStorage(root)) if finding.is_note]


@pytest.mark.parametrize("workers", [None, 2])
def test_the_cache_is_that_of_one_run_to_the_byte(workers, cache, all_at_once):
    made = add(cache, 3, 0, workers=workers)
    assert made.hook_points == ["resid_post.0", "resid_post.1", "resid_post.3"]
    assert tree_bytes(cache) == all_at_once
    assert [str(finding) for finding in verify(LocalStorage(cache))] == []


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"method": "bt-f", "block_size": 64}])
def test_other_caches_get_a_layer_just_so(options, tiny_qwen, chat_corpus, tmp_path):
    run_extract(tiny_qwen, chat_corpus, tmp_path / "added", unit_tokens=UNIT, **options)
    add(tmp_path / "added", 2)
    run_extract(tiny_qwen, chat_corpus, tmp_path / "whole", unit_tokens=UNIT, layer=(1, 2), **options)
    assert tree_bytes(tmp_path / "added") == tree_bytes(tmp_path / "whole")


def test_the_corpus_is_not_needed(tiny_qwen, chat_corpus, tmp_path):
    shutil.copytree(chat_corpus, tmp_path / "corpus")
    run_extract(tiny_qwen, tmp_path / "corpus", tmp_path / "cache", unit_tokens=UNIT)
    shutil.rmtree(tmp_path / "corpus")
    assert add(tmp_path / "cache", 3).hook_points == ["resid_post.1", "resid_post.3"]


def test_extract_and_repair_know_the_cache_afterwards(cache, tiny_qwen, chat_corpus, all_at_once):
    from fastcache.stages.extract.repair import repair

    add(cache, 0, 3)
    run_extract(tiny_qwen, chat_corpus, cache, unit_tokens=UNIT, dtype="bfloat16", layer=(0, 1, 3))
    shard = cache / "parts/00000001/resid_post.3/c/0/0"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    assert repair(cache, Silent()) == [1]
    assert tree_bytes(cache) == all_at_once


def values(root, hook):
    cache = fastcache.open_cache(root)
    return cache.residuals(hook, 0, cache.n_tokens)


@pytest.mark.parametrize("n", [3, pytest.param(40, marks=pytest.mark.long)])
def test_killed_at_any_moment_it_is_the_old_cache_or_the_new(n, few, all_at_once, tmp_path):
    rng, unfinished = random.Random(1), 0
    before = values(few, "resid_post.1")
    for number in range(n):
        cache = tmp_path / str(number)
        shutil.copytree(few, cache)
        process = start_command("extract", "--add-layer", "0", "--add-layer", "3", "--cache", cache)
        log, size = cache / "parts.jsonl", (cache / "parts.jsonl").stat().st_size
        wait_for(lambda c=cache, o=log, s=size: o.stat().st_size != s or any((c / "parts").glob(".*")), process)
        time.sleep(rng.random() * 0.4)
        kill(process)
        assert problems(cache) == []
        opened = fastcache.open_cache(cache)
        assert opened.hook_points in (["resid_post.1"], ["resid_post.0", "resid_post.1", "resid_post.3"])
        assert np.array_equal(values(cache, "resid_post.1"), before)
        if opened.hook_points == ["resid_post.1"]:
            unfinished += 1
            add(cache, 0, 3)
        assert tree_bytes(cache) == all_at_once
        shutil.rmtree(cache)
    assert unfinished


def test_an_sae_goes_on_after_its_cache_got_a_layer(cache, tmp_path):
    from fastcache.stages.train.config import TrainConfig
    from fastcache.stages.train.run import train

    config = TrainConfig(cache=str(cache), arch="standard", layer=1, tokens=640, batch_size=32, expansion=2)
    train(config, tmp_path / "sae", Silent())
    before = tree_bytes(tmp_path / "sae")
    add(cache, 3)
    train(config, tmp_path / "sae", Silent())
    assert tree_bytes(tmp_path / "sae") == before


OPERATIONS = ("write", "append", "workspace", "publish")


class AtOnce:
    """In the place of `Background`: work is done where it is submitted, so that nothing changes while a tree is copied."""

    def __init__(self, _max_bytes):
        pass

    def submit(self, _n_bytes, work):
        future = Future()
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
            raise
        return future

    def drain(self):
        pass

    def close(self):
        pass


def test_between_any_two_changes_of_the_disk_the_cache_is_whole_and_goes_on(
    tiny_qwen, chat_corpus, tmp_path, monkeypatch
):
    """What a kill would leave before every single change is copied; all of it verifies, some is gone on with."""
    cache, whole = tmp_path / "cache", tmp_path / "whole"
    run_extract(tiny_qwen, chat_corpus, cache, unit_tokens=200, tokens=400, parity=0)
    run_extract(tiny_qwen, chat_corpus, whole, unit_tokens=200, tokens=400, parity=0, layer=(0, 1, 3))
    all_at_once = tree_bytes(whole)
    copies = []

    def copying(original):
        def operation(self, *arguments):
            copies.append(tmp_path / f"copy-{len(copies)}")
            shutil.copytree(cache, copies[-1])
            return original(self, *arguments)

        return operation

    with monkeypatch.context() as patch:
        patch.setattr("fastcache.cache_format.writer.Background", AtOnce)
        for name in OPERATIONS:
            patch.setattr(LocalStorage, name, copying(getattr(LocalStorage, name)))
        add(cache, 0, 3)
    n_hooks = []
    for copy in copies:
        assert problems(copy) == []
        n_hooks.append(len(fastcache.open_cache(copy).hook_points))
    assert n_hooks == sorted(n_hooks)
    assert set(n_hooks) == {1, 3}
    assert len(copies) > 30
    for copy in [*copies[5:-1:20], copies[-1]]:
        add(copy, 0, 3)
        assert tree_bytes(copy) == all_at_once
        assert json.loads((copy / "run.json").read_text())["settings"]["layer"] == [0, 1, 3]


def test_arrays_of_a_layer_that_is_not_listed_are_noted_and_nothing_else(cache, tmp_path):
    stray = cache / "parts/00000000/resid_post.3"
    shutil.copytree(cache / "parts/00000000/resid_post.1", stray)
    assert problems(cache) == []
    assert any("extract --add-layer 3" in note for note in notes(cache))
    (cache / "parts/00000000/thesis.txt").write_text("mine")
    assert len(problems(cache)) == 1


def test_old_layers_can_be_read_meanwhile(cache, few, monkeypatch):
    from fastcache.cache_format.layers import LayerWriter

    before = values(few, "resid_post.1")
    opened, seen = fastcache.open_cache(cache), []
    original = LayerWriter.log_part

    def look(self, record):
        original(self, record)
        seen.append(np.array_equal(opened.residuals("resid_post.1", 0, opened.n_tokens), before))
        seen.append(np.array_equal(values(cache, "resid_post.1"), before))

    monkeypatch.setattr(LayerWriter, "log_part", look)
    add(cache, 3)
    assert seen
    assert all(seen)


def refused(cache, error, words, *layers, **given):
    before = tree_bytes(cache)
    with pytest.raises(error, match=words):
        add(cache, *layers, **given)
    assert tree_bytes(cache) == before


def test_a_layer_that_is_there_is_refused(cache):
    refused(cache, InputError, "has this layer already; it holds resid_post.1", 1)
    refused(cache, InputError, "has this layer already", 3, 1)


def test_a_layer_out_of_range_is_refused(cache):
    refused(cache, InputError, "--add-layer goes from 0 to 3", 4)


def test_a_cache_that_is_not_complete_is_refused(cache):
    edit_manifest(cache, state="writing")
    refused(cache, InputError, "is not complete", 3)


def test_what_is_no_cache_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"run\.json is missing"):
        add(tmp_path, 3)


@pytest.fixture
def movable(tiny_qwen, chat_corpus, tmp_path):
    """A cache, and the folder of its model."""
    shutil.copytree(tiny_qwen, tmp_path / "model")
    run_extract(tmp_path / "model", chat_corpus, tmp_path / "cache", unit_tokens=UNIT)
    return tmp_path / "cache", tmp_path / "model"


def change_weight(model, name, row, value):
    weights = load_file(model / "model.safetensors")
    weights[name][row] = value
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def test_other_weights_are_refused(movable):
    cache, model = movable
    change_weight(model, "model.layers.3.mlp.down_proj.weight", 0, 1.0)
    refused(cache, MismatchError, r"model\.weights_sha256", 3)


def test_nan_at_the_new_layer_is_told_and_the_cache_stays(tiny_qwen, chat_corpus, tmp_path):
    shutil.copytree(tiny_qwen, tmp_path / "model")
    change_weight(tmp_path / "model", "model.layers.3.mlp.down_proj.weight", 0, np.nan)
    cache = tmp_path / "cache"
    run_extract(tmp_path / "model", chat_corpus, cache, unit_tokens=UNIT, parity=0)
    words = r"Instance \d+ has NaN.*holds this dialogue at its other layers.*resid_post\.3 can't be added"
    refused(cache, NonFiniteError, words, 3)
    assert problems(cache) == []


def test_a_cache_without_parity_figures_gets_those_of_the_new_layer(tiny_qwen, chat_corpus, tmp_path):
    run_extract(tiny_qwen, chat_corpus, tmp_path / "cache", unit_tokens=UNIT, parity=0)
    made = add(tmp_path / "cache", 3, parity=3)
    assert set(made.manifest.parity["hook_points"]) == {"resid_post.3"}
    assert len(made.manifest.parity["lengths"]) == 3


def test_other_sequences_in_the_parity_check_are_named(cache):
    figures = add(cache, 3, parity=4).manifest.parity
    assert len(figures["lengths"]) == 2
    assert len(figures["hook_points"]["resid_post.3"]["lengths"]) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--add-layer", "3"], "--add-layer and --cache go together"),
        (["--cache", "x"], "--add-layer and --cache go together"),
        (["--add-layer", "3", "--cache", "x", "--model", "demo"], "leave out --model"),
        (["--add-layer", "3", "--cache", "x", "--out", "y", "--tokens", "7"], "leave out --out, --tokens"),
        (["--add-layer", "three", "--cache", "x"], "expected int"),
        (["--add-layer", "3", "--cache", "nowhere"], "run.json is missing"),
    ],
)
def test_the_command_line_says_what_is_wrong(options, words, capsys):
    from fastcache.pipeline.cli import main

    with pytest.raises(SystemExit):
        main(["extract", *options])
    assert words in " ".join(capsys.readouterr().err.split())
