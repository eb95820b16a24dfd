"""The whole model in vLLM's engine, whose residual stream can be replaced: next-token losses of many sequences at a time."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.schema import layer_of
from fastcache.llm.backend import TokenIds, default_pack_tokens
from fastcache.llm.loading import ModelSource, check_layers, load_config
from fastcache.llm.splicing import Replace
from fastcache.llm.vllm_backend.engine import cpu_settings, start_engine

Losses = list[npt.NDArray[np.float64]]


class Splice(NamedTuple):
    """What takes the stream's place, and where. The worker, another process, makes it."""

    hook_point: str
    maker: Callable[[Any, str], Replace]
    """A function of a module, of `argument` and the worker's device."""
    argument: str | list[float]


class SplicedEngine:
    """One replacement at a time, over all sequences; see `SplicedModel` for one sequence at a time."""

    def __init__(self, source: ModelSource, hook_points: list[str], dtype: str, device: str, max_length: int) -> None:
        """Start the engine for sequences of up to `max_length` tokens; raises `ModelError`, and `InputError` for a layer."""
        config = load_config(source)
        check_layers(config, hook_points, source)
        batch_tokens = default_pack_tokens("vllm", device)
        settings = {
            "worker_cls": "fastcache.llm.vllm_backend.splice_worker.SpliceWorker",
            "enforce_eager": True,  # hooks aren't in compiled graphs
        }
        if not device.startswith("cuda"):
            settings |= cpu_settings(config, config.num_hidden_layers, batch_tokens + max_length)
        self._engine = start_engine(source, dtype, [device], max_length, batch_tokens, settings)
        self._n_requests = 0

    def losses(self, sequences: Sequence[TokenIds], splice: Splice | None = None) -> Losses:
        """Next-token cross entropies `[n - 1]` of each sequence, in nats."""
        from vllm import SamplingParams

        layer = layer_of(splice.hook_point) if splice else 0
        maker = f"{splice.maker.__module__}:{splice.maker.__qualname__}" if splice else None
        self._engine.collective_rpc("fastcache_splice", args=(layer, maker, splice.argument if splice else None))
        parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=0)
        first = self._n_requests
        for token_ids in sequences:
            prompt = {"prompt_token_ids": token_ids.tolist()}
            self._engine.add_request(str(self._n_requests), prompt, parameters)
            self._n_requests += 1
        found: dict[int, npt.NDArray[np.float64]] = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    found[int(output.request_id)] = _losses(output)
        return [found[first + place] for place in range(len(sequences))]

    def close(self) -> None:
        """End the engine."""
        self._engine.engine_core.shutdown(timeout=0)


def _losses(output: Any) -> npt.NDArray[np.float64]:
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return np.array([-of_token[token].logprob for token, of_token in pairs], np.float64)
