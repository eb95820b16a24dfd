"""Steering in vLLM: what transformers says, of many prompts at a time, whatever vLLM does with its batches."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vllm is not installed: `make test-vllm` has an environment with it")

import torch

from fastcache.errors import ModelError
from fastcache.llm.loading import ModelSource, load_config, load_tokenizer, model_identity
from fastcache.llm.splicing import SplicedModel
from fastcache.llm.vllm_backend import splicing
from fastcache.llm.vllm_backend.engine import cpu_settings
from fastcache.llm.vllm_backend.splicing import SplicedEngine
from fastcache.progress import Silent
from fastcache.sae.architectures import JumpReluSae
from fastcache.sae.init import initialise
from fastcache.sae.storage import load_sae, save_sae
from fastcache.stages.steer.config import SteerConfig, settings_of
from fastcache.stages.steer.generators import TransformersGenerator, VllmGenerator
from fastcache.stages.steer.run import steer
from with_vllm.models import make_model

HOOK = "resid_post.2"
NEW_TOKENS = 24
TEXTS = ["What does str.join do?", "How is a list sorted?", "Hello", "What is a module, and what is it for? " * 4]
MODES = [
    {"mode": "add", "latent": (3, 7), "alpha": (0.0, 4.0, 15.0)},
    {"mode": "add", "positions": "generated", "alpha": (0.0, 15.0)},
    {"mode": "clamp", "latent": (3, 7), "together": True, "alpha": (6.0,)},
    {"mode": "clamp", "positions": "generated", "alpha": (6.0,)},
    {"mode": "ablate"},
]


@pytest.fixture(scope="module", params=["demo", "Qwen2"])
def model(request, tmp_path_factory, llama_demo):
    """One that has learned to end its answers, and one of random weights that is kept from saying things again."""
    if request.param == "demo":
        return llama_demo
    folder = make_model(tmp_path_factory.mktemp("qwen"), "Qwen2")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1.3}))
    return folder


def make_sae(model, folder):
    """A random SAE, about half of whose latents are active."""
    source = ModelSource(str(model))
    config = load_config(source)
    sae = JumpReluSae(config.hidden_size, 64)
    initialise(sae, torch.zeros(config.hidden_size), torch.Generator().manual_seed(3))
    save_sae(folder, sae, {"hook_point": HOOK, "model": model_identity(source, config), "training": {}})
    return str(folder)


@pytest.fixture(scope="module")
def sae(model, tmp_path_factory):
    return make_sae(model, tmp_path_factory.mktemp("sae") / "sae")


@pytest.fixture(scope="module")
def prompts(model):
    tokenizer = load_tokenizer(ModelSource(str(model)))
    return [np.asarray(tokenizer(text)["input_ids"], np.int32) for text in TEXTS]


@pytest.fixture(scope="module")
def engine(model, prompts):
    started = SplicedEngine(ModelSource(str(model)), [HOOK], "float32", "cpu", 200, len(prompts))
    yield started
    started.close()


@pytest.fixture(scope="module")
def plain(model):
    return SplicedModel(ModelSource(str(model)), [HOOK], torch.float32, "cpu")


def settings_with(sae, **given):
    return SteerConfig(**{"sae": sae, "latent": (3,), "max_new_tokens": NEW_TOKENS, **given})


def said_by(generator, prompts, setting):
    """Tokens, and whether they end the turn, of each prompt in order."""
    found = {said.place: (said.token_ids.tolist(), said.ended) for said in generator(prompts, setting)}
    return [found[place] for place in range(len(prompts))]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_greedy_generations_are_those_of_transformers(engine, plain, sae, prompts, mode):
    config = settings_with(sae, **mode)
    one_by_one = TransformersGenerator(config, load_sae(Path(config.sae))[0], HOOK, plain)
    together = VllmGenerator(config, HOOK, engine)
    by_setting = {}
    for setting in settings_of(config):
        by_setting[setting] = said_by(together, prompts, setting)
        assert by_setting[setting] == said_by(one_by_one, prompts, setting)
    by_itself, *_steered = by_setting.values()
    for setting, said in by_setting.items():
        assert (said == by_itself) == (setting.alpha == 0 or not setting.latents), setting


def test_drawn_tokens_hang_on_the_seed_alone(engine, sae, prompts):
    one, same, other = (
        VllmGenerator(settings_with(sae, temperature=1.0, seed=seed), HOOK, engine) for seed in (1, 1, 2)
    )
    by_itself = settings_of(settings_with(sae))[0]
    first = said_by(one, prompts, by_itself)
    assert first == said_by(same, prompts, by_itself) != said_by(other, prompts, by_itself)
    assert first[1:2] == said_by(one, prompts[1:2], by_itself)  # and not on who else is there


@pytest.mark.parametrize("model", ["Qwen2"], indirect=True)
def test_prompts_in_pieces_and_preempted_generations_are_steered_where_they_were(
    model, sae, prompts, plain, monkeypatch
):
    few = {"num_gpu_blocks_override": 10, "block_size": 32, "max_num_seqs": 12, "disable_log_stats": False}
    settings = {**cpu_settings(load_config(ModelSource(str(model))), 4, 1), **few}
    monkeypatch.setattr(splicing, "cpu_settings", lambda *_given: settings)
    monkeypatch.setattr(splicing, "default_pack_tokens", lambda *_given: max(map(len, prompts)) - 10)
    config = settings_with(sae, positions="generated", alpha=(15.0,), max_new_tokens=60)
    setting, many = settings_of(config)[1], [*prompts, *prompts, *prompts]
    expected = said_by(TransformersGenerator(config, load_sae(Path(config.sae))[0], HOOK, plain), prompts, setting)
    engine = SplicedEngine(ModelSource(str(model)), [HOOK], "float32", "cpu", 200)
    try:
        assert said_by(VllmGenerator(config, HOOK, engine), many, setting) == 3 * expected
        metrics = {metric.name: metric for metric in engine._engine.get_metrics()}
        assert metrics["vllm:num_preemptions"].value > 0
    finally:
        engine.close()


def test_a_stopped_run_goes_on_and_generates_nothing_twice(llama_demo, tmp_path, monkeypatch):
    config = SteerConfig(
        sae=make_sae(llama_demo, tmp_path / "sae"), latent=(3,), alpha=(0.0, 15.0), prompt=tuple(TEXTS),
        max_new_tokens=NEW_TOKENS, positions="generated", backend="vllm",
    )  # fmt: skip
    plain = steer(SteerConfig(**{**vars(config), "backend": "transformers"}), tmp_path / "plain", Silent())
    expected = [{**row, "kl": None} for row in plain]
    generate = VllmGenerator.__call__
    asked = []

    def stopping(self, prompts, setting):
        for said in generate(self, prompts, setting):
            if asked == ["stop"]:
                raise KeyboardInterrupt
            asked.extend(["stop"] if setting.alpha == 0 else [])
            yield said

    def counting(self, prompts, setting):
        asked.extend((setting.alpha, prompt.tobytes()) for prompt in prompts)
        return generate(self, prompts, setting)

    monkeypatch.setattr(VllmGenerator, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        steer(config, tmp_path / "out", Silent())
    n_written = len((tmp_path / "out" / "steering.jsonl").read_text().splitlines())
    assert n_written == len(TEXTS) + 1
    asked.clear()
    monkeypatch.setattr(VllmGenerator, "__call__", counting)
    assert steer(config, tmp_path / "out", Silent()) == expected
    assert len(asked) == len(set(asked)) == len(expected) - n_written
    assert {row["ended"] for row in expected} == {True, False}


def test_what_is_longer_than_the_models_context_is_told(llama_demo):
    with pytest.raises(ModelError, match="up to 512 tokens, and a sequence, with what is to be generated, takes 513"):
        SplicedEngine(ModelSource(str(llama_demo)), [HOOK], "float32", "cpu", 513)
