"""The train stage: batches from the cache go into a trainer; log, checkpoints and the finished SAE go into `out`."""

import json
from dataclasses import dataclass
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
from fastcache.stages.train.checkpoint import Run, load_checkpoint, save_checkpoint
from fastcache.stages.train.config import FREE_ON_RESUME, TrainConfig
from fastcache.stages.train.order import require_batch, rows_of_units
from fastcache.stages.train.recipe import FAST_PAPER, Recipe, resolve
from fastcache.stages.train.selection import Selection, select_rows
from fastcache.stages.train.stream import MixingBuffer, read_units
from fastcache.stages.train.trainer import Trainer
from fastcache.stages.train.watch import EVENTS_FILE, LossWatch

SAMPLE_UNITS, SAMPLE_ROWS = 32, 4096
SHORT_RUN_STEPS = 20_000
METRICS_FILE = "metrics.jsonl"
OWNED = ("checkpoints", "sae.*", METRICS_FILE, EVENTS_FILE, "evaluation.json")


def to_tensor(rows: Rows, logical_dtype: str, device: str) -> Tensor:
    """Stored rows as a float32 tensor on `device`; exact."""
    if logical_dtype == "bfloat16":
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16).to(device).float()
    return torch.from_numpy(rows).to(device).float()


@dataclass(frozen=True)
class Task:
    """What a run is about, found and checked before anything is written."""

    cache: Cache
    hook: str
    device: str
    selection: Selection
    recipe: Recipe


def prepare_task(config: TrainConfig) -> Task:
    """Open the cache and resolve the settings; raises `InputError` for a cache or settings that can't serve."""
    cache = open_cache(config.cache)
    cache.require_complete()
    if cache.manifest.identity["corpus"]["split"] != "train":
        raise InputError(f"{config.cache} holds held-out rows, kept for evaluation. Train on a cache of --split train.")
    hook = cache.require_hook(None if config.layer is None else f"resid_post.{config.layer}")
    selection = select_rows(cache, hook, config)
    recipe = resolve(config, cache.d_in, selection.n_kept)
    require_batch(cache, selection.n_kept, recipe.batch_size)
    return Task(cache, hook, choose_device(config.device), selection, recipe)


def train(config: TrainConfig, out: Path, progress: Progress, fresh: bool = False) -> dict[str, Any]:
    """Train one SAE into `out`, or go on training it; returns its sae.json.

    Raises `InputError` for a cache that can't serve, `MismatchError` if `out` was begun otherwise, `NonFiniteError`.
    """
    task = prepare_task(config)
    cache, hook, device, selection, recipe = task.cache, task.hook, task.device, task.selection, task.recipe
    settings = {
        **as_dict(config),
        "resolved": recipe.as_json(),
        "cache_fingerprint": fingerprint(cache.manifest.identity),
    }
    parameters = 2 * recipe.d_sae * recipe.d_in
    require_space(out, 4 * parameters * (4 + 3 * config.keep_checkpoints), "An SAE of this size with its checkpoints")
    with output_directory(out, "train", settings, OWNED, free=FREE_ON_RESUME, fresh=fresh):
        if (out / INFO_FILE).exists():
            progress.say(f"{out} is trained; nothing to do (--fresh starts over).")
            return load_sae(out)[1]
        _say_recipe(recipe, selection, progress)
        trainer = Trainer(recipe, device)
        buffer = MixingBuffer(
            cache, hook, config.buffer_tokens, recipe.batch_size, config.seed, config.on_corrupt, selection
        )
        watch = LossWatch(cache, hook, out, 1 if device == "cpu" else config.log_every)
        run = Run(trainer, buffer, watch, device)
        changed = load_checkpoint(out, run)
        if changed is None:
            trainer.initialise(_sample(cache, hook, config, selection, device))
        elif changed:
            progress.say(f"Note: this resumes on another machine ({', '.join(changed)}), so last bits may differ.")
        for note in trainer.choose_products():
            progress.say(note)
        for name in (METRICS_FILE, EVENTS_FILE):
            _cut_log(out / name, trainer.step_number)
        _run(run, config, cache.manifest.dtype, out, progress)
        if buffer.skipped:
            progress.say(
                f"{len(buffer.skipped)} damaged units were left out; sae.json lists them. Run `fastcache verify`."
            )
        info = _provenance(config, task, run)
        save_sae(out, trainer.trained(), info)
    return info


