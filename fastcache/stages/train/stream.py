"""Rows of a cache in shuffled order: random units, mixed in a buffer.

    fill the buffer; shuffle; give half of it to training; refill; shuffle; ...      (method.md section 5)

The buffer never moves its rows: a permutation of the slots is the shuffle, and new rows take the slots of those given.
It knows the number of each of its rows, so a checkpoint holds numbers and a random state, not activations, and a
resumed stream goes on with the very same batches.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.reader import Cache, Rows
from fastcache.cache_format.schema import STORED_DTYPES
from fastcache.errors import InputError

Numbers = npt.NDArray[np.int64]


class UnitStream:
    """Units of the cache in a seeded order, a new one each epoch, for ever; `position` is where it stands."""

    def __init__(self, cache: Cache, hook: str, seed: int, position: int = 0) -> None:
        self._cache, self._hook, self._seed = cache, hook, seed
        self._units = cache.units()
        self.position = position
        self._epoch = -1
        self._order: Numbers = np.empty(0, np.int64)

    @property
    def at_epoch_start(self) -> bool:
        """Whether the next unit is the first of an epoch."""
        return self.position % len(self._units) == 0

    def next_unit(self) -> tuple[Numbers, Rows]:
        """Row numbers `[n]` and rows `[n, d_in]`, as stored, of the next unit."""
        epoch, index = divmod(self.position, len(self._units))
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(len(self._units))
            self._epoch = epoch
        part, start, stop = self._units[self._order[index]].tolist()
        self.position += 1
        rows = self._cache.parts[part].rows(self._hook, start, stop)
        return np.arange(start, stop) + self._cache.first_row(part), rows


class MixingBuffer:
    """The mixing buffer: gives batches of rows, every row of the cache exactly once in each epoch.

    When an epoch's units are used up, the buffer is drained; the rows that make no whole batch wait for the next epoch.
    """

    def __init__(self, cache: Cache, hook: str, capacity: int, batch_size: int, seed: int) -> None:
        """Raises `InputError` if the cache can't fill a single batch."""
        if cache.n_tokens < batch_size:
            raise InputError(
                f"{cache.path} has {cache.n_tokens:,} rows, fewer than one batch of {batch_size:,}. "
                "Lower --batch-size, or extract more tokens."
            )
        self._cache, self._hook, self._batch_size = cache, hook, batch_size
        self.capacity = min(max(capacity, 2 * batch_size), cache.n_tokens)
        self._units = UnitStream(cache, hook, seed)
        self._rng = np.random.Generator(np.random.PCG64([seed, 1]))
        self._rows: Rows = np.empty((self.capacity, cache.d_in), STORED_DTYPES[cache.manifest.dtype])
        self._numbers: Numbers = np.full(self.capacity, -1, np.int64)
        self._order: Numbers = np.empty(0, np.int64)  # filled slots, shuffled
        self._given = 0  # how many of them have been given away
        self._pending: tuple[Numbers, Rows] = (self._numbers[:0], self._rows[:0])  # read, but not yet in a slot

    @property
    def _epoch_used_up(self) -> bool:
        return self._units.position > 0 and self._units.at_epoch_start and not len(self._pending[0])

    @property
    def _limit(self) -> int:
        """Rows to give before the next refill: half of the buffer, all of it once the epoch is used up."""
        n = len(self._order)
        return n if self._epoch_used_up else min(n, max(n // 2, self._batch_size))

    def _refill(self) -> None:
        """Put new rows into the slots given away, and shuffle; a new epoch begins only in a drained buffer."""
        waiting = self._order[self._given :]
        is_free = np.ones(self.capacity, bool)
        is_free[waiting] = False
        free, filled = np.flatnonzero(is_free), 0
        while filled < len(free):
            if not len(self._pending[0]):
                if self._epoch_used_up and (filled or len(waiting) >= self._batch_size):
                    break
                self._pending = self._units.next_unit()
            numbers, rows = self._pending
            taken = min(len(numbers), len(free) - filled)
            slots = free[filled : filled + taken]
            self._rows[slots], self._numbers[slots] = rows[:taken], numbers[:taken]
            self._pending = numbers[taken:], rows[taken:]
            filled += taken
        self._order = self._rng.permutation(np.concatenate([waiting, free[:filled]]))
        self._given = 0

    def next_batch(self) -> tuple[Numbers, Rows]:
        """Row numbers `[batch_size]` and rows `[batch_size, d_in]`, as stored, of the next batch."""
        while self._given + self._batch_size > self._limit:
            self._refill()
        slots = self._order[self._given : self._given + self._batch_size]
        self._given += self._batch_size
        return self._numbers[slots], np.take(self._rows, slots, axis=0)

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Numbers]]:
        """Where the stream stands: a JSON-ready part, and the numbers of the rows that it holds."""
        state = self._rng.bit_generator.state
        large = {key: str(value) for key, value in state["state"].items()}  # 128 bits: too long for JSON numbers
        random_state = {**large, "has_uint32": state["has_uint32"], "uinteger": state["uinteger"]}
        scalars = {"position": self._units.position, "given": self._given, "random_state": random_state}
        return scalars, {"numbers": self._numbers, "order": self._order, "pending": self._pending[0]}

    def load_state_dict(self, scalars: dict[str, Any], arrays: dict[str, Numbers]) -> None:
        """Go back to where `state_dict` was taken; reads the rows from the cache again."""
        self._units.position = scalars["position"]
        self._given = scalars["given"]
        saved = scalars["random_state"]
        self._rng.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {"state": int(saved["state"]), "inc": int(saved["inc"])},
            "has_uint32": saved["has_uint32"],
            "uinteger": saved["uinteger"],
        }
        self._numbers, self._order = arrays["numbers"].copy(), arrays["order"].copy()
        waiting = self._order[self._given :]
        self._rows[waiting] = self._cache.gather(self._hook, self._numbers[waiting])
        self._pending = arrays["pending"].copy(), self._cache.gather(self._hook, arrays["pending"])
