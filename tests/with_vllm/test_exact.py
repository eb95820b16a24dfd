"""Real vLLM: every token's residuals are those of plain transformers, however vLLM schedules them."""

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vllm is not installed: `make test-vllm` has an environment with it")

from fastcache.errors import InputError, MismatchError, ModelError
from fastcache.llm.loading import ModelSource
from fastcache.llm.self_test import SelfTest
from fastcache.llm.vllm_backend.backend import VllmBackend
from with_vllm.models import BATCH_TOKENS, HOOKS, largest_difference, make_model, make_sequences

LIMIT = 2e-5
LONGEST = 3 * BATCH_TOKENS


@pytest.fixture(scope="module", params=["Qwen2", "Llama"])
def model(request, tmp_path_factory):
    return make_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("qwen"), "Qwen2")


@pytest.fixture
def start():
    """Starts engines and ends them."""
    started = []

    def make(model, devices=("cpu",), max_length=LONGEST, **engine) -> VllmBackend:
        source = ModelSource(str(model))
        backend = VllmBackend(source, HOOKS, "float32", devices, max_length, BATCH_TOKENS, **engine)
        started.append(backend)
        return backend

    yield make
    for backend in started:
        backend.close()


def test_sequences_of_any_length_are_exact(model, start):
    backend = start(model)
    sequences = make_sequences(200, LONGEST)
    found = list(backend.residuals(sequences))
    assert backend.counts()["sequences"] == 200
    assert backend.counts()["split"] > 50  # longer than a batch, or cut by its end
    assert largest_difference(model, sequences, found) <= LIMIT


def test_preempted_sequences_are_exact(qwen, start):
    # Many sequences go on side by side, 16 tokens at a time, until the blocks are used up: some must begin again.
    backend = start(qwen, long_prefill_token_threshold=16, num_gpu_blocks_override=16, block_size=32)
    sequences = make_sequences(60, LONGEST)
    found = list(backend.residuals(sequences))
    assert backend.counts()["replayed"] > 0
    assert largest_difference(qwen, sequences, found) <= LIMIT


def test_compiled_models_are_exact(qwen, start):
    sequences = make_sequences(40, LONGEST)
    found = list(start(qwen, enforce_eager=False).residuals(sequences))
    assert largest_difference(qwen, sequences, found) <= LIMIT


def test_models_split_over_two_devices_are_exact(qwen, start, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    sequences = make_sequences(40, LONGEST)
    found = list(start(qwen, ("cpu", "cpu")).residuals(sequences))
    assert largest_difference(qwen, sequences, found) <= LIMIT


def test_one_engine_serves_run_after_run(qwen, start):
    backend = start(qwen)
    sequences = make_sequences(30, LONGEST)
    first = list(backend.residuals(sequences))

    abandoned = backend.residuals(sequences)
    next(abandoned)
    abandoned.close()  # with sequences in flight: their rows must not land in those of the next run

    again = list(backend.residuals(reversed(sequences)))
    for one, other in zip(first, reversed(again), strict=True):
        np.testing.assert_allclose(one[HOOKS[1]], other[HOOKS[1]], atol=LIMIT)


def test_the_self_test_cuts_a_sequence_and_notices_other_values(qwen, start):
    backend = start(qwen)
    self_test = SelfTest.of(ModelSource(str(qwen)), HOOKS, LONGEST)
    self_test.check(backend, "float32", backend.batch_tokens)
    assert backend.counts()["split"] >= 1

    self_test.expected[0][HOOKS[0]][-1] += 0.1
    with pytest.raises(MismatchError, match="Self-test: a sequence of 150 tokens"):
        self_test.check(backend, "float32", backend.batch_tokens)


def test_a_model_whose_residuals_vllm_does_not_give_is_refused(tmp_path, start):
    with pytest.raises(ModelError, match=r"residual stream of Gemma2ForCausalLM.*--backend transformers"):
        start(make_model(tmp_path, "Gemma2"))


def test_a_layer_out_of_range_is_refused_before_anything_starts(qwen):
    with pytest.raises(InputError, match="--layer goes from 0 to 3"):
        VllmBackend(ModelSource(str(qwen)), ["resid_post.4"], "float32", ["cpu"], LONGEST)
