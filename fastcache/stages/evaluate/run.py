"""The evaluate stage: one pass over a held-out cache measures any number of SAEs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcache.cache_format.reader import Cache, CachedInstance
from fastcache.cache_format.schema import TOKEN_SETS, token_sets
from fastcache.devices import choose_device
from fastcache.errors import InputError
from fastcache.extras import require_packages
from fastcache.files import fingerprint, write_json_atomic
from fastcache.llm.loading import ModelSource, known_model
from fastcache.llm.splicing import SplicedModel
from fastcache.llm.transformers_backend import DTYPES
from fastcache.llm.vllm_backend.splicing import SplicedEngine
from fastcache.progress import Progress
from fastcache.sae.architectures import Sae
from fastcache.sae.metrics import Metrics
from fastcache.sae.of_cache import load_sae_of, open_held_out
from fastcache.sae.spread import Spread
from fastcache.sae.storage import sae_fingerprint
from fastcache.stages.evaluate.config import EvaluateConfig
from fastcache.stages.evaluate.earlier import EVALUATION_FILE, with_earlier
from fastcache.stages.evaluate.with_model import Spliced, measure, measure_in_engine, result_of

BATCH_TOKENS = 8192


@dataclass
class _Candidate:
    """One SAE being measured."""

    folder: Path
    sae: Sae
    info: dict[str, Any]
    fingerprint: str
    metrics: Metrics


def evaluate(config: EvaluateConfig, progress: Progress) -> list[dict[str, Any]]:
    """Measure the SAEs; writes `evaluation.json` into each one's folder and returns them.

    Raises `InputError` for a cache of training rows or of blocks, `MismatchError` for an SAE of another model, layer or
    width.
    """
    cache = open_held_out(config.cache, "eval", config.allow_train)
    device = choose_device(config.device)
    spreads: dict[str, Spread] = {}
    candidates = [_load(Path(folder), cache, device, spreads) for folder in config.sae]
    if config.with_model and config.model_backend == "vllm":
        require_packages("--model-backend vllm", "vllm", "vllm")
    identity, source = cache.manifest.identity["model"], None
    if config.with_model:
        source = known_model(identity, config.model, config.trust_remote_code, str(cache.path))
    n_instances = min(config.max_instances, cache.n_instances)
    with progress.task("evaluate", n_instances, "dialogues") as task:
        for batch in _batches(cache, n_instances):
            masks, dialogues = _token_sets(batch)
            masks, dialogues = masks.to(device), dialogues.to(device)
            for hook, spread in sorted(spreads.items()):
                x = torch.from_numpy(cache.residuals(hook, batch[0].rows.start, batch[-1].rows.stop)).to(device)
                spread.update(x, masks, dialogues)
                for candidate in (c for c in candidates if c.info["hook_point"] == hook):
                    candidate.metrics.update(candidate.sae, x, masks, dialogues)
            task.advance(len(batch))
    means = {hook: spread.mean() for hook, spread in spreads.items()}
    spliced: list[dict[str, Any] | None] = [None] * len(candidates)
    if source:
        spliced = [*_with_model(config, source, cache, candidates, means, device, progress)]
    results = []
    for candidate, with_model in zip(candidates, spliced, strict=True):
        result = with_earlier(candidate.folder, _result(candidate, cache, n_instances, with_model), progress)
        write_json_atomic(candidate.folder / EVALUATION_FILE, result)
        results.append(result)
    return results


def _with_model(
    config: EvaluateConfig,
    source: ModelSource,
    cache: Cache,
    candidates: list[_Candidate],
    means: dict[str, Tensor],
    device: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The figures of `with_model.py` for each candidate; `means` `[d_in]` by hook point."""
    saes = [Spliced(candidate.folder, candidate.sae, candidate.info["hook_point"]) for candidate in candidates]
    instances = [cache.instance(index) for index in range(min(config.model_instances, cache.n_instances))]
    instances = [instance for instance in instances if len(instance) > 1]  # of one token nothing is predicted
    if not instances:
        raise InputError(f"--with-model needs dialogues of two tokens or more, and {cache.path} begins with none.")
    if config.model_backend == "vllm":
        longest = max(map(len, instances))
        for candidate in candidates:
            candidate.sae.cpu()  # vLLM wants the device's memory, and loads the SAEs itself
        engine = SplicedEngine(source, sorted(means), config.model_dtype, device, longest)
        try:
            measure_in_engine(saes, engine, means, instances, progress)
        finally:
            engine.close()
    else:
        model = SplicedModel(source, sorted(means), DTYPES[config.model_dtype], device)
        measure(saes, model, means, instances, progress)
    how = {"model_dtype": config.model_dtype, "model_backend": config.model_backend}
    return [{**how, **result_of(spliced, TOKEN_SETS)} for spliced in saes]


def _load(folder: Path, cache: Cache, device: str, spreads: dict[str, Spread]) -> _Candidate:
    """SAEs of one hook point share its entry of `spreads`, which is made for the first of them."""
    sae, info = load_sae_of(cache, folder)
    spread = spreads.setdefault(info["hook_point"], Spread(len(TOKEN_SETS), sae.d_in, device))
    metrics = Metrics(TOKEN_SETS, sae.d_in, sae.d_sae, device, spread)
    return _Candidate(folder, sae.to(device), info, sae_fingerprint(folder), metrics)


def _batches(cache: Cache, n_instances: int) -> Iterator[list[CachedInstance]]:
    """Whole dialogues, about `BATCH_TOKENS` tokens at a time."""
    batch: list[CachedInstance] = []
    for index in range(n_instances):
        batch.append(cache.instance(index))
        if sum(map(len, batch)) >= BATCH_TOKENS:
            yield batch
            batch = []
    if batch:
        yield batch


def _token_sets(batch: list[CachedInstance]) -> tuple[Tensor, Tensor]:
    """Masks bool `[sets, n]` of `TOKEN_SETS`, and dialogue numbers `[n]`, of the tokens of a batch."""
    types = np.concatenate([instance.token_types for instance in batch])
    lengths = torch.tensor([len(instance) for instance in batch])
    return torch.from_numpy(token_sets(types)), torch.repeat_interleave(lengths)


def _result(candidate: _Candidate, cache: Cache, n_instances: int, with_model: dict[str, Any] | None) -> dict[str, Any]:
    """What stands in evaluation.json."""
    identity = cache.manifest.identity
    return {
        "sae": str(candidate.folder),
        "sae_fingerprint": candidate.fingerprint,
        "architecture": candidate.sae.architecture,
        "hook_point": candidate.info["hook_point"],
        "trained_on": candidate.info["method"]["name"],
        "training": candidate.info["training"],
        "held_out": {
            "cache": str(cache.path),
            "fingerprint": fingerprint({**identity, "hook_points": []}),  # layers may be added to a cache
            "split": identity["corpus"]["split"],
            "dialogues": n_instances,
        },
        **candidate.metrics.result(),
        **({"with_model": with_model} if with_model else {}),
    }
