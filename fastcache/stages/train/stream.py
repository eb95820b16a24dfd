"""Rows of a cache in shuffled order: random units, mixed in a buffer.

`order.py` says which rows come when; here they are read and held. A checkpoint holds row numbers and a random state,
not activations, and a resumed stream goes on with the very same batches.
"""

from typing import Any

import numpy as np

from fastcache.cache_format.part import Rows
from fastcache.cache_format.reader import Cache
from fastcache.stages.train.order import Numbers, UnitOrder, mixed_order


class UnitStream:
    """Reads the units of the cache in the order of `UnitOrder`, beginning at `position`, for ever."""

    def __init__(self, cache: Cache, hook: str, seed: int, position: int = 0) -> None:
        self._cache, self._hook = cache, hook
        self._units = cache.units()
        self._order = UnitOrder(len(self._units), seed, position)

    def next_unit(self) -> Rows:
        """Rows `[n, d_in]`, as stored, of the next unit."""
        part, start, stop = self._units[self._order.next_unit()].tolist()
        return self._cache.parts[part].rows(self._hook, start, stop)


class MixingBuffer:
    """The mixing buffer: gives batches of rows, every row of the cache exactly once in each epoch."""

    def __init__(self, cache: Cache, hook: str, capacity: int, batch_size: int, seed: int) -> None:
        """Raises `InputError` if the cache can't fill a single batch."""
        self._cache, self._hook, self._seed = cache, hook, seed
        self._order = mixed_order(cache, capacity, batch_size, seed)
        self._units = UnitStream(cache, hook, seed)
        self._rows: Rows = np.empty((self._order.capacity, cache.d_in), cache.row_dtype)
        self._pending: Rows = self._rows[:0]  # read, but not yet in a slot

    def _store(self, slots: Numbers) -> None:
        """Put the rows that are read next into `slots`."""
        filled = 0
        while filled < len(slots):
            if not len(self._pending):
                self._pending = self._units.next_unit()
            taken = min(len(self._pending), len(slots) - filled)
            self._rows[slots[filled : filled + taken]] = self._pending[:taken]
            self._pending = self._pending[taken:]
            filled += taken

    def next_batch(self) -> tuple[Numbers, Rows]:
        """Row numbers `[batch_size]` and rows `[batch_size, d_in]`, as stored, of the next batch."""
        while self._order.needs_rows:
            self._store(self._order.refill())
        slots = self._order.next_slots()
        return self._order.numbers[slots], np.take(self._rows, slots, axis=0)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Numbers]]:
        """Where the stream stands: a JSON-ready part, and the numbers of the rows that it holds."""
        return self._order.state_dict()

    def load_state_dict(self, scalars: dict[str, Any], arrays: dict[str, Numbers]) -> None:
        """Go back to where `state_dict` was taken; reads the rows from the cache again."""
        self._order.load_state_dict(scalars, arrays)
        self._units = UnitStream(self._cache, self._hook, self._seed, self._order.position)
        waiting = self._order.waiting
        self._rows[waiting] = self._cache.gather(self._hook, self._order.numbers[waiting])
        self._pending = self._cache.gather(self._hook, self._order.pending)
