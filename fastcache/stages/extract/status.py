"""Where an extraction stands, on the screen and in a file for other programs."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from fastcache import figures
from fastcache.files import write_bytes_atomic
from fastcache.progress import Progress, Task

STATUS_FILE = "status.json"
SECONDS_BETWEEN = 1.0


@dataclass
class Status:
    """Counts of tokens and units; `path` is written at most once a second, and whole at any moment."""

    task: Task
    progress: Progress
    expected_tokens: int
    token_bytes: int
    path: Path | None = None
    workers: dict[int, str] = field(default_factory=dict)
    """What each worker process does."""
    tokens: int = 0
    """With those that an earlier run computed."""
    units_done: int = 0
    units_failed: int = 0
    state: str = "running"
    _begun: float = field(default_factory=time.monotonic)
    _written: float = 0.0
    _tokens_before: int = 0

    def begin_with(self, tokens: int, units: int) -> None:
        """Take in what an earlier run computed, which counts for no rate."""
        self.tokens = self._tokens_before = tokens
        self.units_done = units

    def advance(self, amount: int) -> None:
        """Tokens were computed."""
        self.tokens += amount
        self.task.advance(amount, self._note())
        if time.monotonic() - self._written >= SECONDS_BETWEEN:
            self.write()

    def _note(self) -> str:
        n_bytes = (self.tokens - self._tokens_before) * self.token_bytes
        parts = [f"{self.units_done:,} unit{'s' if self.units_done > 1 else ''} on disk"] if self.units_done else []
        parts += [f"{len(self.workers)} workers"] if self.workers else []
        return ", ".join(filter(None, [figures.rate(n_bytes, time.monotonic() - self._begun, "bytes"), *parts]))

    def unit_done(self) -> None:
        """A unit is on disk."""
        self.units_done += 1  # shown with the next advance: this is called by the writer's thread

    def finish(self) -> None:
        """All units were computed, or given up."""
        self.state = "computed"
        self.task.advance(0, self._note())
        self.write()

    def unit_failed(self, unit: int, reason: str) -> None:
        """A unit was given up."""
        self.units_failed += 1
        self.progress.say(f"Unit {unit} was given up: {reason}. The rest goes on.")

    def write(self) -> None:
        """Put the figures of this moment into the file."""
        self._written = time.monotonic()
        if self.path is None:
            return
        seconds = time.monotonic() - self._begun
        rate = (self.tokens - self._tokens_before) / max(seconds, 1e-3)
        values = {
            "state": self.state,
            "tokens": self.tokens,
            "expected_tokens": self.expected_tokens,
            "tokens_per_second": round(rate, 1),
            "bytes_per_second": round(rate * self.token_bytes),
            "eta_seconds": round(max(self.expected_tokens - self.tokens, 0) / rate) if rate else None,
            "elapsed_seconds": round(seconds, 1),
            "units_done": self.units_done,
            "units_failed": self.units_failed,
            "workers": {str(number): state for number, state in self.workers.items()},
        }
        # It is of this moment only, so that nobody need wait for the disk.
        write_bytes_atomic(self.path, (json.dumps(values, indent=2) + "\n").encode(), durable=False)
