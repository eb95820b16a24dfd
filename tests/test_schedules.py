"""The learning rate and the sparsity coefficient over a run, whatever the shares of its phases are."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcache.sae.schedules import LearningRate, sparsity_coefficient
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.recipe import resolve
from fastcache.stages.train.trainer import Trainer

shares = st.floats(0, 1).map(lambda share: round(share, 3))


@settings(max_examples=150, deadline=None)
@given(shares, shares, st.integers(1, 60), st.floats(0, 1))
def test_the_learning_rate_never_rises_after_its_warm_up(warm_up, decay, n_steps, end):
    options = {"lr_warm_up": warm_up, "lr_decay": min(decay, round(1 - warm_up, 3)), "lr": 1.0, "lr_end": end}
    config = TrainConfig(cache="", arch="topk", k=1, batch_size=1, tokens=n_steps, **options)
    rate = Trainer(resolve(config, 2, 10**6), "cpu")._rate
    rates = [rate.at(step) for step in range(n_steps)]
    rising, falling = rates[: rate.warm_up_steps], rates[max(0, rate.warm_up_steps - 1) :]
    assert rising == sorted(rising)
    assert rising[-1:] in ([], [1.0])
    assert all(after <= before + 1e-12 for before, after in pairwise(falling))
    assert all(0 <= value <= 1 for value in rates)
    if rate.decay_steps:
        assert rates[-1] == pytest.approx(end / rate.decay_steps)


def test_phases_that_overlap_are_no_schedule():
    with pytest.raises(ValueError, match="6 steps of warm-up and 5 of decay are more than 10"):
        LearningRate(1.0, 0.1, 6, 5, 10)
    assert LearningRate(1.0, 0.1, 5, 5, 10).at(5) == pytest.approx(0.1)
    assert LearningRate(1.0, 0.1, 0, 0, 1).at(0) == 1.0


def test_without_a_warm_up_the_coefficient_is_there_at_once():
    assert sparsity_coefficient(5.0, 0, 0) == 5.0
    assert sparsity_coefficient(5.0, 1, 0) == 0.0


def test_every_step_of_a_short_run_by_hand():
    rate = LearningRate(peak=1.0, end=0.2, warm_up_steps=2, decay_steps=4, total_steps=10)
    cosine = [1.0, 0.2 + 0.4 * (1 + 2**-0.5), 0.6, 0.2 + 0.4 * (1 - 2**-0.5)]
    assert [rate.at(step) for step in range(10)] == pytest.approx([0.5, 1.0, *cosine, 0.2, 0.15, 0.1, 0.05])
    assert [sparsity_coefficient(3.0, 3, step) for step in range(5)] == pytest.approx([0.0, 1.0, 2.0, 3.0, 3.0])
