"""The interpret stage: one pass over a held-out cache says what every latent is active on."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import TOKEN_SETS, token_sets
from fastcache.config import as_dict
from fastcache.devices import choose_device
from fastcache.files import fingerprint, write_bytes_atomic, write_json_atomic
from fastcache.llm.loading import ModelSource, known_model, known_tokenizer, load_language_model, place_of
from fastcache.progress import Progress
from fastcache.rundir import output_directory
from fastcache.sae.architectures import Sae
from fastcache.sae.of_cache import load_sae_of, open_held_out
from fastcache.sae.storage import sae_fingerprint
from fastcache.stages.interpret.collect import Collector
from fastcache.stages.interpret.config import FREE_ON_RESUME, InterpretConfig
from fastcache.stages.interpret.decoder import nearest_latents, promoted_tokens
from fastcache.stages.interpret.results import ABOUT_FILE, CONTEXTS_FILE, LATENTS_FILE, WINDOWS_FILE
from fastcache.stages.interpret.tables import (
    Texts,
    latent_columns,
    ranked_column,
    tokens_column,
    write_contexts,
    write_latents,
    write_windows,
)

STATE_FILE = "state.safetensors"
OWNED = (LATENTS_FILE, STATE_FILE, CONTEXTS_FILE, WINDOWS_FILE, ABOUT_FILE)
CHECKPOINT_EVERY = 500
"""Dialogues."""
PROMOTED = 10
"""Output tokens given of each latent, promoted and suppressed."""


def interpret(config: InterpretConfig, out: Path, progress: Progress, fresh: bool = False) -> None:
    """Write the tables that docs/interpret.md describes into `out`, or go on.

    Raises `InputError` for a cache of training rows or of blocks, `MismatchError` for an SAE of another model, layer or
    width, or another model.
    """
    cache = open_held_out(config.cache, "interpret", config.allow_train)
    sae, info = load_sae_of(cache, Path(config.sae))
    identity, source = cache.manifest.identity["model"], None
    if config.unembedding:
        source = known_model(identity, config.model, config.trust_remote_code, str(cache.path))
    device = choose_device(config.device)
    sources = {
        "sae_fingerprint": sae_fingerprint(Path(config.sae)),
        "cache_fingerprint": fingerprint(cache.manifest.identity),
    }
    with output_directory(out, "interpret", {**as_dict(config), **sources}, OWNED, free=FREE_ON_RESUME, fresh=fresh):
        if (out / LATENTS_FILE).exists():
            (out / STATE_FILE).unlink(missing_ok=True)  # which a run that was killed at its very end left
            progress.say(f"{out} is complete; nothing to do (--fresh starts over).")
            return
        collected = _collect(config, cache, sae.to(device), info["hook_point"], out / STATE_FILE, progress)
        tokenizer = known_tokenizer(
            identity, config.model or place_of(identity["name"], cache.path), config.trust_remote_code
        )
        if tokenizer is None:
            progress.say(
                "The model's tokenizer isn't at hand (--model says where it is): tokens are shown by their numbers."
            )
        texts = Texts(cache, tokenizer)
        progress.say("Writing contexts and latents")
        about = _about(config, cache, info, collected)
        write_json_atomic(out / ABOUT_FILE, {**about, "readable": tokenizer is not None})
        write_contexts(out / CONTEXTS_FILE, collected, texts)
        write_windows(out / WINDOWS_FILE, collected, config.window, texts)
        columns = latent_columns(collected, TOKEN_SETS)
        columns["neighbours"] = ranked_column(nearest_latents(sae.W_dec.detach(), config.neighbours))
        if source is not None:
            unembedding = _unembedding(source).to(device)
            promoted, suppressed = promoted_tokens(sae.W_dec.detach(), unembedding, PROMOTED)
            columns |= {"promoted": tokens_column(promoted, texts), "suppressed": tokens_column(suppressed, texts)}
        write_latents(out / LATENTS_FILE, columns)  # last: it says that all is there
        (out / STATE_FILE).unlink(missing_ok=True)


@torch.no_grad()
def _collect(
    config: InterpretConfig, cache: Cache, sae: Sae, hook_point: str, state: Path, progress: Progress
) -> Collector:
    device = str(sae.b_dec.device)
    n_instances = min(config.max_instances, cache.n_instances)
    collected = Collector(sae.d_sae, n_instances, len(TOKEN_SETS), config.top, config.window, config.seed, device)
    done = _load(collected, state)
    with progress.task("interpret", n_instances, "dialogues", done) as task:
        for index in range(done, n_instances):
            instance = cache.instance(index)
            acts = sae.encode(torch.from_numpy(instance.residuals(hook_point)).to(device))
            collected.add(acts, torch.from_numpy(token_sets(instance.token_types)).to(device), index)
            task.advance(1)
            if (index + 1) % CHECKPOINT_EVERY == 0 and index + 1 < n_instances:
                _save(collected, state, index + 1)
    _save(collected, state, n_instances)
    return collected


def _about(config: InterpretConfig, cache: Cache, info: dict[str, Any], collected: Collector) -> dict[str, Any]:
    """What the tables are of, for those who read them without SAE and cache."""
    return {
        "sae": {
            "name": Path(os.path.realpath(config.sae)).name,
            "fingerprint": sae_fingerprint(Path(config.sae)),
            "model": info["model"]["name"],
            "hook_point": info["hook_point"],
            "architecture": info["architecture"],
            "trained_on": info["method"]["name"],
            "d_in": info["d_in"],
            "d_sae": info["d_sae"],
        },
        "cache_fingerprint": fingerprint(cache.manifest.identity),
        "split": cache.manifest.identity["corpus"]["split"],
        "dialogues": min(config.max_instances, cache.n_instances),
        "tokens": dict(zip(TOKEN_SETS, collected.n_tokens.tolist(), strict=True)),
        "top": config.top,
        "window": config.window,
        "seed": config.seed,
    }


def _save(collected: Collector, path: Path, done: int) -> None:
    tensors = {name: value.contiguous().cpu() for name, value in collected.state().items()}
    write_bytes_atomic(path, save({**tensors, "done": torch.tensor(done)}))


def _load(collected: Collector, path: Path) -> int:
    """Go on from a checkpoint; returns how many dialogues it has seen."""
    if not path.is_file():
        return 0
    tensors = load_file(path)
    done = int(tensors.pop("done"))
    collected.load(tensors)
    return done


def _unembedding(source: ModelSource) -> torch.Tensor:
    model: Any = load_language_model(source, torch.float32, "cpu")
    return model.get_output_embeddings().weight.detach()
