"""Loss recovered by vLLM: the figures of transformers."""

import pytest

pytest.importorskip("vllm", reason="vllm is not installed: `make test-vllm` has an environment with it")

import torch
from conftest import run_extract

from fastcache.progress import Silent
from fastcache.sae.architectures import JumpReluSae, StandardSae
from fastcache.sae.init import initialise
from fastcache.sae.storage import save_sae
from fastcache.stages.evaluate.config import EvaluateConfig
from fastcache.stages.evaluate.run import evaluate
from with_vllm.models import make_model


@pytest.fixture(scope="module", params=["Qwen2", "Llama"])
def held_out(request, chat_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(folder / "model", request.param)
    return run_extract(model, chat_corpus, folder / "cache", layer=(0, 2), split="eval")


def save(folder, sae, cache, hook):
    initialise(sae, torch.zeros(cache.d_in), torch.Generator().manual_seed(3))
    identity = cache.manifest.identity
    given = {name: identity[name] for name in ("model", "tokenizer", "method")}
    save_sae(folder, sae, {**given, "hook_point": hook, "training": {}})
    return str(folder)


def test_the_figures_of_both_backends_agree(held_out, tmp_path):
    saes = (
        save(tmp_path / "one", StandardSae(128, 256), held_out, "resid_post.0"),
        save(tmp_path / "two", JumpReluSae(128, 256), held_out, "resid_post.2"),
    )
    common = {"sae": saes, "cache": str(held_out.path), "with_model": True, "model_instances": 5}
    expected = evaluate(EvaluateConfig(**common), Silent())
    found = evaluate(EvaluateConfig(**common, model_backend="vllm"), Silent())
    for one, other in zip(found, expected, strict=True):
        assert one["with_model"]["dialogues"] == other["with_model"]["dialogues"] == 5
        for tokens, figures in other["with_model"]["splits"].items():
            of_vllm = one["with_model"]["splits"][tokens]
            assert of_vllm["n_tokens"] == figures["n_tokens"]
            for name in ("loss", "loss_spliced", "loss_zero", "loss_mean", "delta_loss"):
                if figures["n_tokens"]:
                    assert of_vllm[name] == pytest.approx(figures[name], abs=2e-5), (tokens, name)
        everything = one["with_model"]["splits"]["all"]
        assert everything["kl"] is None
        assert abs(everything["delta_loss"]) > 1e-3  # the splice does something
