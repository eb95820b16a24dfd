"""The whole model in vLLM's engine, whose residual stream can be replaced: many sequences at a time."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.schema import layer_of
from fastcache.errors import ModelError
from fastcache.llm.backend import TokenIds, default_pack_tokens
from fastcache.llm.loading import ModelSource, check_layers, load_config
from fastcache.llm.splicing import Replace
from fastcache.llm.vllm_backend.engine import cpu_settings, start_engine

Losses = list[npt.NDArray[np.float64]]
MOST_TOGETHER = 64
"""Sequences for which a CPU's memory is set aside while they are generated; more wait, or are begun again."""


class Splice(NamedTuple):
    """What takes the stream's place, and where. The worker, another process, makes it."""

    hook_point: str
    maker: Callable[[Any, str], Replace]
    """A function of a module, of `argument` and the worker's device."""
    argument: str | list[float] | dict[str, Any]
    """Words and numbers alone."""
    generated_only: bool = False
    """Whether prompts stay as they are."""


class SplicedEngine:
    """One replacement at a time, over all sequences; see `SplicedModel` for one sequence at a time."""

    def __init__(
        self,
        source: ModelSource,
        hook_points: list[str],
        dtype: str,
        device: str,
        max_length: int,
        together: int = 1,
    ) -> None:
        """Start the engine for sequences of up to `max_length` tokens, `together` of which are generated at a time.

        Raises `ModelError`, also where the model knows no such positions, and `InputError` for a layer out of range.
        """
        config = load_config(source)
        check_layers(config, hook_points, source)
        batch_tokens = default_pack_tokens("vllm", device)
        settings = {
            "worker_cls": "fastcache.llm.vllm_backend.splice_worker.SpliceWorker",
            "enforce_eager": True,  # hooks aren't in compiled graphs
        }
        if not device.startswith("cuda"):
            n_tokens = max(batch_tokens + max_length, min(together, MOST_TOGETHER) * max_length)
            settings |= cpu_settings(config, config.num_hidden_layers, n_tokens)
        # The other runner keeps from its worker which rows of a batch are of which request until it has run.
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")

        def check(model_config: Any, source: ModelSource) -> None:
            _require_positions(model_config, source, max_length)

        self._engine = start_engine(source, dtype, [device], max_length, batch_tokens, settings, check)
        self._n_requests = 0

    def losses(self, sequences: Sequence[TokenIds], splice: Splice | None = None) -> Losses:
        """Next-token cross entropies `[n - 1]` of each sequence, in nats."""
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=0)
        found = {place: _losses(output) for place, output in self._run(sequences, parameters, splice)}
        return [found[place] for place in range(len(sequences))]

    def generate(
        self,
        sequences: Sequence[TokenIds],
        max_new_tokens: int,
        splice: Splice | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[tuple[int, TokenIds, bool]]:
        """Tokens after each sequence, and whether the model ended its turn, with the sequence's place, the first to end first.

        The most likely tokens, or drawn if `temperature` isn't 0; each sequence begins with the seed.
        """
        from vllm import SamplingParams

        # transformers takes the penalty from the model's files as well
        penalty = self._engine.model_config.get_diff_sampling_param().get("repetition_penalty", 1.0)
        parameters = SamplingParams(
            max_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            repetition_penalty=penalty,
            detokenize=False,
        )
        for place, output in self._run(sequences, parameters, splice):
            said = output.outputs[0]
            yield place, np.asarray(said.token_ids, np.int32), said.finish_reason == "stop"

    def _run(self, sequences: Sequence[TokenIds], parameters: Any, splice: Splice | None) -> Iterator[tuple[int, Any]]:
        """What vLLM gives for each sequence, with its place, as it is done."""
        from vllm.v1.engine.exceptions import EngineDeadError

        place_of: dict[str, int] = {}
        try:
            self._splice(splice)
            for place, token_ids in enumerate(sequences):
                name = str(self._n_requests)
                self._engine.add_request(name, {"prompt_token_ids": token_ids.tolist()}, parameters)
                place_of[name] = place
                self._n_requests += 1
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    if output.finished:
                        yield place_of[output.request_id], output
        except EngineDeadError as error:
            raise ModelError(
                "vLLM's engine ended while it worked, perhaps for want of memory. What it printed above may say more; the "
                "transformers backend needs less."
            ) from error

    def _splice(self, splice: Splice | None) -> None:
        if splice is None:
            self._engine.collective_rpc("fastcache_splice")
            return
        maker = f"{splice.maker.__module__}:{splice.maker.__qualname__}"
        arguments = layer_of(splice.hook_point), maker, splice.argument, splice.generated_only
        self._engine.collective_rpc("fastcache_splice", args=arguments)

    def close(self) -> None:
        """End the engine."""
        self._engine.engine_core.shutdown(timeout=0)


def _losses(output: Any) -> npt.NDArray[np.float64]:
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return np.array([-of_token[token].logprob for token, of_token in pairs], np.float64)


def _require_positions(model_config: Any, source: ModelSource, length: int) -> None:
    """Raise `ModelError` for sequences that are longer than the model's context: vLLM has no positions beyond it."""
    limit = model_config.get_and_verify_max_len(None)
    if length > limit:
        raise ModelError(
            f"vLLM runs {source.name!r} on up to {limit:,} tokens, and a sequence, with what is to be generated, takes "
            f"{length:,}. Shorten it, or use the transformers backend."
        )
