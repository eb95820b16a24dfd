"""What has the model speak: transformers, to a prompt at a time, or vLLM, to all of them together."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fastcache.devices import default_dtype
from fastcache.llm.backend import TokenIds
from fastcache.llm.loading import ModelSource
from fastcache.llm.splicing import Replace, SplicedModel
from fastcache.llm.transformers_backend import DTYPES
from fastcache.llm.vllm_backend.splicing import Splice, SplicedEngine
from fastcache.sae.architectures import Sae
from fastcache.stages.steer.config import Setting, SteerConfig
from fastcache.stages.steer.interventions import make, make_in_worker
from fastcache.stages.steer.measures import mean_kl


class Said(NamedTuple):
    """What was said to a prompt."""

    place: int
    """Of the prompt, among those that were given."""
    token_ids: TokenIds
    ended: bool
    """Whether the model ended its turn."""
    kl: float | None
    """From the model by itself, on the same tokens; None where there are no whole distributions to take it from."""


class Generator(Protocol):
    """A loaded model."""

    def __call__(self, prompts: Sequence[TokenIds], setting: Setting) -> Iterator[Said]:
        """What is said to each prompt, in the order in which it is done."""

    def close(self) -> None:
        """Let go of the model."""


def open_generator(
    config: SteerConfig, sae: Sae, hook_point: str, source: ModelSource, device: str, prompts: Sequence[TokenIds]
) -> Generator:
    """Load the model, for these prompts; raises `ModelError` for one that can't be loaded, or not for them."""
    dtype = config.model_dtype or default_dtype(device)
    if config.backend == "vllm":
        longest = max(map(len, prompts)) + config.max_new_tokens - 1  # the last token is never fed back
        engine = SplicedEngine(source, [hook_point], dtype, device, longest, len(prompts))
        return VllmGenerator(config, hook_point, engine)
    model = SplicedModel(source, [hook_point], DTYPES[dtype], device)
    return TransformersGenerator(config, sae.to(device), hook_point, model)


class TransformersGenerator:
    """Speaks to one prompt after the other, and gives KL."""

    def __init__(self, config: SteerConfig, sae: Sae, hook_point: str, model: SplicedModel) -> None:
        self._config, self._sae, self._hook_point, self._model = config, sae, hook_point, model

    def __call__(self, prompts: Sequence[TokenIds], setting: Setting) -> Iterator[Said]:
        """What is said to each prompt, in order."""
        config, splice = self._config, None
        if setting.latents:
            splice = self._hook_point, make(self._sae, config.mode, setting.latents, setting.alpha or 0.0)
        for place, ids in enumerate(prompts):
            first = 0 if config.positions == "all" else len(ids)
            said = self._model.generate(ids, config.max_new_tokens, splice, first, config.temperature, config.seed)
            ended = bool(len(said)) and self._model.ends_turn(int(said[-1]))
            yield Said(place, said, ended, self._kl(ids, said, splice, first))

    def _kl(self, ids: TokenIds, said: TokenIds, splice: tuple[str, Replace] | None, first: int) -> float:
        both, where = np.concatenate([ids, said]), slice(len(ids) - 1, len(ids) + len(said) - 1)
        plain = self._model.log_probs(both)[where]
        changed = self._model.log_probs(both, splice, first)[where] if splice else plain
        return mean_kl(changed, plain)

    def close(self) -> None:
        """Nothing: the model goes with its last reader."""


class VllmGenerator:
    """Speaks to all prompts at a time; its worker loads the SAE itself."""

    def __init__(self, config: SteerConfig, hook_point: str, engine: SplicedEngine) -> None:
        self._config, self._hook_point, self._engine = config, hook_point, engine

    def __call__(self, prompts: Sequence[TokenIds], setting: Setting) -> Iterator[Said]:
        """What is said to each prompt, the first to end first; without KL."""
        config, splice = self._config, None
        if setting.latents:
            latents, alpha = list(setting.latents), setting.alpha or 0.0
            argument = {"sae": str(Path(config.sae)), "mode": config.mode, "latents": latents, "alpha": alpha}
            splice = Splice(self._hook_point, make_in_worker, argument, config.positions == "generated")
        found = self._engine.generate(prompts, config.max_new_tokens, splice, config.temperature, config.seed)
        for place, said, ended in found:
            yield Said(place, said, ended, None)

    def close(self) -> None:
        """End vLLM's engine."""
        self._engine.close()
