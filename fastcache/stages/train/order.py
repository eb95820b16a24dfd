"""The order of shuffled rows: which unit is read next, which slots of the buffer its rows get, which slots make a batch.

    fill the buffer; shuffle; give half of it to training; refill; shuffle; ...      (docs/method.md)

Numbers only: nothing here reads a residual. So the shuffle that training gets can be measured without one (`shuffle.py`),
reading may run ahead of the order without changing it, and a checkpoint is where the order stands.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.reader import Cache
from fastcache.errors import InputError

Numbers = npt.NDArray[np.int64]


class UnitOrder:
    """Units in a seeded order, a new one each epoch, for ever; `position` is where it stands."""

    def __init__(self, n_units: int, seed: int, position: int = 0) -> None:
        self._n_units, self._seed = n_units, seed
        self.position = position
        self._epoch = -1
        self._order: Numbers = np.empty(0, np.int64)

    @property
    def at_epoch_start(self) -> bool:
        """Whether the next unit is the first of an epoch."""
        return self.position % self._n_units == 0

    def next_unit(self) -> int:
        """Number of the next unit."""
        epoch, index = divmod(self.position, self._n_units)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._n_units)
            self._epoch = epoch
        self.position += 1
        return int(self._order[index])


class MixedOrder:
    """What the mixing buffer does, without its rows: every row exactly once in each epoch.

    Whoever holds the rows asks in turn: while `needs_rows`, put the rows that are read next into the slots of `refill`;
    then the slots of `next_slots` are a batch. `numbers` says which row is in which slot.

    The buffer never moves its rows: a permutation of the slots is the shuffle, and new rows take the slots of those given.
    When an epoch's units are used up, the buffer is drained; the rows that make no whole batch wait for the next epoch.
    """

    def __init__(
        self, units: Numbers, capacity: int, batch_size: int, seed: int, mask: npt.NDArray[np.bool_] | None = None
    ) -> None:
        """`units` `[n_units, 2]`: number of the first row, and of the last row + 1, of each unit.

        `mask` `[n_rows]` says which rows are given; without it, all.
        """
        n_rows = int((units[:, 1] - units[:, 0]).sum()) if mask is None else int(mask.sum())
        self.capacity = min(max(capacity, 2 * batch_size), n_rows)
        self.numbers: Numbers = np.full(self.capacity, -1, np.int64)
        self._units, self._batch_size, self._mask = units, batch_size, mask
        self._unit_order = UnitOrder(len(units), seed)
        self._rng = np.random.Generator(np.random.PCG64([seed, 1]))
        self._order: Numbers = np.empty(0, np.int64)  # filled slots, shuffled
        self._given = 0  # how many of them have been given away
        self.pending: Numbers = self.numbers[:0]
        """Rows of the last unit that found no free slot: they come first in the next refill."""

    @property
    def position(self) -> int:
        """How many units were taken; the reader stands there, or further on where it reads ahead."""
        return self._unit_order.position

    @property
    def waiting(self) -> Numbers:
        """Slots whose rows are still to be given."""
        return self._order[self._given :]

    @property
    def _epoch_used_up(self) -> bool:
        return self.position > 0 and self._unit_order.at_epoch_start and not len(self.pending)

    @property
    def needs_rows(self) -> bool:
        """Whether a refill is due: half of the buffer was given, or all of it once the epoch is used up."""
        n = len(self._order)
        limit = n if self._epoch_used_up else min(n, max(n // 2, self._batch_size))
        return self._given + self._batch_size > limit

    def refill(self) -> Numbers:
        """Slots for the rows that are read next, in the order of reading; then shuffles.

        A new epoch begins only in a drained buffer.
        """
        waiting = self.waiting
        is_free = np.ones(self.capacity, bool)
        is_free[waiting] = False
        free, filled = np.flatnonzero(is_free), 0
        while filled < len(free):
            if not len(self.pending):
                if self._epoch_used_up and (filled or len(waiting) >= self._batch_size):
                    break
                self.pending = self._rows_of(self._unit_order.next_unit())
            taken = min(len(self.pending), len(free) - filled)
            self.numbers[free[filled : filled + taken]] = self.pending[:taken]
            self.pending = self.pending[taken:]
            filled += taken
        self._order = self._rng.permutation(np.concatenate([waiting, free[:filled]]))
        self._given = 0
        return free[:filled]

    def _rows_of(self, unit: int) -> Numbers:
        start, stop = self._units[unit].tolist()
        return np.arange(start, stop) if self._mask is None else start + np.flatnonzero(self._mask[start:stop])

    def next_slots(self) -> Numbers:
        """Slots `[batch_size]` of the next batch, once no rows are needed."""
        slots = self._order[self._given : self._given + self._batch_size]
        self._given += self._batch_size
        return slots

    def next_batch(self) -> Numbers:
        """Row numbers `[batch_size]` of the next batch, for those who hold no rows."""
        while self.needs_rows:
            self.refill()
        return self.numbers[self.next_slots()]

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Numbers]]:
        """Where the order stands: a JSON-ready part, and the numbers of the rows in the buffer."""
        state = self._rng.bit_generator.state
        large = {key: str(value) for key, value in state["state"].items()}  # 128 bits: too long for JSON numbers
        random_state = {**large, "has_uint32": state["has_uint32"], "uinteger": state["uinteger"]}
        scalars = {"position": self.position, "given": self._given, "random_state": random_state}
        return scalars, {"numbers": self.numbers, "order": self._order, "pending": self.pending}

    def load_state_dict(self, scalars: dict[str, Any], arrays: dict[str, Numbers]) -> None:
        """Go back to where `state_dict` was taken."""
        self._unit_order.position = scalars["position"]
        self._given = scalars["given"]
        saved = scalars["random_state"]
        self._rng.bit_generator.state = {
            "bit_generator": "PCG64",
            "state": {"state": int(saved["state"]), "inc": int(saved["inc"])},
            "has_uint32": saved["has_uint32"],
            "uinteger": saved["uinteger"],
        }
        self.numbers, self._order, self.pending = (arrays[name].copy() for name in ("numbers", "order", "pending"))


def rows_of_units(cache: Cache) -> Numbers:
    """First row and last row + 1 of every unit `[n_units, 2]`, counted over the whole cache."""
    units = cache.units()
    first_rows = np.array([cache.first_row(part) for part in range(len(cache.parts))], np.int64)
    return units[:, 1:] + first_rows[units[:, 0], None]


def require_batch(cache: Cache, n_rows: int, batch_size: int) -> None:
    """Raise `InputError` if the `n_rows` of `cache` that are given can't fill a single batch."""
    if n_rows < batch_size:
        kept = "" if n_rows == cache.n_tokens else " to train on"
        raise InputError(
            f"{cache.path} has {n_rows:,} rows{kept}, fewer than one batch of {batch_size:,}. "
            "Lower --batch-size, or extract more tokens."
        )


def mixed_order(
    cache: Cache, capacity: int, batch_size: int, seed: int, mask: npt.NDArray[np.bool_] | None = None
) -> MixedOrder:
    """The order of the rows of `cache` that `mask` keeps; raises `InputError` if they can't fill a single batch."""
    require_batch(cache, cache.n_tokens if mask is None else int(mask.sum()), batch_size)
    return MixedOrder(rows_of_units(cache), capacity, batch_size, seed, mask)
