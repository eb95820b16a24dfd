"""A model of 4-bit weights, as GPTQ stores them: vLLM runs it, and the cache says what it was."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="vllm is not installed: `make test-vllm` has an environment with it")

from conftest import run_extract
from transformers import AutoModelForCausalLM

from with_vllm.models import make_model

GROUP = 64
HOOK = "resid_post.2"


def quantise(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """GPTQ's tensors for a weight `[out, in]`, rounded to the nearest of 16 values by group, and the rounded weight."""
    n_out, n_in = weight.shape
    groups = weight.T.reshape(n_in // GROUP, GROUP, n_out)
    scales = (groups.abs().amax(1) / 7).to(torch.float16)
    steps = (groups / scales[:, None].float()).round().clamp(-8, 7)
    codes = (steps + 8).to(torch.int64).reshape(n_in // 8, 8, n_out)
    shifts = 4 * torch.arange(8)
    packed = (codes << shifts[None, :, None]).sum(1)
    zeros = (torch.full((n_in // GROUP, n_out // 8, 8), 7) << shifts).sum(-1)  # GPTQ stores the zero point less one
    tensors = {
        "qweight": _as_int32(packed), "qzeros": _as_int32(zeros), "scales": scales,
        "g_idx": torch.arange(n_in, dtype=torch.int32) // GROUP,
    }  # fmt: skip
    return tensors, (steps * scales[:, None].float()).reshape(n_in, n_out).T.contiguous()


def _as_int32(values: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values.numpy().astype(np.uint32).view(np.int32))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The quantised model, and a plain one of the same rounded weights."""
    rounded = make_model(tmp_path_factory.mktemp("rounded"), "Qwen2")
    quantised = make_model(tmp_path_factory.mktemp("quantised"), "Qwen2")
    weights = load_file(rounded / "model.safetensors")
    stored = {}
    for name, weight in weights.items():
        if name.endswith("proj.weight"):
            tensors, weights[name] = quantise(weight)
            stored |= {f"{name.removesuffix('weight')}{kind}": tensor for kind, tensor in tensors.items()}
        else:
            stored[name] = weight.to(torch.float16)
    save_file(weights, rounded / "model.safetensors", {"format": "pt"})
    save_file(stored, quantised / "model.safetensors", {"format": "pt"})
    config = json.loads((quantised / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return quantised, rounded


def test_a_quantised_model_gives_what_its_rounded_weights_give(models, chat_corpus, tmp_path):
    quantised, rounded = models
    cache = run_extract(
        quantised, chat_corpus, tmp_path / "cache", layer=(2,), backend="auto", model_dtype="bfloat16", pack_tokens=256
    )
    identity = cache.manifest.identity
    assert identity["backend"] == "vllm"
    assert identity["model"]["quantisation"] == {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
    assert cache.manifest.parity == {}
    plain = AutoModelForCausalLM.from_pretrained(rounded, dtype=torch.float32).eval()
    for instance in list(cache.instances())[:5]:
        with torch.no_grad():
            ids = torch.from_numpy(instance.token_ids.astype(np.int64))[None]
            expected = plain(ids, output_hidden_states=True).hidden_states[3][0].numpy()
        found = instance.residuals(HOOK)
        assert np.linalg.norm(found - expected) <= 5e-2 * np.linalg.norm(expected)
