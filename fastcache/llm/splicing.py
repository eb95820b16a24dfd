"""The whole language model, whose residual stream can be replaced on its way through."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastcache.cache_format.schema import layer_of
from fastcache.llm.backend import TokenIds
from fastcache.llm.decoder import decoder_layers, residual_stream
from fastcache.llm.loading import ModelSource, check_layers, load_config, load_language_model, quiet

ROWS_TOGETHER = 512
Replace = Callable[[Tensor], Tensor]
"""From the residual stream `[n, d_in]`, float32, to what takes its place."""


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row `[n]`, float64, of log probabilities `[n, vocabulary]`; a few rows at a time, which are wide."""
    pairs = zip(log_p.split(ROWS_TOGETHER), log_q.split(ROWS_TOGETHER), strict=True)
    return torch.cat([(p.exp() * (p - q)).sum(1).double() for p, q in pairs])


class SplicedModel:
    """Runs one sequence at a time."""

    def __init__(self, source: ModelSource, hook_points: list[str], dtype: torch.dtype, device: str) -> None:
        """Load the model; raises `ModelError`, and `InputError` for a layer out of range."""
        self._config = load_config(source)
        check_layers(self._config, hook_points, source)
        self._model: Any = load_language_model(source, dtype, device)
        self._layers = decoder_layers(self._model, self._config.num_hidden_layers)
        self._device = device

    @torch.inference_mode()
    def log_probs(self, token_ids: TokenIds, splice: tuple[str, Replace] | None = None, first: int = 0) -> Tensor:
        """Log probabilities `[n, vocabulary]`, float32, of the token after each.

        `splice`: where, and what to do there, from position `first` on.
        """
        with self._spliced(*splice, first) if splice else nullcontext():
            logits = self._model(input_ids=self._batch_of(token_ids), use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)

    @torch.inference_mode()
    def generate(
        self,
        token_ids: TokenIds,
        max_new_tokens: int,
        splice: tuple[str, Replace] | None = None,
        first: int = 0,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> TokenIds:
        """Tokens after `token_ids`, until the model ends its turn; the most likely ones, or drawn if `temperature` isn't 0."""
        ids = self._batch_of(token_ids)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        torch.manual_seed(seed)
        with quiet(), self._spliced(*splice, first) if splice else nullcontext():
            found = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **sampling
            )
        return np.asarray(found[0, ids.shape[1] :].cpu(), np.int32)

    def ends_turn(self, token: int) -> bool:
        """Whether the model stops after this token."""
        ends = self._model.generation_config.eos_token_id
        return token in (ends if isinstance(ends, list) else [ends])

    def _batch_of(self, token_ids: TokenIds) -> Tensor:
        return torch.from_numpy(token_ids.astype(np.int64))[None].to(self._device)

    def _spliced(self, hook_point: str, replace: Replace, first: int) -> RemovableHandle:
        seen = 0  # generation gives the prompt first, then token by token

        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            nonlocal seen
            states = output[0] if isinstance(output, tuple) else output
            new = states.clone()
            stream = residual_stream(new, self._config)  # a view: what is written to it is in `new`
            start = min(max(0, first - seen), stream.shape[0])
            seen += stream.shape[0]
            stream[start:] = replace(stream[start:].float()).to(states.dtype)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return self._layers[layer_of(hook_point)].register_forward_hook(hook)
