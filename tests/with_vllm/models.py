"""Tiny models whose attention heads are as wide as vLLM's kernels need them, and what they give by plain transformers."""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastcache.assets import DEMO
from fastcache.llm.backend import Residuals
from fastcache.llm.loading import ModelSource
from fastcache.llm.parity import reference_residuals

HOOKS = ["resid_post.0", "resid_post.2"]
BATCH_TOKENS = 128
# Weights of this size leave plain float32 itself within about 1e-5 of float64; larger ones amplify its rounding.
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 128**-0.5,
}  # fmt: skip
ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = {"Qwen2": {}, "Llama": {"rope_parameters": ROPE}, "Gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32}}


def make_model(folder: Path, family: str) -> Path:
    """Random weights, large enough that every token depends on those before it, with the demo's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.save_pretrained(folder)
    config_class, model_class = getattr(transformers, f"{family}Config"), getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(0)
    model = model_class(config_class(vocab_size=len(tokenizer), **SIZES, **FAMILIES[family]))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.2 * torch.randn_like(parameter)
        elif name.endswith("bias"):
            parameter.data = 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def demo_as_llama(folder: Path) -> Path:
    """The demo's model, in bfloat16 and to the same logits, as a Llama.

    Its heads are 64 wide, not hidden_size / heads = 80: vLLM's Llama asks the configuration, its Qwen2 doesn't. Llama has
    a bias in o_proj too, which is 0 here.
    """
    demo = AutoModelForCausalLM.from_pretrained(DEMO)
    kept = (
        "vocab_size",
        "tie_word_embeddings",
        "rope_parameters",
        "rms_norm_eps",
        "head_dim",
        "eos_token_id",
        "pad_token_id",
    )
    settings = {name: getattr(demo.config, name) for name in (*SIZES, *kept)}
    config = LlamaConfig(**settings, bos_token_id=None, attention_bias=True)
    llama = LlamaForCausalLM(config).to(demo.dtype)
    weights = demo.state_dict()
    zeros = {
        name: torch.zeros_like(value) for name, value in llama.state_dict().items() if name.endswith("o_proj.bias")
    }
    llama.load_state_dict(weights | zeros)
    llama.generation_config = demo.generation_config
    llama.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


def make_sequences(count: int, longest: int) -> list[np.ndarray]:
    """Random tokens with the extremes of length; some begin alike, which a prefix cache would notice."""
    rng = np.random.default_rng(5)
    lengths = [longest, 1, *rng.integers(1, longest, count - 2)]
    sequences = [rng.integers(0, 4000, length).astype(np.int32) for length in lengths]
    for token_ids in sequences[::3]:
        token_ids[:32] = sequences[0][: len(token_ids[:32])]
    return sequences


def largest_difference(model: Path, sequences: list[np.ndarray], found: list[Residuals]) -> float:
    """To the whole model in float32, one sequence at a time, over all tokens and hook points."""
    reference = reference_residuals(ModelSource(str(model)), HOOKS)
    differences = []
    for token_ids, residuals in zip(sequences, found, strict=True):
        expected = reference(token_ids)
        differences += [float(np.abs(residuals[hook] - expected[hook]).max()) for hook in HOOKS]
    return max(differences)
