"""The reference of the parity check: the plain model, float32, on the CPU, one sequence at a time.

It shares nothing with the backends that the check could miss. The whole model is loaded as users of transformers load
it (an auto class, nothing left out, no cut), with that library's own attention, and hooks on its decoder layers read
the residual stream. Where the whole float32 model doesn't fit into memory, its layers are read from disk one after the
other; all sequences pass a layer before the next one is read.
"""

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import nn

from fastcache.cache_format.schema import layer_of
from fastcache.llm.backend import Residuals, TokenIds
from fastcache.llm.decoder import (
    changed_class,
    decoder_layers,
    enough,
    keep_only,
    path_to,
    residual_stream,
    run_until_enough,
)
from fastcache.llm.loading import (
    WITH_REPORT,
    ModelSource,
    load_whole_config,
    loading_errors,
    require_complete,
    weight_errors,
)


class Reference:
    """Computes the residuals of sequences with the plain model."""

    def __init__(self, source: ModelSource, hook_points: Sequence[str], by_layer: bool = False) -> None:
        """Load the model, or with `by_layer` only what is outside its layers; raises `ModelError`."""
        config = load_whole_config(source)
        self._text = config.get_text_config(decoder=True)
        n_layers = self._text.num_hidden_layers
        self._in_step = _InStep(source, config) if by_layer else None
        self._model: Any = self._in_step.skeleton() if self._in_step else _load(_auto_class(config), source, n_layers)
        self._captured = threading.local()
        layers = decoder_layers(self._model, n_layers)
        for hook in hook_points:
            layers[layer_of(hook)].register_forward_hook(self._capture(hook))
        layers[max(map(layer_of, hook_points))].register_forward_hook(enough)

    def residuals(self, sequences: Sequence[TokenIds]) -> Iterator[Residuals]:
        """The residuals of each sequence, in order; raises `ModelError` for a model without one residual stream."""
        if self._in_step is None:
            return map(self._run, sequences)
        return iter(self._in_step.run(self._run, sequences))

    @torch.inference_mode()
    def _run(self, token_ids: TokenIds) -> Residuals:
        self._captured.residuals = {}
        ids = torch.from_numpy(token_ids.astype(np.int64))[None]
        run_until_enough(self._model, input_ids=ids, use_cache=False)
        residuals: Residuals = self._captured.residuals
        return residuals

    def _capture(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._captured.residuals[name] = residual_stream(output, self._text).numpy()

        return hook


def _auto_class(config: Any) -> Any:
    """The auto class with which users load a model of this configuration."""
    import transformers

    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return transformers.AutoModelForImageTextToText
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if has_code or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _load(model_class: Any, source: ModelSource, n_layers: int, **keywords: Any) -> Any:
    """The float32 model; raises `ModelError` if a weight of its decoder is missing. Its other parts aren't run."""
    with weight_errors(source, "weights"):
        model, report = model_class.from_pretrained(
            source.path, dtype=torch.float32, **WITH_REPORT, **source.keywords(), **keywords
        )
    path = path_to(model, decoder_layers(model, n_layers))
    missing = {name for name in report["missing_keys"] if name.startswith(path)}
    require_complete({**report, "missing_keys": missing}, source)
    return model.eval()


class _LayerFromDisk(nn.Module):
    """Stands in the place of a decoder layer, and has its attributes but none of its weights."""

    def __init__(self, layer: nn.Module, fetch: Callable[[], "_LoadedLayer"]) -> None:
        super().__init__()
        object.__setattr__(self, "_outline", layer)  # not as a submodule: its weights aren't to be loaded
        self._fetch = fetch

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_outline"], name)

    def forward(self, *given: Any, **keywords: Any) -> Any:
        loaded = self._fetch()
        with loaded.turn:  # one sequence at a time: their working memory isn't to add up
            return loaded.layer(*given, **keywords)


class _LoadedLayer:
    """The layer that all sequences pass at the moment."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.turn = threading.Lock()


class _InStep:
    """Runs several sequences layer by layer: a layer is read when all of them have reached it."""

    def __init__(self, source: ModelSource, config: Any) -> None:
        self._source, self._config = source, config
        self._n_layers = config.get_text_config(decoder=True).num_hidden_layers
        with loading_errors(source, "configuration"), torch.device("meta"):
            outline = _auto_class(config).from_config(config, trust_remote_code=source.trust_remote_code)
        self._class = type(outline)
        self._loaded: _LoadedLayer | None = None
        self._next = 0
        self._barrier = threading.Barrier(1)

    def skeleton(self) -> Any:
        """The model with stand-ins for its layers: embeddings and all else that runs before or beside them."""

        def change(model: Any) -> None:
            layers = decoder_layers(model, self._n_layers)
            for index, layer in enumerate(layers):
                layers[index] = _LayerFromDisk(layer, self._fetch)
            keep_only(model, set(model.get_submodule(path_to(model, layers)).modules()))

        return _load(changed_class(self._class, change), self._source, self._n_layers, config=self._config)

    def run(self, run: Callable[[TokenIds], Residuals], sequences: Sequence[TokenIds]) -> list[Residuals]:
        """What `run` returns for each sequence."""
        self._next, self._barrier = 0, threading.Barrier(len(sequences), action=self._read_next)

        def run_or_abort(token_ids: TokenIds) -> Residuals:
            try:
                return run(token_ids)
            except BaseException:
                self._barrier.abort()  # the others would wait for this sequence for ever
                raise

        with ThreadPoolExecutor(len(sequences)) as pool:
            futures = [pool.submit(run_or_abort, token_ids) for token_ids in sequences]
        self._loaded = None
        errors = [error for future in futures if (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]

    def _fetch(self) -> _LoadedLayer:
        self._barrier.wait()
        assert self._loaded is not None  # noqa: S101
        return self._loaded

    def _read_next(self) -> None:
        self._loaded = None
        gc.collect()  # models refer to themselves
        number = self._next

        def change(model: Any) -> None:
            keep_only(model, set(decoder_layers(model, self._n_layers)[number].modules()))

        model = _load(changed_class(self._class, change), self._source, self._n_layers, config=self._config)
        self._loaded = _LoadedLayer(decoder_layers(model, self._n_layers)[number])
        self._next += 1
