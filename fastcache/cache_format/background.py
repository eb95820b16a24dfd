"""One thread that does work in order while the caller computes on: a bounded queue that blocks and never drops."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Background:
    """Runs what is submitted, one after the other. After an error nothing more is run, and every later call raises it."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes` bounds the data that waits: `submit` blocks until there is room."""
        self._max_bytes = max_bytes
        self._waiting: deque[tuple[int, Callable[[], Any], Future[Any]]] = deque()
        self._bytes = 0
        self._error: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="cache-writer", daemon=True)
        self._thread.start()

    def submit(self, n_bytes: int, work: Callable[[], Any]) -> Future[Any]:
        """Have `work` done after all that was submitted before; `n_bytes` is the memory it holds until then."""
        with self._changed:
            # A single piece larger than the bound waits for an empty queue.
            self._changed.wait_for(lambda: self._error or not self._bytes or self._bytes + n_bytes <= self._max_bytes)
            self._raise()
            future: Future[Any] = Future()
            self._waiting.append((n_bytes, work, future))
            self._bytes += n_bytes
            self._changed.notify_all()
        return future

    def drain(self) -> None:
        """Wait until everything is done; raises the error of what was not."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._waiting)
            self._raise()

    def close(self) -> None:
        """Stop after the work at hand, and forget the rest."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        for _, _, left in self._waiting:
            left.cancel()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                n_bytes, work, future = self._waiting[0]
            try:
                future.set_result(work())
            except BaseException as error:  # handed to the caller, who raises it
                future.set_exception(error)
                self._error = error
            del work
            with self._changed:
                self._waiting.popleft()
                self._bytes -= n_bytes
                if self._error is not None:
                    for _, _, left in self._waiting:
                        left.set_exception(self._error)
                    self._waiting.clear()
                    self._changed.notify_all()
                    return
                self._changed.notify_all()
