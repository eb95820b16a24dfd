"""A model of 8-bit weights and activations, as compressed-tensors stores it: vLLM runs it, and the cache says what it was.

That kind because vLLM has kernels for it on every x86 CPU; those for 4-bit weights want AVX-512.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="vllm is not installed: `make test-vllm` has an environment with it")

from conftest import run_extract
from transformers import AutoModelForCausalLM

from with_vllm.models import make_model

HOOK = "resid_post.2"
EIGHT_BITS = {"num_bits": 8, "type": "int", "symmetric": True}
SETTINGS = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**EIGHT_BITS, "strategy": "channel", "dynamic": False},
            "input_activations": {**EIGHT_BITS, "strategy": "token", "dynamic": True},
        }
    },
}


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values of a weight `[out, in]` and the scale `[out, 1]` of each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The quantised model, and a plain one of the same rounded weights."""
    rounded = make_model(tmp_path_factory.mktemp("rounded"), "Qwen2")
    quantised = make_model(tmp_path_factory.mktemp("quantised"), "Qwen2")
    weights = load_file(rounded / "model.safetensors")
    stored = {}
    for name, weight in weights.items():
        stored[name] = weight
        if name.endswith("proj.weight"):
            stored[name], scale = quantise(weight)
            stored[f"{name}_scale"] = scale
            weights[name] = stored[name].float() * scale
    save_file(weights, rounded / "model.safetensors", {"format": "pt"})
    save_file(stored, quantised / "model.safetensors", {"format": "pt"})
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": SETTINGS}))
    return quantised, rounded


def test_a_quantised_model_gives_what_its_rounded_weights_give(models, chat_corpus, tmp_path):
    quantised, rounded = models
    cache = run_extract(
        quantised, chat_corpus, tmp_path / "cache", layer=(2,), backend="auto", model_dtype="float32", pack_tokens=256
    )
    identity = cache.manifest.identity
    assert identity["backend"] == "vllm"
    assert identity["model"]["quantisation"] == {
        "quant_method": "compressed-tensors", "format": "int-quantized",
    }  # fmt: skip
    assert cache.manifest.parity == {}
    plain = AutoModelForCausalLM.from_pretrained(rounded, dtype=torch.float32).eval()
    for instance in list(cache.instances())[:5]:
        with torch.no_grad():
            ids = torch.from_numpy(instance.token_ids.astype(np.int64))[None]
            expected = plain(ids, output_hidden_states=True).hidden_states[3][0].numpy()
        found = instance.residuals(HOOK)
        # Kernels of CPUs without VNNI add products in 16 bits, which saturate: 0.1 to 0.2. A lost bias would be 0.6.
        assert np.linalg.norm(found - expected) <= 0.3 * np.linalg.norm(expected)
