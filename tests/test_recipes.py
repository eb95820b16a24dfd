"""The two recipes, the trainer that follows them, and what watches the loss."""

import json

import numpy as np
import pytest
import torch

import fastcache
from fastcache.errors import InputError, NonFiniteError
from fastcache.progress import Silent
from fastcache.sae.architectures import ARCHITECTURES
from fastcache.sae.storage import load_sae
from fastcache.stages.train.config import ARCHES, TrainConfig
from fastcache.stages.train.recipe import resolve
from fastcache.stages.train.run import train
from fastcache.stages.train.trainer import Trainer
from fastcache.stages.train.watch import FIRST_STEPS, LossWatch

HOOK = "resid_post.1"


def recipe_of(d_in=64, n_rows=50_000_000, **options):
    return resolve(TrainConfig(cache="", **{"arch": "jumprelu", **options}), d_in, n_rows)


def clusters(n, d_in, seed=0, offset=0.0):
    """Activations `[n, d_in]` that sparse latents explain."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3 * d_in, d_in, generator=torch.Generator().manual_seed(99))
    strengths = torch.rand(n, 3 * d_in, generator=generator) * (torch.rand(n, 3 * d_in, generator=generator) < 0.03)
    return strengths @ directions + offset


def trained(steps=400, batch=256, d_in=24, offset=0.0, **options):
    recipe = recipe_of(d_in, n_rows=10**6, batch_size=batch, tokens=steps * batch, lr=2e-3, **options)
    trainer = Trainer(recipe, "cpu")
    trainer.initialise(clusters(4096, d_in, 1, offset))
    for step in range(steps):
        x = clusters(batch, d_in, 10 + step, offset)
        figures = trainer.step(x)
    return trainer, trainer.figures(x, figures)


def test_every_architecture_can_be_chosen():
    assert set(ARCHES) == set(ARCHITECTURES)


def test_fast_paper_is_the_papers():
    recipe = recipe_of(n_rows=40_960_000, recipe="fast-paper")
    trainer = Trainer(recipe, "cpu")
    assert (recipe.steps, recipe.batch_size, recipe.lr, recipe.lr_end) == (320_000, 128, 7e-5, pytest.approx(7e-6))
    rate = trainer._rate
    assert (rate.warm_up_steps, rate.decay_steps, trainer._coefficient_steps) == (16_000, 64_000, 10_000)
    assert (recipe.coefficient, recipe.bandwidth, recipe.threshold, recipe.theta) == (0.01, 0.001, 0.001, "log")
    assert (recipe.dead_window, recipe.clip_norm, recipe.seed) == (1000, 1.0, 42)
    assert not recipe.scale_activations
    assert recipe.target_l0 is None
    assert recipe_of(recipe="fast-paper", arch="standard").coefficient == 5.0


def test_modern_is_the_default():
    recipe = recipe_of(d_in=2048)
    assert (recipe.name, recipe.batch_size, recipe.steps) == ("modern", 4096, 10_000)
    assert recipe.lr == recipe.lr_end == pytest.approx(2e-4)
    assert (recipe.scale_activations, recipe.theta, recipe.target_l0) == (True, "direct", 64)


def test_given_options_win_over_the_recipe():
    options = {
        "batch_size": 77,
        "lr": 0.5,
        "theta": "log",
        "scale_activations": False,
        "target_l0": 9.0,
        "lr_decay": 0.0,
    }
    recipe = recipe_of(**options)
    assert {name: getattr(recipe, name) for name in options} == options


def test_a_small_cache_gets_smaller_batches_and_a_thousand_steps():
    recipe = recipe_of(n_rows=600_000)
    assert (recipe.batch_size, recipe.steps) == (512, 1171)
    assert (recipe_of(n_rows=1000).batch_size, recipe_of(n_rows=1000).steps) == (256, 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "topk", "recipe": "fast-paper"}, "standard and jumprelu"),
        ({"arch": "standard", "k": 3}, "--k is an option of --arch topk and batchtopk and matryoshka"),
        ({"arch": "topk", "target_l0": 3.0}, "--target-l0 is an option of --arch jumprelu"),
        ({"arch": "topk", "coefficient": 3.0}, "Set --k instead"),
        ({"arch": "matryoshka", "widths": (8, 4)}, "expected rising numbers"),
        ({"arch": "matryoshka", "widths": (8, 4000)}, "up to d_sae, 512"),
        ({"arch": "topk", "k": 513}, "more than d_sae, 512"),
        ({"target_l0": 600.0}, "more than d_sae, 512"),
        ({"tokens": 100}, "less than one batch"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        recipe_of(**options)


def test_the_resolved_recipe_stands_in_the_runs_files(small_cache, tmp_path):
    config = TrainConfig(cache=str(small_cache), arch="jumprelu", layer=1, tokens=2560)
    train(config, tmp_path / "sae", Silent())
    resolved = json.loads((tmp_path / "sae/run.json").read_text())["settings"]["resolved"]
    training = load_sae(tmp_path / "sae")[1]["training"]
    assert resolved["lr"] == 2e-4 / (256 / 2**14) ** 0.5
    assert resolved.items() <= training.items()


@pytest.mark.parametrize("arch", ["standard", "jumprelu"])
def test_fast_paper_keeps_decoder_rows_at_unit_norm(arch):
    trainer, _ = trained(steps=20, arch=arch, recipe="fast-paper")
    assert torch.allclose(trainer.sae.W_dec.norm(dim=1), torch.ones(trainer.sae.d_sae), atol=1e-5)


def test_jumprelu_alone_reaches_its_target_l0():
    _, line = trained(target_l0=5.0)
    assert line["l0"] == pytest.approx(5, rel=0.3)
    assert line["fvu"] < 0.3


@pytest.mark.parametrize("arch", ["topk", "batchtopk", "matryoshka"])
def test_modern_architectures_reconstruct_at_k(arch):
    _, line = trained(arch=arch, k=5)
    assert line["l0"] <= 5.0
    assert line["fvu"] < 0.3


@pytest.mark.parametrize("arch", ["standard", "gated"])
def test_modern_l1_architectures_are_sparse(arch):
    trainer, line = trained(arch=arch)
    assert line["l0"] < trainer.sae.d_sae / 3
    assert line["fvu"] < 0.4


def test_modern_does_not_mind_units_or_offset():
    lines = [trained(steps=100, target_l0=5.0)[1]]
    recipe = recipe_of(24, n_rows=10**6, batch_size=256, tokens=25_600, lr=2e-3, target_l0=5.0)
    trainer = Trainer(recipe, "cpu")
    trainer.initialise(1000 * clusters(4096, 24, 1))
    for step in range(100):
        x = 1000 * clusters(256, 24, 10 + step)
        figures = trainer.step(x)
    lines.append(trainer.figures(x, figures))
    assert lines[0]["fvu"] == pytest.approx(lines[1]["fvu"], rel=1e-3)
    # It takes longer: the offset's power is part of the scale, so that what is to be told apart is smaller.
    assert trained(steps=1000, target_l0=5.0, offset=3.0)[1]["fvu"] < 0.28


def test_dead_latents_come_back_with_the_auxiliary_loss():
    dead = {}
    for coefficient in (0.0, 1 / 32):
        recipe = recipe_of(24, n_rows=10**6, batch_size=256, tokens=256 * 300, lr=2e-3, arch="topk", k=5, dead_window=20,
                           aux_coefficient=coefficient)  # fmt: skip
        trainer = Trainer(recipe, "cpu")
        trainer.initialise(clusters(4096, 24, 1))
        trainer.sae.b_enc[:60] -= 4.0  # these start dead
        for step in range(300):
            x = clusters(256, 24, 10 + step)
            figures = trainer.step(x)
        dead[coefficient] = trainer.figures(x, figures)["dead_latents"]
    assert dead[0.0] > 50
    assert dead[1 / 32] < 25


def test_thresholds_stay_at_zero_or_more():
    trainer, _ = trained(steps=30, threshold=0.001, theta_lr=100.0)
    assert float(trainer.sae.threshold.min()) >= 0


def test_gradients_are_clipped():
    recipe = recipe_of(24, n_rows=10**6, recipe="fast-paper", arch="standard", clip_norm=0.5, plain=True)
    trainer = Trainer(recipe, "cpu")
    trainer.initialise(clusters(1000, 24))
    trainer.step(100 * clusters(128, 24, 3))
    grads = torch.cat([value.grad.flatten() for value in trainer.sae.parameters()])
    assert float(grads.norm()) <= 0.5 * (1 + 1e-5)


def test_nan_stops_training_and_names_step_and_unit(small_cache, tmp_path, monkeypatch):
    from fastcache.cache_format.reader import Cache

    cache = fastcache.open_cache(small_cache)
    row = cache.first_row(1) + 300  # part 1, unit 1
    real = Cache.gather
    monkeypatch.setattr(Cache, "gather", lambda *a: np.where(a[2][:, None] == row, np.uint16(0x7FC0), real(*a)))
    watch = LossWatch(cache, HOOK, tmp_path, every=1)
    watch.add(6, torch.tensor(1.0), np.arange(5))
    with pytest.raises(NonFiniteError, match=r"at step 7\. 1 rows .* part 1, unit 1, row 300 .* checkpoint is kept"):
        watch.add(7, torch.tensor(torch.nan), np.arange(row - 3, row + 3))


def test_divergence_on_finite_rows_is_told_from_bad_rows(small_cache, tmp_path):
    config = TrainConfig(cache=str(small_cache), arch="standard", layer=1, tokens=12_800, lr=1e30, clip_norm=0)
    with pytest.raises(NonFiniteError, match="so training diverged; the row of the largest norm"):
        train(config, tmp_path / "sae", Silent())
    assert not (tmp_path / "sae/sae.json").exists()


def test_looking_seldom_stops_at_the_same_step(small_cache, tmp_path):
    watch = LossWatch(fastcache.open_cache(small_cache), HOOK, tmp_path, every=10)
    losses = torch.ones(20)
    losses[4] = torch.inf
    for step in range(1, 10):
        watch.add(step, losses[step - 1], np.arange(5))
    with pytest.raises(NonFiniteError, match="at step 5"):
        watch.add(10, losses[9], np.arange(5))


def test_a_loss_spike_is_logged_with_the_row_of_the_largest_norm(small_cache, tmp_path):
    cache = fastcache.open_cache(small_cache)
    watch = LossWatch(cache, HOOK, tmp_path, every=7)
    for step in range(1, FIRST_STEPS + 50):
        watch.add(step, torch.tensor(10.0 if step == FIRST_STEPS + 20 else 1.0), np.arange(step, step + 30))
    watch.look()
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    norms = np.linalg.norm(cache.residuals(HOOK, 120, 150), axis=1)
    assert (event["event"], event["step"]) == ("loss spike", FIRST_STEPS + 20)
    assert event["row"] == 120 + norms.argmax()
    assert event["largest_norm"] == pytest.approx(norms.max(), rel=1e-6)
