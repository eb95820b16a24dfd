"""A vLLM load format that reads the weights of a model's first layers only.

vLLM's own loader stops at a weight whose layer the shortened configuration no longer has.
"""

import copy
import re
from collections.abc import Generator
from typing import Any

from torch import Tensor
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

LOAD_FORMAT = "fastcache_first_layers"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_ENCODER = re.compile(r"vision|visual|audio")


def layer_of_weight(name: str) -> int:
    """The decoder layer that a weight belongs to; -1 for weights of none."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found and not _ENCODER.search(name) else -1


@register_model_loader(LOAD_FORMAT)
class FirstLayersLoader(DefaultModelLoader):
    """Leaves out the layers that the configuration doesn't count, and files that hold nothing else."""

    def __init__(self, load_config: LoadConfig) -> None:
        """See `DefaultModelLoader`."""
        load_config = copy.copy(load_config)
        load_config.load_format = "auto"
        super().__init__(load_config)
        self._n_layers = 0

    def get_all_weights(self, model_config: ModelConfig, model: Any) -> Generator[tuple[str, Tensor], None, None]:
        """See `DefaultModelLoader`."""
        self._n_layers = model_config.get_total_num_hidden_layers()
        return super().get_all_weights(model_config, model)

    def _get_weights_iterator(self, source: Any) -> Generator[tuple[str, Tensor], None, None]:
        before = source.is_unused_weight
        source.is_unused_weight = lambda name: self._is_left_out(name) or bool(before and before(name))
        weights = super()._get_weights_iterator(source)
        return ((name, weight) for name, weight in weights if not self._is_left_out(name))

    def _is_left_out(self, name: str) -> bool:
        return layer_of_weight(name) >= self._n_layers
