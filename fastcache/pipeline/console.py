"""Progress bars on a terminal, a line now and then in a log file."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from fastcache.progress import Task

SECONDS_BETWEEN_LINES = 20


def printable(text: str, style: str = "") -> Text:
    """Text of a data set or a model: taken as it is, but that nothing in it speaks to the terminal."""
    return Text("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text), style)


class _Bar:
    """A task drawn as a bar."""

    def __init__(self, bars: Progress, task: TaskID, unit: str) -> None:
        self._bars, self._task, self._unit = bars, task, unit
        self._start, self._done, self._note = time.monotonic(), 0, ""

    def advance(self, amount: int, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note
        rate = self._done / max(time.monotonic() - self._start, 1e-3)
        text = escape(f"{rate:,.0f} {self._unit}/s  {self._note}")
        self._bars.update(self._task, advance=amount, note=text)


class _Lines:
    """A task told in lines, for output that is no terminal."""

    def __init__(self, console: Console, name: str, total: int | None, unit: str) -> None:
        self._console, self._name, self._total, self._unit = console, name, total, unit
        self._start = self._last = time.monotonic()
        self._done, self._printed, self._note = 0, -1, ""

    def advance(self, amount: int, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note
        if time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self.print()

    def print(self) -> None:
        if self._printed == self._done:
            return
        self._printed = self._done
        seconds = time.monotonic() - self._start
        of = f" of {self._total:,}" if self._total else ""
        rate = self._done / max(seconds, 1e-3)
        line = f"{self._name}: {self._done:,}{of} {self._unit}, {seconds:.0f} s, {rate:,.0f}/s  {self._note}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class RichProgress:
    """`fastcache.progress.Progress` on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Print one line that stays."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def task(self, name: str, total: int | None, unit: str) -> AbstractContextManager[Task]:
        """See `fastcache.progress.Progress.task`."""
        return self._bar(name, total, unit) if self.console.is_terminal else self._lines(name, total, unit)

    @contextmanager
    def _bar(self, name: str, total: int | None, unit: str) -> Iterator[Task]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4) as bars:
            yield _Bar(bars, bars.add_task(name, total=total, note=""), unit)

    @contextmanager
    def _lines(self, name: str, total: int | None, unit: str) -> Iterator[Task]:
        lines = _Lines(self.console, name, total, unit)
        yield lines
        lines.print()
