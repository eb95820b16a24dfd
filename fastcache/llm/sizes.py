"""How many parameters a model has, by its configuration: no weight is read."""

from typing import Any

import torch

from fastcache.llm.decoder import checkpoint_class, cut_class
from fastcache.llm.loading import ModelSource, load_config, load_whole_config, weight_errors


def count_parameters(source: ModelSource, n_layers: int | None) -> int:
    """Parameters of the decoder cut to its first `n_layers` layers, or of the whole model."""
    model = _empty_model(source, n_layers)
    part = model if n_layers is None else model.get_submodule(model.decoder_path)
    return _n_parameters(part)


def count_by_layer(source: ModelSource) -> tuple[int, int]:
    """Parameters of what a decoder has outside its layers, and of its largest layer."""
    n_layers = load_config(source).num_hidden_layers
    model = _empty_model(source, n_layers)
    decoder = model.get_submodule(model.decoder_path)
    sizes = [_n_parameters(layer) for layer in model.get_submodule(model.layers_path)]
    return max(0, _n_parameters(decoder) - sum(sizes)), max(sizes)


def _empty_model(source: ModelSource, n_layers: int | None) -> Any:
    """The whole model, or the decoder's first `n_layers` layers in it, without memory for weights."""
    config = load_whole_config(source)
    n_all = config.get_text_config(decoder=True).num_hidden_layers
    whole = checkpoint_class(config, source.path, source.trust_remote_code)
    with weight_errors(source, "configuration"), torch.device("meta"):
        return whole(config) if n_layers is None else cut_class(whole, n_all, n_layers)(config)


def _n_parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
