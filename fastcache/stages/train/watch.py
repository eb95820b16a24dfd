"""Watches the loss of every step: NaN stops training and names the rows; a spike is noted in events.jsonl."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import UNIT_ROWS, decode
from fastcache.errors import NonFiniteError
from fastcache.files import append_to_log
from fastcache.stages.train.order import Numbers

EVENTS_FILE = "events.jsonl"
SPIKE = 3.0
"""A loss so many times the running mean is a spike."""
MEAN_RATE = 0.02
FIRST_STEPS = 100
"""Steps before the mean is trusted."""


class LossWatch:
    """Takes the loss of each step and looks at them together, so that a GPU is waited for only now and then."""

    def __init__(self, cache: Cache, hook: str, out: Path, every: int) -> None:
        """Looks every `every` steps."""
        self._cache, self._hook, self._path, self._every = cache, hook, out / EVENTS_FILE, every
        self._waiting: list[tuple[int, Tensor, Numbers]] = []
        self.mean, self.n_steps = 0.0, 0

    def add(self, step: int, loss: Tensor, numbers: Numbers) -> None:
        """Take the loss of `step`, whose batch was the rows `numbers`."""
        self._waiting.append((step, loss, numbers))
        if len(self._waiting) >= self._every:
            self.look()

    def look(self) -> None:
        """Look at what was added; raises `NonFiniteError` for a loss that is no number."""
        waiting, self._waiting = self._waiting, []
        losses = torch.stack([loss for _, loss, _ in waiting]).double().tolist() if waiting else []
        for (step, _, numbers), loss in zip(waiting, losses, strict=True):
            if not math.isfinite(loss):
                raise NonFiniteError(self._explain(step, numbers))
            if self.n_steps >= FIRST_STEPS and loss > SPIKE * self.mean:
                self._log(
                    {"event": "loss spike", "step": step, "loss": loss, "mean": self.mean, **self._largest(numbers)}
                )
            self.mean += (loss - self.mean) * max(MEAN_RATE, 1 / (self.n_steps + 1))
            self.n_steps += 1

    def _log(self, event: dict[str, Any]) -> None:
        append_to_log(self._path, (json.dumps(event) + "\n").encode(), durable=False)

    def _rows(self, numbers: Numbers) -> np.ndarray[Any, Any]:
        return decode(self._cache.gather(self._hook, numbers), self._cache.manifest.dtype)

    def _place(self, number: int) -> dict[str, int]:
        part = (
            int(np.searchsorted([self._cache.first_row(p) for p in range(len(self._cache.parts))], number, "right")) - 1
        )
        inside = int(number) - self._cache.first_row(part)
        return {"part": part, "unit": inside // UNIT_ROWS, "row": inside}

    def _largest(self, numbers: Numbers) -> dict[str, Any]:
        """Where the row of the largest norm of a batch is: the usual cause of a spike."""
        norms = np.linalg.norm(self._rows(numbers).astype(np.float64), axis=1)
        largest = int(norms.argmax())
        return {"largest_norm": float(norms[largest]), **self._place(int(numbers[largest]))}

    def _explain(self, step: int, numbers: Numbers) -> str:
        rows = self._rows(numbers)
        odd = np.flatnonzero(~np.isfinite(rows).all(1))
        if len(odd):
            where = self._place(int(numbers[odd[0]]))
            cause = (
                f"{len(odd)} rows of its batch are not finite, the first in part {where['part']}, unit {where['unit']}, "
                f"row {where['row']} of the cache. Run `fastcache verify`."
            )
        else:
            largest = self._largest(numbers)
            cause = (
                "The rows of its batch are finite, so training diverged; the row of the largest norm, "
                f"{largest['largest_norm']:.4g}, is in part {largest['part']}, unit {largest['unit']}, row {largest['row']}. "
                "Try a lower --lr, or --norm-filter 10x-median."
            )
        return f"Training became NaN or infinite at step {step}. {cause} The last checkpoint is kept."

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready; nothing may wait to be looked at."""
        return {"mean": self.mean, "n_steps": self.n_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken."""
        self.mean, self.n_steps = state["mean"], state["n_steps"]
