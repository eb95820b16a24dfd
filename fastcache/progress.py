"""How long work reports itself: stages speak to this small interface, the command line draws it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, amount: int, note: str = "") -> None:
        """Add `amount` to what is done; `note` is a short line of figures."""


class Progress(Protocol):
    """Where tasks are shown."""

    def task(self, name: str, total: int | None, unit: str, done: int = 0) -> AbstractContextManager[Task]:
        """A context that yields a `Task` of `total` `unit`s, of which an earlier run did `done`: they count for no rate."""

    def say(self, text: str) -> None:
        """Print a message that stays."""


class Silent:
    """Shows nothing: for library use and tests. It is its own task."""

    def advance(self, amount: int, note: str = "") -> None:
        """See `Task.advance`."""

    def task(self, name: str, total: int | None, unit: str, done: int = 0) -> AbstractContextManager[Task]:
        """See `Progress.task`."""
        return nullcontext(self)

    def say(self, text: str) -> None:
        """See `Progress.say`."""
