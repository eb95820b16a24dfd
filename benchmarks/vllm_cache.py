"""vLLM over instances in a file, with and without our capture; run by bench_extract.py in an environment that has vLLM.

    python vllm_cache.py MODEL INSTANCES.npz LAYER

Prints versions, then for each line of standard input, `capture` or `plain`, the wall and CPU seconds of one run, the
processes of the engine included and its start left out. `capture` is what `extract --backend vllm` does with a unit,
writing included; `plain` is vLLM's own `LLM.generate` with the same model, cut after the same layer.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import psutil
import vllm
from extract_candidates import BLOCK, write
from vllm import LLM, SamplingParams

from fastcache.cache_format.schema import hook_point
from fastcache.llm.loading import ModelSource, cut_layers, load_config
from fastcache.llm.vllm_backend.backend import VllmBackend
from fastcache.llm.vllm_backend.engine import cpu_settings
from fastcache.llm.vllm_backend.loader import LOAD_FORMAT


def cpu_seconds() -> float:
    """Of this process and all below it."""
    mine = psutil.Process()
    times = [process.cpu_times() for process in [mine, *mine.children(recursive=True)]]
    return sum(each.user + each.system for each in times)


def plain_engine(model: str, layer: int) -> LLM:
    config = load_config(ModelSource(model))
    return LLM(
        model, dtype="float32", hf_overrides=partial(cut_layers, n_layers=layer + 1), load_format=LOAD_FORMAT,
        skip_tokenizer_init=True, enable_prefix_caching=False, max_model_len=BLOCK + 1, max_num_batched_tokens=BLOCK,
        **cpu_settings(config, layer + 1, 2 * BLOCK),
    )  # fmt: skip


def main() -> None:
    model, layer = sys.argv[1], int(sys.argv[3])
    with np.load(sys.argv[2]) as stored:
        instances = [stored[name] for name in stored.files]
    backend = VllmBackend(ModelSource(model), [hook_point(layer)], "float32", ["cpu"], BLOCK, BLOCK)
    engine = plain_engine(model, layer)
    prompts = [{"prompt_token_ids": ids.tolist()} for ids in instances]
    parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    hidden = load_config(ModelSource(model)).hidden_size
    works = {
        "capture": lambda: write(backend, hidden, instances),
        "plain": lambda: engine.generate(prompts, parameters, use_tqdm=False),
    }
    print(json.dumps({"vllm": vllm.__version__}), flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), cpu_seconds()
        works[line.strip()]()
        seconds = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}
        print(json.dumps(seconds), flush=True)
    backend.close()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
