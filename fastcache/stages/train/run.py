"""The train stage: batches from the cache go into a trainer; log, checkpoints and the finished SAE go into `out`."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcache.cache_format.reader import Cache, open_cache
from fastcache.cache_format.unit_array import Rows
from fastcache.config import as_dict
from fastcache.devices import choose_device
from fastcache.errors import InputError
from fastcache.files import fingerprint, read_json_lines, write_bytes_atomic
from fastcache.interrupt import deferred_interrupt
from fastcache.progress import Progress
from fastcache.rundir import output_directory, require_space
from fastcache.sae.storage import INFO_FILE, load_sae, save_sae
from fastcache.stages.train.checkpoint import load_checkpoint, save_checkpoint
from fastcache.stages.train.config import FREE_ON_RESUME, TrainConfig
from fastcache.stages.train.stream import MixingBuffer, read_units
from fastcache.stages.train.trainer import Trainer

PAPER_TOKENS = 40_960_000
MEDIAN_UNITS = 32
SHORT_RUN_STEPS = 20_000
METRICS_FILE = "metrics.jsonl"
OWNED = ("checkpoints", "sae.*", METRICS_FILE, "evaluation.json")


def to_tensor(rows: Rows, logical_dtype: str, device: str) -> Tensor:
    """Stored rows as a float32 tensor on `device`; exact."""
    if logical_dtype == "bfloat16":
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16).to(device).float()
    return torch.from_numpy(rows).to(device).float()


def train(config: TrainConfig, out: Path, progress: Progress, fresh: bool = False) -> dict[str, Any]:
    """Train one SAE into `out`, or go on training it; returns its sae.json.

    Raises `InputError` for a cache that can't serve, `MismatchError` if `out` was begun otherwise, `NonFiniteError`.
    """
    cache = open_cache(config.cache)
    cache.require_complete()
    if cache.manifest.identity["corpus"]["split"] != "train":
        raise InputError(f"{config.cache} holds held-out rows, kept for evaluation. Train on a cache of --split train.")
    hook = cache.require_hook(None if config.layer is None else f"resid_post.{config.layer}")
    device = choose_device(config.device)
    n_steps = (min(cache.n_tokens, PAPER_TOKENS) if config.tokens is None else config.tokens) // config.batch_size
    if n_steps < 1:
        raise InputError(f"--tokens {config.tokens} is less than one batch of {config.batch_size}.")
    settings = {**as_dict(config), "cache_fingerprint": _fingerprint(cache, hook)}
    parameters = 2 * config.expansion * cache.d_in**2
    require_space(out, 4 * parameters * 10, "An SAE of this size with its checkpoints")
    with output_directory(out, "train", settings, OWNED, free=FREE_ON_RESUME, fresh=fresh):
        if (out / INFO_FILE).exists():
            progress.say(f"{out} is trained; nothing to do (--fresh starts over).")
            return load_sae(out)[1]
        if n_steps < SHORT_RUN_STEPS and config.lr == TrainConfig.lr:
            progress.say(
                f"Note: {n_steps:,} steps at the paper's learning rate, which is meant for 320,000, leave an undertrained SAE. "
                "Cache more tokens, or raise --lr (the demo uses 2e-3 for 600 steps)."
            )
        trainer = Trainer(config, cache.d_in, n_steps, device)
        buffer = MixingBuffer(cache, hook, config.buffer_tokens, config.batch_size, config.seed, config.on_corrupt)
        if not load_checkpoint(out, trainer, buffer):
            trainer.initialise(_median_sample(cache, hook, config.seed, device, config.on_corrupt == "skip"))
        _cut_log(out, trainer.step_number)
        _run(trainer, buffer, cache.manifest.dtype, out, progress, device)
        info = _provenance(config, cache, hook, n_steps)
        if buffer.skipped:
            info["skipped_units"] = list(buffer.skipped.values())
            progress.say(
                f"{len(buffer.skipped)} damaged units were left out; sae.json lists them. Run `fastcache verify`."
            )
        save_sae(out, trainer.sae, info)
    return info


def _median_sample(cache: Cache, hook: str, seed: int, device: str, skip: bool) -> Tensor:
    """Rows of some random units, for the geometric median."""
    n_units = min(MEDIAN_UNITS, len(cache.units()))
    units = islice(read_units(cache, hook, seed, skip=skip), n_units)
    rows = np.concatenate([read.rows.copy() for read in units if read.error is None])
    return to_tensor(rows, cache.manifest.dtype, device)


def _run(trainer: Trainer, buffer: MixingBuffer, dtype: str, out: Path, progress: Progress, device: str) -> None:
    config = trainer.config
    with (
        (out / METRICS_FILE).open("a") as log,
        progress.task(f"train {config.arch}", trainer.n_steps * config.batch_size, "tokens") as task,
        deferred_interrupt() as interrupt,
    ):
        task.advance(trainer.step_number * config.batch_size)
        while trainer.step_number < trainer.n_steps:
            x = to_tensor(buffer.next_batch()[1], dtype, device)
            figures = trainer.step(x)
            last = trainer.step_number == trainer.n_steps
            save = interrupt.requested or (trainer.step_number % config.checkpoint_every == 0 and not last)
            note = ""
            if last or trainer.step_number % config.log_every == 0:
                line = trainer.figures(x, figures)
                log.write(json.dumps(line) + "\n")
                log.flush()
                note = _note(line)
            if save:
                save_checkpoint(out, trainer, buffer)
            task.advance(len(x), note)
            if interrupt.requested:
                raise KeyboardInterrupt


def _note(line: dict[str, Any]) -> str:
    fvu = "-" if line["fvu"] is None else f"{line['fvu']:.3f}"
    return f"loss {line['loss']:.4g}  L0 {line['l0']:.1f}  FVU {fvu}  dead {line['dead_latents']}"


def _cut_log(out: Path, step_number: int) -> None:
    """Drop the lines of steps after the checkpoint: they are done again."""
    path = out / METRICS_FILE
    kept = [json.dumps(line) + "\n" for line in read_json_lines(path) if line["step"] <= step_number]
    write_bytes_atomic(path, "".join(kept).encode())


def _fingerprint(cache: Cache, hook: str) -> str:
    """What tells the rows trained on from others; layers that the cache gets later don't change it."""
    return fingerprint({**cache.manifest.identity, "hook_points": [hook]})


def _provenance(config: TrainConfig, cache: Cache, hook: str, n_steps: int) -> dict[str, Any]:
    identity = cache.manifest.identity
    return {
        "hook_point": hook,
        "model": identity["model"],
        "tokenizer": identity["tokenizer"],
        "method": identity["method"],
        "corpus": identity["corpus"],
        "cache_fingerprint": _fingerprint(cache, hook),
        "training": {**config.identity(), "steps": n_steps, "tokens": n_steps * config.batch_size},
    }
