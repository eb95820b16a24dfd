"""Tiny random checkpoints of architectures that need something special, and a plain loop over them without fastcache."""

from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

N_LAYERS = 4
SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": N_LAYERS, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
EMBEDDED = {**WINDOWS, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 32}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TEXT = {
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "gemma4_text": {**EMBEDDED, "num_kv_shared_layers": 2, "global_head_dim": 16},
    "gemma3n_text": {
        **EMBEDDED, "num_kv_shared_layers": 1, "laurel_rank": 8, "intermediate_size": [64] * N_LAYERS,
        "activation_sparsity_pattern": [0.0] * N_LAYERS,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "mlp", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 8,
        "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16,
    },
    "rwkv": {"rescale_every": 2},
    "deepseek_v4": {
        **EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
}  # fmt: skip
WRAPPERS = {
    "gemma3": ({"model_type": "gemma3_text", **WINDOWS, "query_pre_attn_scalar": 8}, "siglip_vision_model", 4),
    "llava": ({"model_type": "llama"}, "clip_vision_model", None),
}


def make_checkpoint(kind: str, folder: Path) -> Path:
    """A checkpoint of this kind in `folder`; "gemma3" is one with the weight names of the hub."""
    torch.manual_seed(0)
    if kind in WRAPPERS:
        text, vision, n_image_tokens = WRAPPERS[kind]
        options = {"text_config": {**SIZES, **text}, "vision_config": {**VISION, "model_type": vision}}
        if n_image_tokens:
            options["mm_tokens_per_image"] = n_image_tokens
        config = transformers.CONFIG_MAPPING[kind](**options)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    else:
        config = transformers.CONFIG_MAPPING[kind](**{**SIZES, **TEXT[kind]})
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    if kind == "gemma3":
        change_weights(folder, lambda weights: rename(weights, "model.language_model.", "language_model.model."))
    return folder


def rename(weights: dict[str, torch.Tensor], old: str, new: str) -> None:
    for name in [name for name in weights if name.startswith(old)]:
        weights[new + name.removeprefix(old)] = weights.pop(name)


def change_weights(folder: Path, change) -> None:
    """Have `change` edit the dict of stored weights."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def make_sequences(lengths=(5, 40, 1, 17, 90)) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, 97, length).astype(np.int32) for length in lengths]


def plain_residuals(folder: Path, layers, sequences) -> list[list[np.ndarray]]:
    """The residual stream after `layers`, by hooks on the model of the checkpoint's own class."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()
    ends = tuple(f".{kind}.{layer}" for layer in layers for kind in ("layers", "blocks"))
    modules = [m for name, m in model.named_modules() if name.endswith(ends) and "vision" not in name]
    assert len(modules) == len(layers)
    caught: list[torch.Tensor] = []
    for module in modules:
        module.register_forward_hook(lambda _m, _i, out: caught.append(out[0] if isinstance(out, tuple) else out))
    found = []
    for token_ids in sequences:
        caught.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([token_ids.tolist()]), use_cache=False)
        found.append([(states[0] if states.dim() == 4 else states)[0].numpy() for states in caught])
    return found
