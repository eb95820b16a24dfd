"""A crew of worker processes that each hold something costly, such as a model, and are handed jobs one at a time.

Unlike an executor, a crew goes on when a worker dies: its job is given to another one, and a job that keeps killing
workers, or keeps failing, is given up and named. Which worker does which job depends on who is free; what comes of a job
must not.
"""

import multiprocessing
import os
import signal
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from fastcache.errors import FastcacheError
from fastcache.workers import end_with_parent

ATTEMPTS = 3
"""Times that a job is tried."""

Report = Callable[[int], None]
Work = Callable[[Any, Report], Any]
"""Does one job; may report amounts of progress."""


class Done(NamedTuple):
    """A job that is done."""

    key: int
    result: Any


class Failed(NamedTuple):
    """A job that was given up."""

    key: int
    reason: str


class Advance(NamedTuple):
    """Progress of a worker within its job."""

    worker: int
    key: int
    amount: int


class CrewError(FastcacheError):
    """A worker that can't even begin."""


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    connection: Connection
    ready: bool = False
    job: tuple[int, Any] | None = None


@dataclass
class Crew:
    """`n_workers` processes, each begun with `begin(number)`, which returns what does the jobs."""

    begin: Callable[[int], Work]
    """Pickled into each process: a function of a module, or a `functools.partial` of one."""
    n_workers: int
    raised: tuple[type[FastcacheError], ...] = ()
    """Errors of a job that end the whole run, instead of being tried again."""
    states: dict[int, str] = field(default_factory=dict)
    """What each worker does, for people."""
    _again: deque[tuple[int, Any]] = field(default_factory=deque)
    _attempts: Counter[int] = field(default_factory=Counter)
    _false_starts: int = 0

    def run(self, jobs: Iterable[tuple[int, Any]]) -> Generator[Done | Failed | Advance, None, None]:
        """Have the jobs, each with its key, done; gives results as they come, in any order.

        Takes as many jobs at a time as there are workers. Raises `CrewError` if workers die before their first job.
        """
        source = iter(jobs)
        crew = {number: self._start(number) for number in range(self.n_workers)}
        try:
            while True:
                for worker in crew.values():
                    if worker.ready and worker.job is None:
                        self._hand_out(worker, source)
                if not any(worker.job or not worker.ready for worker in crew.values()):
                    return
                for connection in wait([worker.connection for worker in crew.values()]):
                    worker = next(w for w in crew.values() if w.connection is connection)
                    kind, content = self._receive(worker)
                    outcome = self._settle(worker, kind, content)
                    if kind == "died":
                        crew[worker.number] = self._start(worker.number)
                    if outcome is not None:
                        yield outcome
        finally:
            for worker in crew.values():
                worker.process.kill()
                worker.process.join()

    def _settle(self, worker: _Worker, kind: str, content: Any) -> Done | Failed | Advance | None:
        """What a message means for its worker's job."""
        if kind == "ready":
            worker.ready, self._false_starts = True, 0
        elif worker.job is None:
            self._false_starts += 1
            if self._false_starts >= ATTEMPTS:
                raise CrewError(f"Workers end before they can work: {content}.")
        elif kind == "advance":
            return Advance(worker.number, worker.job[0], content)
        else:
            job, worker.job = worker.job, None
            return Done(job[0], content) if kind == "done" else self._retry(job, content)
        return None

    def _retry(self, job: tuple[int, Any], reason: str) -> Failed | None:
        """Have a job done by another worker, unless it was tried often enough."""
        self._attempts[job[0]] += 1
        if self._attempts[job[0]] == ATTEMPTS:
            return Failed(job[0], reason)
        self._again.append(job)
        return None

    def _start(self, number: int) -> _Worker:
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        # No daemons: these may have no processes of their own, and an engine is one.
        process = context.Process(target=_worker_main, args=(self.begin, number, theirs, self.raised))
        process.start()
        theirs.close()
        self.states[number] = "starting"
        return _Worker(number, process, mine)

    def _hand_out(self, worker: _Worker, source: Iterator[tuple[int, Any]]) -> None:
        worker.job = self._again.popleft() if self._again else next(source, None)
        self.states[worker.number] = "idle" if worker.job is None else f"unit {worker.job[0]}"
        if worker.job is not None:
            with suppress(OSError):  # it died between two jobs: the connection says so next
                worker.connection.send(worker.job[1])

    def _receive(self, worker: _Worker) -> tuple[str, Any]:
        try:
            kind, content = worker.connection.recv()
        except (EOFError, OSError):
            worker.process.join()
            return "died", _cause(worker.process.exitcode)
        if kind == "raise":
            raise content
        return kind, content


def _cause(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"its process was killed ({name})" + (", perhaps for want of memory" if name == "SIGKILL" else "")
    return f"its process ended with code {exit_code}"


def _worker_main(
    begin: Callable[[int], Work], number: int, connection: Connection, raised: tuple[type[FastcacheError], ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C means
    end_with_parent()
    try:
        work = begin(number)
    except FastcacheError as error:
        connection.send(("raise", error))
        return
    connection.send(("ready", None))
    while True:
        try:
            job = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            message = ("done", work(job, lambda amount: connection.send(("advance", amount))))
        except raised as error:
            message = ("raise", error)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            message = ("failed", f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})")
        connection.send(message)
