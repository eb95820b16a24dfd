"""Units of a cache in any order, read ahead by threads into buffers that are used again and again."""

import atexit
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import NamedTuple
from weakref import WeakSet

import numpy as np

from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import UNIT_ROWS
from fastcache.cache_format.unit_array import Rows
from fastcache.errors import FastcacheError, IntegrityError

BLOCK_BYTES = 4 * 2**20
"""Units are handed to a thread by so many bytes at a time: to hand over single small ones would cost more than to read."""


BLOCKS_TOLD = 8
"""Blocks that the system is told of before a thread reads them: a disk is quick only with many requests at a time."""

Place = tuple[int, int, int, int]
"""Number, part, first row and last row + 1 of a unit."""


class ReadUnit(NamedTuple):
    """A unit as it comes out of the stream."""

    unit: int
    """Its number, that of its row in `cache.units()`."""
    rows: Rows
    """`[n, d_in]`, before decoding; valid until the next unit is taken."""
    error: IntegrityError | None
    """Why it could not be read; `rows` then mean nothing."""


class _Block:
    """Some units being read, one behind the other, into one buffer."""

    def __init__(self, n_units: int, cache: Cache) -> None:
        self._buffer = np.empty((n_units, UNIT_ROWS, cache.d_in), cache.row_dtype)

    def read(self, cache: Cache, hook: str, units: list[Place], verify: bool) -> list[ReadUnit]:
        """Read units, each given as number, part, first row and last row + 1."""
        found = []
        for place, (unit, part, start, stop) in enumerate(units):
            rows, error = self._buffer[place, : stop - start], None
            try:
                cache.parts[part].read_unit(hook, start // UNIT_ROWS, rows, verify)
            except IntegrityError as damage:
                error = damage
            found.append(ReadUnit(unit, rows, error))
        return found


_open: WeakSet[Generator[ReadUnit, None, None]] = WeakSet()
"""Streams that may still be read from."""


@atexit.register
def _close_all() -> None:
    """Close what is open when the interpreter ends, while the modules that closing needs are still there."""
    for stream in list(_open):
        with suppress(ValueError):  # a daemon thread is inside it
            stream.close()


def unit_stream(
    cache: Cache, hook: str, units: Iterable[int], *, n_threads: int = 2, verify: bool = True, skip: bool = False
) -> Iterator[ReadUnit]:
    """The units with these numbers, in this order, maybe without end; the threads read `n_threads` + 1 blocks ahead.

    Memory is bounded by (`n_threads` + 2) blocks of about 4 MiB, or of one unit where that is more. A damaged unit raises
    `IntegrityError` when its turn comes, or with `skip` comes with its error.
    """
    stream = _stream(cache, hook, units, n_threads, verify, skip)
    _open.add(stream)
    return stream


def _stream(
    cache: Cache, hook: str, units: Iterable[int], n_threads: int, verify: bool, skip: bool
) -> Generator[ReadUnit, None, None]:
    hook = cache.require_hook(hook)
    unit_bytes = UNIT_ROWS * cache.d_in * cache.row_dtype.itemsize
    n_units = max(1, BLOCK_BYTES // unit_bytes)
    planned = _planned(cache, hook, units, n_units)
    free = [_Block(n_units, cache) for _ in range(n_threads + 2)]
    running: deque[tuple[_Block, Future[list[ReadUnit]]]] = deque()
    with ThreadPoolExecutor(n_threads, "cache-reader") as pool:

        def read_ahead() -> None:
            while free and (places := next(planned, None)):
                block = free.pop()
                running.append((block, _begin(pool, partial(block.read, cache, hook, places, verify))))

        try:
            read_ahead()
            while running:
                block, future = running.popleft()
                for read in future.result():
                    if read.error is not None and not skip:
                        raise read.error
                    yield read
                free.append(block)
                read_ahead()
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(pool: ThreadPoolExecutor, read: Callable[[], list[ReadUnit]]) -> Future[list[ReadUnit]]:
    """Have `read` called by a thread of `pool`, or here where it takes no more work: once the main thread has ended."""
    try:
        return pool.submit(read)
    except RuntimeError:
        future: Future[list[ReadUnit]] = Future()
        try:
            future.set_result(read())
        except Exception as error:  # raised when its turn comes, as a thread's is
            future.set_exception(error)
        return future


def _planned(cache: Cache, hook: str, units: Iterable[int], n_units: int) -> Iterator[list[Place]]:
    """The places of `n_units` units at a time, whose reading the system has been told of some blocks before."""
    table, numbers = cache.units(), iter(units)
    told: deque[list[Place]] = deque()
    while True:
        while len(told) < BLOCKS_TOLD and (chosen := list(islice(numbers, n_units))):
            told.append([(unit, *table[unit].tolist()) for unit in chosen])
            for _, part, start, _ in told[-1]:
                with suppress(FastcacheError):  # reading it will tell
                    cache.parts[part].residual_array(hook).will_need(start // UNIT_ROWS)
        if not told:
            return
        yield told.popleft()
