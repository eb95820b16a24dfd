"""SAELens' cache runner over tokens in a file; run by bench_extract.py in an environment of its own.

    python saelens_cache.py CLASS MODEL TOKENS.npy LAYER CONTEXT THREADS

CLASS is HookedTransformer, SAELens' default: of the model's shape, with weights of its own, since TransformerLens loads
models that it knows by name only; it stops after the layer. Or AutoModelForCausalLM: the model itself, run to its end.
Prints versions, then for each line of standard input the wall and CPU seconds of one run, model loading left out.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import sae_lens
import torch
import transformers
from datasets import Dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig

BATCH = 1  # blocks of a batch
HOOKS = {"HookedTransformer": "blocks.{}.hook_resid_post", "AutoModelForCausalLM": "model.layers.{}"}


def hooked_transformer(settings: dict, context: int) -> HookedTransformer:
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    shape = {"d_model": hidden, "n_heads": heads, "d_head": hidden // heads, "rotary_dim": hidden // heads}
    kinds = {"act_fn": "silu", "normalization_type": "RMS", "positional_embedding_type": "rotary"}
    config = HookedTransformerConfig(
        n_layers=settings["num_hidden_layers"], n_ctx=context, d_mlp=settings["intermediate_size"], gated_mlp=True,
        d_vocab=settings["vocab_size"], n_key_value_heads=settings["num_key_value_heads"], device="cpu", **shape, **kinds,
    )  # fmt: skip
    return HookedTransformer(config).eval()


def main() -> None:
    kind, model, tokens_file = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    layer, context, threads = map(int, sys.argv[4:])
    torch.set_num_threads(threads)
    settings = json.loads((model / "config.json").read_text())
    blocks = np.load(tokens_file).reshape(-1, context)
    dataset = Dataset.from_dict({"tokens": blocks.tolist()})
    n_bytes = 4 * settings["hidden_size"] * context

    def make_runner(out: str) -> CacheActivationsRunner:
        config = CacheActivationsRunnerConfig(
            dataset_path="none", model_name=str(model), model_batch_size=BATCH, d_in=settings["hidden_size"],
            hook_name=HOOKS[kind].format(layer), training_tokens=blocks.size,
            context_size=context, model_class_name=kind, new_cached_activations_path=out,
            shuffle=False, device="cpu", streaming=False, prepend_bos=False,
            buffer_size_gb=len(blocks) * n_bytes * 1.001 / 1e9,  # one shard: its default is 2 GB
        )  # fmt: skip
        if kind == "AutoModelForCausalLM":
            return CacheActivationsRunner(config, override_dataset=dataset)
        with patch("sae_lens.cache_activations_runner.load_model", lambda **_: hooked_transformer(settings, context)):
            return CacheActivationsRunner(config, override_dataset=dataset)

    print(json.dumps({"sae-lens": sae_lens.__version__, "transformers": transformers.__version__}), flush=True)
    for _ in sys.stdin:
        with tempfile.TemporaryDirectory() as out:
            runner = make_runner(out)
            wall, cpu = time.perf_counter(), time.process_time()
            rows = runner.run()
            seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            assert len(rows) == len(blocks), f"{len(rows)} rows for {len(blocks)} blocks"
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    # The model has no tokenizer: its tokens come ready.
    with patch("transformers.AutoTokenizer.from_pretrained"), torch.no_grad():
        main()
