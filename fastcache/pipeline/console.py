"""What commands print: lines that are whole in a file and break between words on a terminal, and the progress of work.

A terminal gets bars; a file, a pipe and a notebook get a plain line now and then, without escape codes.
"""

import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.progress import Progress, TaskID
from rich.progress import Task as RichTask
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastcache import figures
from fastcache.pipeline.spelling import spelled
from fastcache.progress import Task

SECONDS_BETWEEN_LINES = 20
BAR_WIDTH = 24
CONTINUED = " \\\n    "
"""Between the lines of a command that is too long for the terminal: it can still be copied as it stands."""


def make_console() -> Console:
    """The console of a command. Only a terminal gets escape codes: FORCE_COLOR and Jupyter's `!` pretend to be one."""
    in_notebook = "JPY_PARENT_PID" in os.environ
    is_terminal = sys.stdout.isatty() and not in_notebook and os.environ.get("TERM") != "dumb"
    return Console(force_terminal=is_terminal, force_jupyter=False)


def printable(text: str, style: str = "") -> Text:
    """Text of a data set or a model: taken as it is, but that nothing in it speaks to the terminal."""
    return Text("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text), style)


def wrapped(text: str, width: int) -> str:
    """Lines of `text` broken between words, with their indentation; a word that is longer than a line is left whole."""
    lines: list[str] = []
    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip(" "))]
        current = ""
        for word in line.split():
            if current and cell_len(current) + 1 + cell_len(word) > width:
                lines.append(current)
                current = ""
            current = f"{current} {word}" if current else indent + word
        lines.append(current)
    return "\n".join(lines)


def print_text(console: Console, text: str) -> None:
    """Print text whole: it breaks between words on a terminal, and nowhere in a file. A long word is never broken."""
    console.print(Text(wrapped(text, console.width) if console.is_terminal else text), soft_wrap=True)


def command_lines(words: Sequence[str], width: int | None) -> str:
    """A command as one can paste it into a shell, on one line or, where `width` is less, continued on others."""
    line = shlex.join(words)
    if width is None or cell_len(line) <= width:
        return line
    pieces: list[list[str]] = [[]]
    for word in words:  # an option begins a piece, and its value stays with it
        if word.startswith("-") and pieces[-1]:
            pieces.append([])
        pieces[-1].append(word)
    lines: list[str] = []
    room = width - len(CONTINUED)
    for piece in map(shlex.join, pieces):
        if lines and cell_len(lines[-1]) + 1 + cell_len(piece) <= room:
            lines[-1] += f" {piece}"
        else:
            lines.append(piece)
    return CONTINUED.join(lines)


class _Tally:
    """What of a task is done, and how fast."""

    def __init__(self, name: str, total: int | None, unit: str, done: int) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done = self._done_before = done
        self.note = ""
        self._begun = time.monotonic()

    def add(self, amount: int, note: str) -> None:
        """Take in what was done."""
        self.done += amount
        self.note = note or self.note

    def words(self, is_over: bool = False) -> str:
        """How much, how fast, and how long the rest will take; a rate only once there is one."""
        seconds, fresh = time.monotonic() - self._begun, self.done - self._done_before
        elapsed = f"in {figures.duration(seconds)}" if is_over else figures.duration(round(seconds))
        parts = [self._amount(), elapsed]
        rate = figures.rate(fresh, seconds, self.unit)
        if rate and (is_over or seconds >= 1):
            parts.append(rate)
            if not is_over and self.total and self.total > self.done:
                parts.append(f"{figures.duration(round((self.total - self.done) * seconds / fresh))} left")
        return ", ".join(filter(None, [*parts, self.note]))

    def _amount(self) -> str:
        if self.unit == "bytes":
            return figures.size(self.done) + (f" of {figures.size(self.total)}" if self.total else "")
        return f"{self.done:,}" + (f" of {self.total:,}" if self.total else "") + f" {self.unit}"


class _BarProgress(Progress):
    """A bar with its figures beside it, or below it where the terminal is too narrow."""

    tally: _Tally

    def get_renderables(self) -> Iterable[RenderableType]:
        """What rich draws, a few times a second."""
        return [self._drawn(task) for task in self.tasks]

    def _drawn(self, task: RichTask) -> RenderableType:
        name, words = Text(self.tally.name), Text(self.tally.words(is_over=task.finished))
        bar = ProgressBar(task.total, task.completed, width=BAR_WIDTH, pulse=task.total is None)
        line = Table.grid(padding=(0, 1))
        if len(name) + len(words) + BAR_WIDTH + 2 <= self.console.width:
            line.add_row(name, bar, words)
            return line
        line.add_row(bar, name)
        return Group(line, words)


class _Bar:
    """A task drawn as a bar."""

    def __init__(self, bars: _BarProgress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: int, note: str = "") -> None:
        self._bars.tally.add(amount, note)
        self._bars.update(self._task, advance=amount)


class _Lines:
    """A task reported in lines, for output that is no terminal."""

    def __init__(self, console: Console, tally: _Tally) -> None:
        self._console, self._tally = console, tally
        self._last = time.monotonic()

    def advance(self, amount: int, note: str = "") -> None:
        self._tally.add(amount, note)
        if time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self.print()

    def print(self, is_over: bool = False) -> None:
        print_text(self._console, f"{self._tally.name}: {self._tally.words(is_over)}")


class RichProgress:
    """`fastcache.progress.Progress` on a console."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """Print a message that stays, with options as the running command spells them."""
        print_text(self.console, spelled(text))

    def say_commands(self, lead: str, commands: Sequence[Sequence[str]]) -> None:
        """Print commands to paste into a shell, after a lead such as `Next:`; nothing where there is none."""
        width = self.console.width if self.console.is_terminal else None
        line = " ".join([lead, *(command_lines(command, None) for command in commands)])
        if len(commands) == 1 and (width is None or cell_len(line) <= width):
            self.console.print(Text(line), soft_wrap=True)
        elif commands:
            shown = ["  " + command_lines(command, width and width - 2).replace("\n", "\n  ") for command in commands]
            self.console.print(Text("\n".join([lead, *shown])), soft_wrap=True)

    def task(self, name: str, total: int | None, unit: str, done: int = 0) -> AbstractContextManager[Task]:
        """See `fastcache.progress.Progress.task`."""
        tally = _Tally(name, total, unit, done)
        return self._bar(tally) if self.console.is_terminal else self._lines(tally)

    @contextmanager
    def _bar(self, tally: _Tally) -> Iterator[Task]:
        bars = _BarProgress(console=self.console, refresh_per_second=4)
        bars.tally = tally
        with bars:
            yield _Bar(bars, bars.add_task(tally.name, total=tally.total, completed=tally.done))

    @contextmanager
    def _lines(self, tally: _Tally) -> Iterator[Task]:
        lines = _Lines(self.console, tally)
        yield lines
        lines.print(is_over=True)
