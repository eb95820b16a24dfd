"""How long work reports itself: stages speak to this small interface, the command line draws it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, amount: int, note: str = "") -> None:
        """Add `amount` to what is done; `note` is a short line of figures."""


class Progress(Protocol):
    """Where tasks are shown."""

    def task(self, name: str, total: int | None, unit: str) -> "AbstractTaskContext":
        """A context that yields a `Task` of `total` `unit`s."""

    def say(self, text: str) -> None:
        """Print one line that stays."""


class AbstractTaskContext(Protocol):
    """Context manager of a `Task`."""

    def __enter__(self) -> Task: ...
    def __exit__(self, *error: object) -> bool | None: ...


class _SilentTask:
    def advance(self, amount: int, note: str = "") -> None:
        pass


class Silent:
    """Shows nothing: for library use and tests."""

    @contextmanager
    def _context(self) -> Iterator[Task]:
        yield _SilentTask()

    def task(self, name: str, total: int | None, unit: str) -> AbstractTaskContext:
        """See `Progress.task`."""
        return self._context()

    def say(self, text: str) -> None:
        """See `Progress.say`."""