def _say_recipe(recipe: Recipe, selection: Selection, progress: Progress) -> None:
    if selection.dropped:
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in selection.dropped.items())
        progress.say(f"Tokens: {selection.n_kept:,} of {selection.n_rows:,} kept; left out: {dropped}")
    if selection.largest_norm is not None:
        progress.say(
            f"Norm filter: rows above {selection.largest_norm:.4g} are left out; the median is {selection.median_norm:.4g}"
        )
    tokens = recipe.steps * recipe.batch_size
    progress.say(
        f"Recipe {recipe.name}: {recipe.steps:,} steps of {recipe.batch_size:,} tokens ({tokens:,}), d_sae {recipe.d_sae:,}, "
        f"learning rate {recipe.lr:.2g}"
    )
    if recipe.name == "fast-paper" and recipe.steps < SHORT_RUN_STEPS and recipe.lr == FAST_PAPER["lr"]:
        progress.say(
            f"Note: {recipe.steps:,} steps at the paper's learning rate, meant for 320,000, leave an undertrained SAE. "
            "Cache more tokens, raise --lr, or leave --recipe out."
        )


def _sample(cache: Cache, hook: str, config: TrainConfig, selection: Selection, device: str) -> Tensor:
    """Rows of some random units, of those that are trained on: for the scale, the geometric median and the thresholds."""
    places, found, n_units = rows_of_units(cache), [], 0
    units = read_units(cache, hook, config.seed, skip=config.on_corrupt == "skip")
    for read in islice(units, len(places)):
        if read.error is not None:
            continue
        rows = read.rows[selection.of_rows(*places[read.unit].tolist())]
        too_large = selection.too_large(rows, cache.manifest.dtype)
        found.append((rows if too_large is None else rows[~too_large]).copy())
        n_units += 1
        if n_units >= SAMPLE_UNITS and sum(map(len, found)) >= SAMPLE_ROWS:
            break
    return to_tensor(np.concatenate(found), cache.manifest.dtype, device)


def _run(run: Run, config: TrainConfig, dtype: str, out: Path, progress: Progress) -> None:
    trainer, buffer, batch_size = run.trainer, run.buffer, run.trainer.recipe.batch_size
    with (
        (out / METRICS_FILE).open("a") as log,
        progress.task(f"train {config.arch}", trainer.n_steps * batch_size, "tokens") as task,
        deferred_interrupt() as interrupt,
    ):
        task.advance(trainer.step_number * batch_size)
        while trainer.step_number < trainer.n_steps:
            numbers, rows = buffer.next_batch()
            x = to_tensor(rows, dtype, run.device)
            figures = trainer.step(x)
            run.watch.add(trainer.step_number, figures.loss, numbers)
            last = trainer.step_number == trainer.n_steps
            save = interrupt.requested or (trainer.step_number % config.checkpoint_every == 0 and not last)
            log_line, note = last or trainer.step_number % config.log_every == 0, ""
            if save or log_line:
                run.watch.look()
            if log_line:
                line = trainer.figures(x, figures)
                log.write(json.dumps(line) + "\n")
                log.flush()
                note = _note(line)
            if save:
                save_checkpoint(out, run, config.keep_checkpoints)
            task.advance(len(x), note)
            if interrupt.requested:
                raise KeyboardInterrupt


def _note(line: dict[str, Any]) -> str:
    fvu = "-" if line["fvu"] is None else f"{line['fvu']:.3f}"
    return f"loss {line['loss']:.4g}  L0 {line['l0']:.1f}  FVU {fvu}  dead {line['dead_latents']}"


def _cut_log(path: Path, step_number: int) -> None:
    """Drop the lines of steps after the checkpoint: they are done again."""
    kept = [json.dumps(line) + "\n" for line in read_json_lines(path) if line["step"] <= step_number]
    if kept or path.exists():
        write_bytes_atomic(path, "".join(kept).encode())


def _provenance(config: TrainConfig, task: Task, run: Run) -> dict[str, Any]:
    """What stands in sae.json: where the SAE comes from, how it was trained, and on which rows."""
    identity, recipe, buffer = task.cache.manifest.identity, task.recipe, run.buffer
    training = {**recipe.as_json(), "buffer_tokens": config.buffer_tokens, "tokens": recipe.steps * recipe.batch_size}
    info = {
        "hook_point": task.hook,
        "model": identity["model"],
        "tokenizer": identity["tokenizer"],
        "method": identity["method"],
        "corpus": identity["corpus"],
        "cache_fingerprint": fingerprint(identity),
        "training": {**training, "activation_scale": run.trainer.scale},
        "tokens": {"of": config.tokens_of, **task.selection.as_json(buffer.n_read, buffer.n_too_large)},
    }
    return {**info, "skipped_units": list(buffer.skipped.values())} if buffer.skipped else info
