"""FVU's denominator and its interval, against a bootstrap by hand; what can't be known has neither value nor interval."""

import numpy as np
import pytest
import torch

from fastcache.sae import bootstrap, metrics
from fastcache.sae.architectures import StandardSae
from fastcache.sae.bootstrap import resampled, with_intervals
from fastcache.sae.metrics import Metrics
from fastcache.sae.spread import NEGLIGIBLE, Spread, unexplained
from fastcache.stages.evaluate.with_model import figures_of

D_IN, N_DIALOGUES = 12, 40


def dialogues_of(mean, n_dialogues=N_DIALOGUES, seed=0):
    """Activations and dialogue numbers of dialogues of different lengths, each about a centre of its own."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 30, n_dialogues)
    numbers = np.repeat(np.arange(n_dialogues), lengths)
    direction = np.ones(D_IN) / D_IN**0.5
    x = rng.normal(size=(len(numbers), D_IN)) / D_IN**0.5 + mean * direction
    x += 0.5 * rng.normal(size=(n_dialogues, D_IN))[numbers] / D_IN**0.5
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(numbers)


def centred_sae(x):
    """Reconstructs a part of the distance to the mean, more along some dimensions than others: FVU of about 0.3."""
    sae = StandardSae(D_IN, 2 * D_IN)
    sae.W_enc.copy_(torch.cat([torch.eye(D_IN), -torch.eye(D_IN)], 1))
    sae.W_dec.copy_(sae.W_enc.T * torch.linspace(0.1, 1.0, D_IN))
    sae.b_dec.copy_(x.mean(0))
    sae.b_enc.copy_(-(x.mean(0) @ sae.W_enc))
    return sae


def measured(sae, x, masks, dialogues, batches=3):
    """Metrics of whole dialogues, in several batches."""
    sums = Metrics(tuple(f"set {i}" for i in range(len(masks))), D_IN, sae.d_sae)
    for part in torch.arange(int(dialogues.max()) + 1).chunk(batches):
        rows = (dialogues >= part[0]) & (dialogues <= part[-1])
        sums.update(sae, x[rows], masks[:, rows], dialogues[rows] - part[0])
    return sums.result()["splits"]


@pytest.mark.parametrize("mean", [0.0, 3.0, 30.0])
def test_the_interval_of_fvu_is_that_of_a_bootstrap_by_hand(mean):
    x, numbers = dialogues_of(mean)
    sae = centred_sae(x)
    masks = torch.stack([torch.ones(len(x), dtype=torch.bool), torch.arange(len(x)) % 3 == 0])
    found = measured(sae, x, masks, numbers)
    errors = (sae(x).double() - x.double()).square().sum(1).numpy()
    for name, mask in zip(found, masks.numpy(), strict=True):
        centre = x.double().numpy()[mask].mean(0)
        distances = ((x.double().numpy() - centre) ** 2).sum(1)
        rng, values = np.random.default_rng(bootstrap.SEED), []
        for weights in rng.multinomial(N_DIALOGUES, np.full(N_DIALOGUES, 1 / N_DIALOGUES), bootstrap.N_SAMPLES):
            tokens = weights[numbers.numpy()] * mask
            values.append((tokens * errors).sum() / (tokens * distances).sum())
        assert found[name]["fvu"] == pytest.approx(errors[mask].sum() / distances[mask].sum(), rel=1e-6)
        assert found[name]["intervals"]["fvu"] == pytest.approx(np.quantile(values, [0.025, 0.975]), rel=1e-5)


def test_the_interval_does_not_depend_on_the_mean():
    widths = []
    for mean in (0.0, 30.0):
        x, numbers = dialogues_of(mean)
        found = measured(centred_sae(x), x, torch.ones(1, len(x), dtype=torch.bool), numbers)
        low, high = found["set 0"]["intervals"]["fvu"]
        widths.append(high - low)
    assert widths[0] == pytest.approx(widths[1], rel=0.01)


def test_the_spread_of_each_dialogue_equals_brute_force():
    x, numbers = dialogues_of(5.0)
    masks = torch.stack([torch.ones(len(x), dtype=torch.bool), (torch.arange(len(x)) % 7 == 0) & (numbers > 3)])
    spread = Spread(2, D_IN)
    for rows in (numbers < 11, numbers >= 11):
        spread.update(x[rows], masks[:, rows], numbers[rows] - numbers[rows].min())
    found = spread.by_dialogue()
    for i, mask in enumerate(masks):
        centre = x[mask].double().mean(0)
        assert torch.allclose(spread.mean(i), centre.float(), rtol=1e-6)
        for dialogue in range(N_DIALOGUES):
            mine = x[mask & (numbers == dialogue)].double()
            assert found[dialogue, i] == pytest.approx(float((mine - centre).square().sum()), rel=1e-9)
    assert (found[:4, 1] == 0).all()


def test_a_set_of_one_token_has_its_vector_as_mean():
    x, spread = torch.randn(1, D_IN), Spread(2, D_IN)
    spread.update(x, torch.tensor([[True], [False]]), torch.tensor([0]))
    assert torch.allclose(spread.mean(), x[0])
    assert not spread.mean(1).any()
    assert spread.by_dialogue() == pytest.approx(np.zeros((1, 2)), abs=1e-12)


def test_dialogues_without_tokens_of_a_set_do_not_count_in_it():
    x, numbers = dialogues_of(1.0)
    sae, mask = centred_sae(x), numbers % 3 == 1
    mask &= torch.cat([torch.tensor([True]), numbers.diff() > 0])  # one token of every third dialogue
    found = measured(sae, x, torch.stack([numbers >= 0, mask]), numbers)["set 1"]
    errors = (sae(x).double() - x.double())[mask].square().mean(1)
    assert (found["n_tokens"], found["n_dialogues"]) == (13, 13)
    assert found["mse"] == pytest.approx(float(errors.mean()), rel=1e-6)
    assert found["mse"] == pytest.approx(found["mse_pooled"])
    total = (sae(x).double() - x.double()).square().mean(1).sum()
    assert found["share_of_squared_error"] == pytest.approx(float(errors.sum() / total), rel=1e-6)


def test_without_any_error_no_set_has_a_share_of_it():
    sae = StandardSae(D_IN, D_IN)
    found = measured(sae, torch.zeros(4, D_IN), torch.ones(1, 4, dtype=torch.bool), torch.arange(4), batches=1)["set 0"]
    assert (found["share_of_squared_error"], found["mse"], found["log2_mse"], found["fvu"]) == (0.0, 0.0, None, None)


def test_windows_and_densities_are_those_of_the_documentation():
    assert metrics.WINDOWS == (10_000, 100_000, 1_000_000, 10_000_000)
    assert np.allclose(metrics.DENSITY_EDGES, np.arange(-8, 0.1, 0.25))
    assert metrics.L0_QUANTILES == (0.05, 0.25, 0.5, 0.75, 0.95)


def test_saes_that_share_the_spread_have_the_figures_of_each_alone():
    x, numbers = dialogues_of(3.0)
    masks = torch.ones(1, len(x), dtype=torch.bool)
    saes = [centred_sae(x), StandardSae(D_IN, 5)]
    shared = Spread(1, D_IN)
    shared.update(x, masks, numbers)
    for sae in saes:
        together = Metrics(("all",), D_IN, sae.d_sae, "cpu", shared)
        together.update(sae, x, masks, numbers)
        alone = Metrics(("all",), D_IN, sae.d_sae)
        alone.update(sae, x, masks, numbers)
        assert together.result() == alone.result()


@pytest.mark.parametrize("norm", [1.0, 1e5])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 5e-4])
@pytest.mark.parametrize("n_dialogues", [2, 30, 100])
def test_of_equal_vectors_nothing_can_be_explained(norm, noise, n_dialogues):
    rng = np.random.default_rng(0)
    vector = rng.normal(size=D_IN) * norm
    x = torch.from_numpy((vector * (1 + noise * rng.normal(size=(n_dialogues, D_IN)))).astype(np.float32))
    found = measured(StandardSae(D_IN, 4), x, torch.ones(1, n_dialogues, dtype=torch.bool), torch.arange(n_dialogues))
    assert found["set 0"]["fvu"] is None
    assert found["set 0"]["intervals"]["fvu"] == [None, None]
    assert found["set 0"]["mse"] > 0


def test_vectors_that_differ_by_more_than_rounding_have_an_fvu():
    x, numbers = dialogues_of(300.0)
    fvu = measured(centred_sae(x), x, torch.ones(1, len(x), dtype=torch.bool), numbers)["set 0"]["fvu"]
    assert fvu == pytest.approx(0.3, abs=0.1)


def test_the_limit_is_relative_to_the_power():
    for power in (1e-6, 1.0, 1e12):
        spread = np.array([0.99, 1.01]) * NEGLIGIBLE * power
        assert np.isnan(unexplained(power, spread, power)).tolist() == [True, False]
    assert np.isnan(unexplained(np.float64(0), np.float64(0), np.float64(0)))


def test_a_figure_without_a_value_has_no_interval():
    samples = {"a": np.array([1.0, 2.0, np.nan]), "b": np.array([1.0, 2.0, 3.0])}
    found = with_intervals({"a": 1.5, "b": np.inf}, samples)
    assert (found["a"], found["b"]) == (1.5, None)
    assert found["intervals"] == {"a": pytest.approx([1.025, 1.975]), "b": [None, None]}


def test_samples_are_drawn_with_replacement_from_all_dialogues():
    drawn = resampled(np.eye(7)[:, :, None])[:, :, 0]
    assert drawn.shape == (bootstrap.N_SAMPLES, 7)
    assert (drawn.sum(1) == 7).all()
    assert drawn.mean(0) == pytest.approx(np.ones(7), abs=0.1)
    assert drawn.var(0) == pytest.approx(np.full(7, 6 / 7), abs=0.15)  # n p (1 - p)


@pytest.mark.parametrize(("cost", "known"), [(0.0, False), (1e-7, False), (1e-3, True), (-1e-3, True)])
def test_what_an_ablation_does_not_cost_cannot_be_recovered(cost, known):
    loss, n = 3.0, 10
    columns = np.array([n, n * loss, n * loss * (1 + cost), n * (loss + 1), n * (loss + 0.5), 0.0])
    figures = figures_of(columns)
    assert np.isfinite(figures["loss_recovered"]) == known
    assert figures["loss_recovered_from_mean"] == pytest.approx(0.5)


def test_intervals_are_made_as_the_documentation_says():
    assert (bootstrap.N_SAMPLES, bootstrap.LEVEL, bootstrap.SEED) == (1000, 0.95, 0)
    assert NEGLIGIBLE == 2**-18


@pytest.mark.parametrize(("n", "most"), [(7, 100), (7, 10**6), (200, 100)])
def test_no_more_weights_are_held_than_said(monkeypatch, n, most):
    held, make = [], np.random.default_rng

    class Counting:
        def __init__(self, seed):
            self._rng = make(seed)

        def multinomial(self, n, shares, size):
            held.append(size * len(shares))
            return self._rng.multinomial(n, shares, size)

    monkeypatch.setattr(bootstrap, "MOST_WEIGHTS", most)
    monkeypatch.setattr(np.random, "default_rng", Counting)
    assert resampled(np.ones((n, 1))).shape == (1000, 1)
    assert sum(held) == 1000 * n
    assert max(held) <= max(n, most)
    assert len(held) == {(7, 100): 72, (7, 10**6): 1, (200, 100): 1000}[n, most]
