"""The folder that SAELens 6 loads: `cfg.json` and `sae_weights.safetensors`.

What it would drop or ignore in silence is avoided: metadata without `sae_lens_version` of 6 is dropped, so that stands there;
an activation scale is ignored, and our SAEs have theirs folded in. The input isn't centred (`apply_b_dec_to_input`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcache.cache_format.schema import layer_of
from fastcache.origins import model_title
from fastcache.sae.architectures import BatchTopKSae, GatedSae, JumpReluSae, Sae, TopKSae

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"
"""The version that the tests load these folders with."""
UNIT_TOLERANCE = 1e-5


def unit_rows(sae: Sae) -> tuple[Tensor, Tensor]:
    """The decoder with rows of norm 1, as SAEBench wants it, and what latents have to be multiplied with `[d_sae]`.

    Rows that have norm 1 but for rounding, or are zero, are left as they are; so are all of a TopK SAE, as longer rows would
    change which latents are the largest.
    """
    norms = sae.W_dec.norm(dim=1)
    is_unit = (norms - 1).abs() < UNIT_TOLERANCE
    norms = torch.where(is_unit | (norms == 0), torch.ones_like(norms), norms)
    return (sae.W_dec, torch.ones_like(norms)) if isinstance(sae, TopKSae) else (sae.W_dec / norms[:, None], norms)


def weights(sae: Sae) -> tuple[str, dict[str, Tensor]]:
    """SAELens's architecture for `sae`, and its tensors by SAELens's names."""
    W_dec, norms = unit_rows(sae)
    tensors = {"W_enc": sae.W_enc * norms, "W_dec": W_dec, "b_dec": sae.b_dec}
    if isinstance(sae, GatedSae):
        return "gated", {**tensors, "b_gate": sae.b_gate * norms, "b_mag": sae.b_mag * norms, "r_mag": sae.r_mag}
    tensors["b_enc"] = sae.b_enc * norms
    if isinstance(sae, (JumpReluSae, BatchTopKSae)):
        return "jumprelu", {**tensors, "threshold": (sae.threshold * norms).float()}
    return ("topk" if isinstance(sae, TopKSae) else "standard"), tensors


def config(sae: Sae, architecture: str, info: dict[str, Any], sources: Sequence[str] = ()) -> dict[str, Any]:
    """What stands in cfg.json; `info` is the SAE's sae.json, `sources` are the data sets that it was trained on."""
    layer, method = layer_of(info["hook_point"]), info["method"]
    metadata = {
        "sae_lens_version": SAELENS_VERSION,
        "sae_lens_training_version": None,
        "model_name": model_title(info["model"]["name"]),
        "model_class_name": "HookedTransformer",
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "hf_hook_name": f"model.layers.{layer}",
        "hook_head_index": None,
        "context_size": method.get("max_length") or method.get("block_size"),
        "prepend_bos": False,
        "seqpos_slice": [None],
        "exclude_special_tokens": False,
        "dataset_path": ", ".join(sources) or None,
        "fastcache_corpus_fingerprint": info["corpus"]["fingerprint"],
        "neuronpedia_id": None,
        "model_from_pretrained_kwargs": {},
        "training_architecture": f"fastcache-{sae.architecture}",
    }
    shape = {"architecture": architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "dtype": "float32", "device": "cpu"}
    more = {"k": sae.k, "rescale_acts_by_decoder_norm": False} if isinstance(sae, TopKSae) else {}
    input_config = {"apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none"}
    return {**shape, **input_config, **more, "metadata": metadata}
