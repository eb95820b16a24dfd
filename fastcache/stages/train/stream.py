"""Rows of a cache in shuffled order: random units, mixed in a buffer.

`order.py` says which rows come when; here they are read, some units ahead, and held. A checkpoint holds row numbers and a
random state, not activations, and a resumed stream goes on with the very same batches.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from fastcache.cache_format.reader import Cache
from fastcache.cache_format.stream import ReadUnit, unit_stream
from fastcache.cache_format.unit_array import Rows
from fastcache.errors import IntegrityError
from fastcache.stages.train.order import Numbers, UnitOrder, mixed_order, rows_of_units
from fastcache.stages.train.selection import Selection

SPREAD_UNITS, SPREAD_ROWS = 2048, 32_768
"""The most units, and about the most rows, of the sample that a trained SAE is measured on."""


def read_units(cache: Cache, hook: str, seed: int, position: int = 0, skip: bool = False) -> Iterator[ReadUnit]:
    """The units of the cache in the order of `UnitOrder`, beginning at `position`, for ever."""
    order = UnitOrder(len(cache.units()), seed, position)
    return unit_stream(cache, hook, iter(order.next_unit, -1), skip=skip)


class MixingBuffer:
    """The mixing buffer: gives batches of rows, every row that is kept exactly once in each epoch."""

    def __init__(
        self,
        cache: Cache,
        hook: str,
        capacity: int,
        batch_size: int,
        seed: int,
        on_corrupt: str = "stop",
        selection: Selection | None = None,
    ) -> None:
        """`on_corrupt` is `stop`, or `skip`: then the rows of a damaged unit are left out of their batches.

        Rows that `selection` drops for their norm are left out of their batches too, which are then smaller.
        Raises `InputError` if the cache can't fill a single batch.
        """
        self._cache, self._hook, self._seed, self._skip = cache, hook, seed, on_corrupt == "skip"
        self._selection = selection or Selection(cache.n_tokens)
        self._order = mixed_order(cache, capacity, batch_size, seed, self._selection.mask)
        self._places = rows_of_units(cache)
        self._units = read_units(cache, hook, seed, skip=self._skip)
        self._rows: Rows = np.empty((self._order.capacity, cache.d_in), cache.row_dtype)
        self._pending: Rows = self._rows[:0]  # read, but not yet in a slot
        self._pending_is_damaged = False
        self.skipped: dict[int, str] = {}
        """Units that were damaged and left out, by number, with the reason."""
        self.n_read = self.n_too_large = 0
        """Rows put into the buffer so far, and those of them that were left out for their norm."""

    def _store(self, slots: Numbers) -> None:
        """Put the rows that are read next into `slots`."""
        filled = 0
        while filled < len(slots):
            if not len(self._pending):
                unit, rows, error = next(self._units)
                self._pending = rows[self._selection.of_rows(*self._places[unit].tolist())]
                self._pending_is_damaged = error is not None
                if error is not None:
                    self.skipped[unit] = str(error)
            taken = min(len(self._pending), len(slots) - filled)
            mine = slots[filled : filled + taken]
            if self._pending_is_damaged:
                self._order.numbers[mine] = -1
            else:
                self._rows[mine] = self._pending[:taken]
                self._leave_out(mine)
            self._pending = self._pending[taken:]
            filled += taken
        self._pending = self._pending.copy()  # the reader uses its memory again

    def _leave_out(self, slots: Numbers) -> None:
        """Mark what was put into `slots` and is too large."""
        self.n_read += len(slots)
        too_large = self._selection.too_large(self._rows[slots], self._cache.manifest.dtype)
        if too_large is not None and too_large.any():
            self._order.numbers[slots[too_large]] = -1
            self.n_too_large += int(too_large.sum())

    def next_batch(self) -> tuple[Numbers, Rows]:
        """Row numbers `[batch_size]` and rows `[batch_size, d_in]`, as stored, of the next batch.

        There are fewer where some are of a unit that was skipped, or too large.
        """
        while True:
            while self._order.needs_rows:
                self._store(self._order.refill())
            slots = self._order.next_slots()
            if self.skipped or self.n_too_large:
                slots = slots[self._order.numbers[slots] >= 0]
            if len(slots):
                return self._order.numbers[slots], np.take(self._rows, slots, axis=0)

    @cached_property
    def spread_rows(self) -> Rows:
        """Rows `[n, d_in]`, as stored, spread over all of those that are trained on: all of them where they are few.

        They are the same wherever the stream stands, so that what is measured on them doesn't depend on interruptions.
        Neighbouring rows resemble each other: a few random rows of many units say more than many rows of a few units.
        """
        n_units = min(len(self._places), SPREAD_UNITS)
        of_unit, rng = SPREAD_ROWS // n_units, np.random.Generator(np.random.PCG64([self._seed, 2]))
        order = UnitOrder(len(self._places), self._seed)
        chosen = [self._rows[:0]]
        units = islice(iter(order.next_unit, -1), n_units)
        for unit, rows, error in unit_stream(self._cache, self._hook, units, skip=self._skip):
            if error is not None:
                continue
            kept = rows[self._selection.of_rows(*self._places[unit].tolist())]
            too_large = self._selection.too_large(kept, self._cache.manifest.dtype)
            kept = kept if too_large is None else kept[~too_large]
            picked = np.sort(rng.permutation(len(kept))[:of_unit])
            chosen.append(kept[picked])
        return np.concatenate(chosen)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Numbers]]:
        """Where the stream stands: a JSON-ready part, and the numbers of the rows that it holds."""
        scalars, arrays = self._order.state_dict()
        skipped = {str(unit): reason for unit, reason in self.skipped.items()}
        return {**scalars, "skipped": skipped, "n_read": self.n_read, "n_too_large": self.n_too_large}, arrays

    def load_state_dict(self, scalars: dict[str, Any], arrays: dict[str, Numbers]) -> None:
        """Go back to where `state_dict` was taken; reads the rows from the cache again."""
        self._order.load_state_dict(scalars, arrays)
        self._units = read_units(self._cache, self._hook, self._seed, self._order.position, self._skip)
        self.skipped = {int(unit): reason for unit, reason in scalars["skipped"].items()}
        self.n_read, self.n_too_large = scalars["n_read"], scalars["n_too_large"]
        waiting = self._order.waiting
        waiting = waiting[self._order.numbers[waiting] >= 0]
        self._rows[waiting] = self._cache.gather(self._hook, self._order.numbers[waiting])
        try:
            self._pending, self._pending_is_damaged = self._cache.gather(self._hook, self._order.pending), False
        except IntegrityError:
            if not self._skip:
                raise
            self._pending = np.zeros((len(self._order.pending), self._cache.d_in), self._cache.row_dtype)
            self._pending_is_damaged = True
