"""The whole language model, whose residual stream can be replaced on its way through."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    def log_probs(self, token_ids: TokenIds, hook_point: str | None = None, replace: Replace | None = None) -> Tensor:
        """Log probabilities `[n, vocabulary]`, float32, of the token after each; `replace` is called at `hook_point`."""

        def splice(_module: Any, _inputs: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            assert replace  # noqa: S101
            new = replace(states[0].float()).to(states.dtype)[None]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = self._layers[layer_of(hook_point)].register_forward_hook(splice) if hook_point and replace else None
        try:
            ids = torch.from_numpy(token_ids.astype(np.int64))[None].to(self._device)
            logits = self._model(input_ids=ids, use_cache=False).logits[0]
        finally:
            if handle:
                handle.remove()
        return torch.log_softmax(logits.float(), dim=-1)
