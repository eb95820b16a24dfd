"""Where an extraction stands, on the screen and in a file for other programs."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

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
    units_done: int = 0
    units_failed: int = 0
    state: str = "running"
    _begun: float = field(default_factory=time.monotonic)
    _written: float = 0.0

    def advance(self, amount: int, unit: int) -> None:
        """Tokens of a unit were computed, or found computed."""
        self.tokens += amount
        rate = self.tokens / max(time.monotonic() - self._begun, 1e-3) * self.token_bytes / 1e9
        workers = f", {len(self.workers)} workers" if self.workers else ""
        self.task.advance(amount, f"unit {unit}, {self.units_done} done, {rate:.2f} GB/s{workers}")
        if time.monotonic() - self._written >= SECONDS_BETWEEN:
            self.write()

    def unit_done(self) -> None:
        """A unit is on disk."""
        self.units_done += 1

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
        rate = self.tokens / max(seconds, 1e-3)
        figures = {
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
        write_bytes_atomic(self.path, (json.dumps(figures, indent=2) + "\n").encode(), durable=False)
