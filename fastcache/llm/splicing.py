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
from fastcache.llm.loading import ModelSource, check_layers, decoder_layers, load_config, load_language_model

Replace = Callable[[Tensor], Tensor]
"""From the residual stream `[n, d_in]`, float32, to what takes its place."""


class SplicedModel:
    """Runs one sequence at a time."""

    def __init__(self, source: ModelSource, hook_points: list[str], dtype: torch.dtype, device: str) -> None:
        """Load the model; raises `ModelError`, and `InputError` for a layer out of range."""
        config = load_config(source)
        check_layers(config, hook_points, source)
        self._model: Any = load_language_model(source, dtype, device)
        self._layers = decoder_layers(self._model, config.num_hidden_layers)
        self._device = device

    @torch.inference_mode()
    def log_probs(self, token_ids: TokenIds, splice: tuple[str, Replace] | None = None) -> Tensor:
        """Log probabilities `[n, vocabulary]`, float32, of the token after each; `splice`: where, and what to do there."""
        ids = torch.from_numpy(token_ids.astype(np.int64))[None].to(self._device)
        with self._spliced(*splice) if splice else nullcontext():
            logits = self._model(input_ids=ids, use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), dim=-1)

    def _spliced(self, hook_point: str, replace: Replace) -> RemovableHandle:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            new = replace(states[0].float()).to(states.dtype)[None]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return self._layers[layer_of(hook_point)].register_forward_hook(hook)
