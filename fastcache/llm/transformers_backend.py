"""Residuals through transformers: one sequence at a time, so nothing but its own tokens can touch it.

No padding, no batching, no KV cache: each value is what a plain forward pass of that sequence gives. The residual
stream is taken by a hook on the decoder layer: `output_hidden_states` of a model that was cut at that layer would give
the tensor after the final norm instead.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fastcache.cache_format.schema import layer_of
from fastcache.llm.backend import Residuals, TokenIds
from fastcache.llm.loading import ModelSource, check_layers, decoder_layers, load_base_model, load_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class TransformersBackend:
    """A model cut after its deepest captured layer."""

    def __init__(self, source: ModelSource, hook_points: Sequence[str], dtype: str, device: str) -> None:
        """Load the model; raises `ModelError` or, for a layer out of range, `InputError`."""
        check_layers(load_config(source), list(hook_points), source)
        self.hook_points = list(hook_points)
        self.device = device
        n_layers = max(layer_of(hook) for hook in hook_points) + 1
        self._model = load_base_model(source, n_layers, DTYPES[dtype], self.device)
        self._captured: dict[str, torch.Tensor] = {}
        layers = decoder_layers(self._model, n_layers)
        for hook in self.hook_points:
            layers[layer_of(hook)].register_forward_hook(self._capture(hook))

    def _capture(self, name: str) -> Any:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            self._captured[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def residuals(self, sequences: Iterable[TokenIds]) -> Iterator[Residuals]:
        """See `Backend`."""
        return map(self._residuals, sequences)

    @torch.inference_mode()
    def _residuals(self, token_ids: TokenIds) -> Residuals:
        self._model(input_ids=torch.from_numpy(token_ids.astype(np.int64))[None].to(self.device), use_cache=False)
        captured, self._captured = self._captured, {}
        return {name: value[0].float().cpu().numpy() for name, value in captured.items()}
