"""What a run will take, before it starts: `fastcache train --dry-run`. A few steps are made on random rows, and timed."""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from fastcache.cache_format.schema import STORED_DTYPES
from fastcache.errors import SpaceError
from fastcache.figures import duration, figure, rate, setting, size
from fastcache.memory import free_memory
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.recipe import Recipe
from fastcache.stages.train.task import Task, prepare_task
from fastcache.stages.train.trainer import Trainer

TIMED_STEPS = 3
STATE_COPIES = 4
"""Parameters, their gradients, Adam's two moments."""
WIDE_ARRAYS = 6
"""Arrays `[batch, d_sae]` that a step holds at a time, about."""


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, times in seconds."""

    task: Task
    buffer_rows: int
    buffer_bytes: int
    sae_bytes: int
    step_bytes: int
    read_bytes: int
    step_seconds: float

    def lines(self) -> list[str]:
        """The plan in words."""
        recipe, selection, cache = self.task.recipe, self.task.selection, self.task.cache
        tokens, seconds = recipe.steps * recipe.batch_size, recipe.steps * self.step_seconds
        memory = self.buffer_bytes + self.sae_bytes + self.step_bytes
        dropped = "".join(f", {reason} {count:,}" for reason, count in selection.dropped.items())
        return [
            f"Cache: {cache.path}, {self.task.hook}, d_in {recipe.d_in:,}; {selection.n_kept:,} of {selection.n_rows:,} rows"
            f"{dropped and ' (left out' + dropped.replace(',', ':', 1) + ')'}",
            f"SAE: {recipe.arch}, d_sae {recipe.d_sae:,}; recipe {recipe.name}, learning rate {setting(recipe.lr)}"
            + _sparsity(recipe),
            f"Steps: {recipe.steps:,} of {recipe.batch_size:,} tokens: {tokens:,}, {figure(tokens / selection.n_kept)} passes",
            f"Memory: about {size(memory)}: buffer of {self.buffer_rows:,} rows {size(self.buffer_bytes)}, SAE and "
            f"optimiser {size(self.sae_bytes)}, a step {size(self.step_bytes)}",
            f"Disk: {size(self.read_bytes)} to read, {rate(self.read_bytes, seconds, 'bytes')}",
            f"Time: about {duration(seconds)} on {self.task.device} ({figure(1000 * self.step_seconds)} ms a step, "
            f"{rate(recipe.batch_size, self.step_seconds, 'tokens')})",
            "Nothing was written.",
        ]


def _buffer_rows(task: Task) -> int:
    return min(max(task.config.buffer_tokens, 2 * task.recipe.batch_size), task.selection.n_kept)


def buffer_bytes(task: Task) -> int:
    """Of the mixing buffer."""
    return _buffer_rows(task) * task.recipe.d_in * task.cache.row_dtype.itemsize


def _sae_bytes(recipe: Recipe) -> int:
    return 4 * STATE_COPIES * 2 * recipe.d_in * recipe.d_sae


def _step_bytes(recipe: Recipe) -> int:
    return 4 * WIDE_ARRAYS * recipe.batch_size * recipe.d_sae


def member_bytes(recipe: Recipe) -> int:
    """Of an SAE in training: parameters, optimiser, and what a step needs."""
    return _sae_bytes(recipe) + _step_bytes(recipe)


def require_memory(task: Task) -> None:
    """Raise `SpaceError` for an SAE whose parameters and optimiser, with the buffer, the free memory can't hold.

    What a step needs besides is an estimate, so it isn't counted here. GPUs say themselves what they lack.
    """
    free, needed = free_memory(), buffer_bytes(task) + (_sae_bytes(task.recipe) if task.device == "cpu" else 0)
    if free is not None and needed > free:
        raise SpaceError(
            f"Training needs at least {size(needed)} of memory, and {size(free)} are free. Lower --expansion "
            "or --buffer-tokens. Nothing was written."
        )


def _sparsity(recipe: Recipe) -> str:
    if recipe.k is not None:
        return f", k {recipe.k}"
    return f", target L0 {recipe.target_l0:g}" if recipe.target_l0 else f", lambda {setting(recipe.coefficient)}"


def make_plan(config: TrainConfig) -> Plan:
    """Check the settings as `train` does, and find what the run will take; raises what `train` would."""
    task = prepare_task(config)
    require_memory(task)
    recipe, cache = task.recipe, task.cache
    stored = np.dtype(STORED_DTYPES[cache.manifest.dtype]).itemsize
    passes = recipe.steps * recipe.batch_size / task.selection.n_kept
    return Plan(
        task,
        _buffer_rows(task),
        buffer_bytes(task),
        _sae_bytes(recipe),
        _step_bytes(recipe),
        int(passes * cache.n_tokens * recipe.d_in * stored),
        _time_step(recipe, task.device),
    )


def _time_step(recipe: Recipe, device: str) -> float:
    """Median time of a step on random rows, after one that isn't counted."""
    trainer = Trainer(recipe, device)
    trainer.choose_products()
    x = torch.randn(recipe.batch_size, recipe.d_in, generator=torch.Generator().manual_seed(0)).to(device)
    trainer.initialise(x)
    times = []
    for _ in range(TIMED_STEPS + 1):
        start = time.perf_counter()
        float(trainer.step(x).loss)  # waits for the device
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
