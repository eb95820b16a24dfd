"""Choosing a backend, and what of the vLLM backend needs no vLLM: the memory it shares, its self-test, its devices."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastcache.errors import InputError, MismatchError
from fastcache.llm import backends
from fastcache.llm.backends import BackendPlan, choose_backend
from fastcache.llm.loading import ModelSource, load_config, model_identity
from fastcache.llm.self_test import SelfTest, fillers
from fastcache.llm.transformers_backend import TransformersBackend
from fastcache.llm.vllm_backend.arena import Arena, ArenaShape, RowRing
from fastcache.llm.vllm_backend.capture import Capture, Span
from fastcache.llm.vllm_backend.engine import visible

HOOKS = ("resid_post.1",)


@pytest.fixture
def installed(monkeypatch):
    """As if vllm were installed."""
    monkeypatch.setattr(backends, "find_spec", lambda _name: object())


def test_auto_takes_transformers_where_vllm_is_not_installed(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda _name: None)
    assert choose_backend("auto", "cuda", 1, False) == ("transformers", "vllm is not installed")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("device", "quantised", "name", "reason"),
    [
        ("cuda:1", False, "vllm", "there is a GPU"),
        ("cpu", False, "transformers", "there is no GPU"),
        ("cpu", True, "vllm", "the model is quantised"),
    ],
)
def test_auto_says_why(device, quantised, name, reason):
    chosen, why = choose_backend("auto", device, 1, quantised)
    assert chosen == name
    assert reason in why


def test_vllm_that_is_not_installed_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr("fastcache.extras.find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"pip install 'fastcache-sae\[vllm\]'"):
        choose_backend("vllm", "cuda", 1, False)


def test_transformers_does_not_split_a_model():
    with pytest.raises(InputError, match="--tensor-parallel 2 is for --backend vllm"):
        choose_backend("transformers", "cuda", 2, False)


def test_the_run_says_which_backend_and_why(tiny_qwen, chat_corpus, tmp_path):
    from fastcache.progress import Silent
    from fastcache.stages.extract.config import ExtractConfig
    from fastcache.stages.extract.run import extract

    class Heard(Silent):
        said = ""

        def say(self, message: str) -> None:
            self.said += message

    heard = Heard()
    config = ExtractConfig(model=str(tiny_qwen), layer=(1,), backend="transformers", parity=0, tokens=500)
    cache = extract(config, lambda: chat_corpus, tmp_path / "cache", heard)
    assert "Backend: transformers (asked for)." in heard.said
    assert "backend" not in cache.manifest.identity  # as in caches from before there was another


def test_workers_take_devices_in_turn_and_several_where_a_model_is_split():
    plan = BackendPlan("vllm", ModelSource("demo"), HOOKS, "float32", tuple("abcd"), 8, tensor_parallel=2)
    assert [plan.devices_of(number) for number in range(3)] == [["a", "b"], ["c", "d"], ["a", "b"]]


@pytest.mark.parametrize(
    ("before", "devices", "seen"),
    [
        (None, ["cuda:2"], "2"),
        ("4,5,6,7", ["cuda:1", "cuda:3"], "5,7"),
        (None, ["cuda"], "0"),
        ("3", ["cpu"], "3"),
    ],
)
def test_an_engine_sees_the_devices_of_its_worker_only(monkeypatch, before, devices, seen):
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    with visible(devices):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


@given(st.integers(1, 40), st.lists(st.integers(1, 40), max_size=80), st.randoms())
def test_runs_of_the_ring_never_overlap(n_rows, lengths, random):
    ring, held = RowRing(n_rows), []
    for length in lengths:
        while held and random.random() < 0.4:
            held.pop(0)
            ring.give_back()
        start = ring.take(length)
        if start is None:
            assert held or length > n_rows  # an empty ring has room for all that fits
            continue
        run = set(range(start, start + length))
        assert run <= set(range(n_rows))
        assert all(run.isdisjoint(other) for other in held)
        held.append(run)


def test_another_process_writes_into_the_arena():
    shape = ArenaShape(2, 5, 3, 4, torch.bfloat16)
    arena = Arena(shape)
    code = (
        "import sys, torch; from fastcache.llm.vllm_backend.arena import *;"
        "arena = Arena(ArenaShape(2, 5, 3, 4, torch.bfloat16), sys.argv[1]); arena.rows[1, 2] = 1.5; arena.written[2] = 7"
    )
    subprocess.run([sys.executable, "-c", code, arena.path], check=True)
    assert arena.rows[1, 2].tolist() == [1.5] * 4
    assert arena.rows.count_nonzero() == 4
    assert arena.written.tolist() == [0, 0, 7]
    arena.close()


def test_the_rows_of_a_batch_land_where_their_sequences_are():
    arena = Arena(ArenaShape(2, 10, 2, 3, torch.float32))
    batch = [torch.arange(12.0).view(4, 3), -torch.arange(12.0).view(4, 3)]
    # Rows 0 and 1 end a sequence that begins at row 5; row 2 is nobody's; row 3 begins one at row 0.
    Capture(arena).take(batch, [Span(0, 6, 2, slot=1, written=3), Span(3, 0, 1, slot=0, written=1)])
    assert torch.equal(arena.rows[0, 6:8], batch[0][:2])
    assert torch.equal(arena.rows[1, 0], batch[1][3])
    assert arena.rows[0, [1, 2, 3, 4, 5, 8, 9]].count_nonzero() == 0
    assert arena.written.tolist() == [1, 3]
    arena.close()


def test_the_self_test_passes_a_right_backend_and_stops_a_wrong_one(tiny_qwen):
    source = ModelSource(str(tiny_qwen))
    self_test = SelfTest.of(source, HOOKS, max_length=200)
    right = TransformersBackend(source, HOOKS, "float32", "cpu")
    self_test.check(right, "float32", batch_tokens=64)

    class Wrong(TransformersBackend):
        def residuals(self, sequences):
            for residuals in super().residuals(sequences):
                yield {hook: values * np.float32(1.001) for hook, values in residuals.items()}

    wrong = Wrong(source, HOOKS, "float32", "cpu")
    with pytest.raises(MismatchError, match=r"Self-test.*Nothing was written"):
        self_test.check(wrong, "float32", batch_tokens=64)


@given(st.integers(1, 500), st.integers(1, 90))
def test_what_goes_before_the_self_test_fills_the_batch_as_far_as_it_should(n_tokens, max_length):
    sequences = fillers(50, n_tokens, max_length)
    assert sum(map(len, sequences)) == n_tokens
    assert all(0 < len(sequence) <= max_length for sequence in sequences)
    assert all(0 <= token < 50 for token in np.concatenate(sequences))


def test_how_a_model_was_quantised_is_part_of_its_identity(tiny_qwen, tmp_path):
    settings = json.loads((tiny_qwen / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    source = ModelSource(str(tmp_path))
    identity = model_identity(source, load_config(source))
    assert identity["quantisation"] == {"quant_method": "gptq", "bits": 4, "group_size": 128}


def test_a_plain_model_has_no_word_of_quantisation(tiny_qwen):
    source = ModelSource(str(tiny_qwen))
    assert "quantisation" not in model_identity(source, load_config(source))
