"""The mixing buffer is the paper's: half of it is given to training, the other half stays and is mixed with new rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastcache
from fastcache.stages.train.order import MixedOrder
from fastcache.stages.train.stream import MixingBuffer


def units_of(n_rows, unit):
    starts = np.arange(0, n_rows, unit)
    return np.stack([starts, np.minimum(starts + unit, n_rows)], axis=1)


def rounds_of(order, n_batches):
    """Of each refill but the first: the rows of the buffer before it, and after it; and what is given between two refills.

    The rows that are in the buffer are counted here, from the slots that are filled and given.
    """
    inside, refills, given_rows = set(), [], [[]]
    for _ in range(n_batches):
        while order.needs_rows:
            before = set(inside)
            inside |= set(order.numbers[order.refill()].tolist())
            refills.append((before, set(inside)))
            given_rows.append([])
        batch = order.numbers[order.next_slots()].tolist()
        inside -= set(batch)
        given_rows[-1] += batch
    return refills[1:], given_rows[1:]


@st.composite
def orders(draw):
    batch = draw(st.integers(1, 40))
    capacity = draw(st.integers(2 * batch, 12 * batch))
    n_rows = draw(st.integers(2 * capacity, 8 * capacity))
    order = MixedOrder(units_of(n_rows, draw(st.integers(1, 60))), capacity, batch, draw(st.integers(0, 99)))
    return order, capacity, batch, (n_rows - capacity) // batch  # batches before the last rows of the epoch are read


@settings(max_examples=60, deadline=None)
@given(orders())
def test_at_least_half_of_the_buffer_is_held_over_whenever_it_is_refilled(drawn):
    order, capacity, batch, n_batches = drawn
    for before, after in rounds_of(order, n_batches)[0]:
        assert len(after) == capacity
        assert before <= after
        assert capacity / 2 <= len(before) < capacity / 2 + batch + 1


def test_a_row_is_given_in_the_round_it_is_read_in_with_chance_one_half():
    """Each round gives a random half of the buffer, so the rounds that a row waits are geometric: 1/2, 1/4, 1/8, ..."""
    capacity, batch, n_rows = 2_000, 100, 200_000
    refills, given_rows = rounds_of(
        MixedOrder(units_of(n_rows, 50), capacity, batch, seed=3), (n_rows - capacity) // batch
    )
    read_in = {}
    for number, (before, after) in enumerate(refills):
        read_in |= dict.fromkeys(after - before, number)
    waited = [number - read_in[row] for number, rows in enumerate(given_rows[1:]) for row in rows if row in read_in]
    shares = np.bincount(waited)[:4] / len(waited)
    assert shares == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 16], abs=0.01)


def test_an_epoch_ends_with_an_empty_buffer():
    order = MixedOrder(units_of(1_000, 30), 200, 10, seed=0)
    given_rows = np.concatenate([order.next_batch() for _ in range(100)])
    assert np.array_equal(np.sort(given_rows), np.arange(1_000))


def test_training_gets_the_batches_of_this_order(small_cache):
    """What holds for the order above holds for the rows that training gets."""
    cache = fastcache.open_cache(small_cache)
    buffer = MixingBuffer(cache, "resid_post.1", 512, 64, seed=5)
    order = MixedOrder(_units(cache), 512, 64, seed=5)
    for _ in range(40):
        assert np.array_equal(buffer.next_batch()[0], order.next_batch())


def _units(cache):
    """First row and last row + 1 of each unit, from the format's units of a part each."""
    units, first = [], 0
    for index, part in enumerate(cache.parts):
        units += [(first + start, first + stop) for number, start, stop in cache.units().tolist() if number == index]
        first += part.record.n_tokens
    return np.array(units)
