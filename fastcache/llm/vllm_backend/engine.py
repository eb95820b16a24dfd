"""Starting vLLM's engine, and hearing of its end."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

import torch

from fastcache.errors import ModelError
from fastcache.llm.loading import ModelSource

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
    # A prompt may fill the model's context: the one token more that vLLM counts is never fed back.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}


@contextmanager
def visible(devices: Sequence[str]) -> Iterator[None]:
    """Have the processes that are started see these GPUs only; vLLM takes the first ones that it sees."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    places = [torch.device(device).index or 0 for device in devices if torch.device(device).type == "cuda"]
    if places:
        seen = before.split(",") if before else [str(place) for place in range(max(places) + 1)]
        os.environ[name] = ",".join(seen[place] for place in places)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        elif places:
            del os.environ[name]


def cpu_settings(config: Any, n_layers: int, n_tokens: int) -> dict[str, Any]:
    """On a CPU vLLM asks for most of the memory, and compiles for a minute what eager torch does as fast."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    needed = 2 * n_layers * heads * width * 4 * 2 * n_tokens  # keys and values, float32, twice what is in flight
    return {"kv_cache_memory_bytes": max(needed, 2**26), "enforce_eager": True}


def start_engine(
    source: ModelSource,
    dtype: str,
    devices: Sequence[str],
    max_length: int,
    batch_tokens: int,
    settings: dict[str, Any],
    check: Callable[[Any, ModelSource], None] | None = None,
) -> Any:
    """vLLM's engine, split over `devices`, for sequences of up to `max_length` tokens; raises `ModelError`.

    `settings` are further arguments; `check` sees the model's configuration first.
    """
    shared = {
        "model": source.path,
        "revision": None if source.is_local else source.revision,
        "trust_remote_code": source.trust_remote_code,
        "dtype": dtype,
        "max_model_len": max_length + 1,
        "max_num_batched_tokens": batch_tokens,
        "tensor_parallel_size": len(devices),
        "skip_tokenizer_init": True,
        # It would leave out the tokens that two prompts share, or take what was computed with another residual stream.
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    with visible(devices):
        engine = _start({**shared, **settings}, source, check)
    _wake_at_its_end(engine.engine_core)
    return engine


def _start(settings: dict[str, Any], source: ModelSource, check: Callable[[Any, ModelSource], None] | None) -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    try:
        arguments = EngineArgs(**settings)
        if check:
            check(arguments.create_model_config(), source)
        return LLMEngine.from_engine_args(arguments)
    except (RuntimeError, ValueError, OSError, KeyError, ImportError) as error:
        if isinstance(error, ModelError):
            raise
        reason = str(error).strip().split("\n")[0][:300]
        raise ModelError(
            f"vLLM can't run model {source.name!r} ({reason}). What it printed above may say more. "
            "--backend transformers runs more models."
        ) from error


def _wake_at_its_end(client: Any) -> None:
    """vLLM sees that a killed engine is gone, but leaves those who wait for its output waiting."""
    from vllm.v1.engine.exceptions import EngineDeadError

    manager = getattr(getattr(client, "resources", None), "engine_manager", None)
    if manager is None:  # the engine is in this process
        return
    sentinels = [process.sentinel for process in manager.processes]

    def watch() -> None:
        wait(sentinels)
        client.outputs_queue.put(EngineDeadError())

    Thread(target=watch, daemon=True).start()
