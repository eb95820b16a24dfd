"""Training with the fast steps: where it leads, that it resumes bit for bit, and that it can be switched off."""

import sys
from dataclasses import replace
from inspect import unwrap

import pytest
import torch
from safetensors.torch import load, save

from fastcache.errors import InputError
from fastcache.sae.fast import products, sparse, threads
from fastcache.stages.train import trainer as trainer_module
from fastcache.stages.train.config import ARCHES, TrainConfig
from fastcache.stages.train.recipe import resolve
from fastcache.stages.train.trainer import Trainer

D_IN, BATCH, STEPS = 16, 200, 24


def recipe_of(arch, **settings):
    given = {"arch": arch, "expansion": 16, "batch_size": BATCH, "tokens": BATCH * STEPS, "lr": 1e-3, "dead_window": 5}
    return resolve(TrainConfig(cache="", **{**given, **settings}), D_IN, BATCH * STEPS)


def batches():
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(64, D_IN, generator=generator)
    for _ in range(STEPS):
        active = torch.rand(BATCH, 64, generator=generator) * (torch.rand(BATCH, 64, generator=generator) < 0.05)
        yield active @ directions


def trained(recipe, stop=STEPS):
    sae_trainer = Trainer(recipe, "cpu")
    sae_trainer.choose_products()
    sae_trainer.initialise(next(batches()))
    figures = [sae_trainer.step(x) for _, x in zip(range(stop), batches(), strict=False)]
    return sae_trainer, figures


def choose(precision, monkeypatch):
    """Have products made in `precision`, whatever this machine is fast at."""
    monkeypatch.setattr(trainer_module, "choose_route", lambda *_: products.ROUTES[precision])


@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("arch", ["standard", "jumprelu"])
def test_fast_training_goes_where_plain_training_goes(arch, decoder_norm):
    results = [trained(recipe_of(arch, plain=plain, decoder_norm=decoder_norm)) for plain in (True, False)]
    for plain, fast in zip(*(figures for _, figures in results), strict=True):
        assert abs(plain.loss - fast.loss) <= 1e-4 * plain.loss
    for name, value in results[0][0].sae.named_parameters():
        found = dict(results[1][0].sae.named_parameters())[name]
        assert (found - value).norm() <= 1e-3 * value.norm(), name


@pytest.mark.parametrize(("arch", "precision"), [(arch, "float32") for arch in ARCHES] + [("jumprelu", "bf16")])
def test_a_resumed_trainer_goes_on_bit_for_bit(arch, precision, monkeypatch):
    monkeypatch.setattr(sparse, "ON", 0.2)  # so that some steps are dense and some aren't
    monkeypatch.setattr(sparse, "OFF", 0.2)
    monkeypatch.setattr(sparse, "CAPACITY", 1.0)
    choose(precision, monkeypatch)
    recipe = recipe_of(arch, precision=precision)
    whole = trained(recipe)[0]
    for stop in (1, 7, 15):
        scalars, tensors = trained(recipe, stop)[0].state_dict()
        other = Trainer(recipe, "cpu")
        other.load_state_dict(scalars, load(save({name: value.contiguous() for name, value in tensors.items()})))
        other.choose_products()
        for number, x in enumerate(batches()):
            if number >= stop:
                other.step(x)
        wanted, found = whole.state_dict()[1], other.state_dict()[1]
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_plain_uses_no_fast_step(monkeypatch):
    def fails(*_):
        raise AssertionError

    monkeypatch.setattr(trainer_module, "fast_step", fails)
    monkeypatch.setattr(trainer_module.FastAdam, "clipped_step", fails)
    sae_trainer, _ = trained(recipe_of("standard", plain=True), 3)
    assert sae_trainer.sae.W_enc.is_contiguous()


def test_without_a_compiler_training_is_the_same_and_says_so(monkeypatch):
    with_compiler = trained(recipe_of("jumprelu"), 5)[1][-1]
    for module in ("fastcache.sae.fast.step", "fastcache.stages.train.trainer"):
        monkeypatch.setattr(f"{module}.compiles", False)
    sae_trainer, figures = trained(recipe_of("jumprelu"), 5)
    assert abs(figures[-1].loss - with_compiler.loss) <= 1e-5 * with_compiler.loss
    assert "numba" in sae_trainer.choose_products()[0]


def test_the_way_to_multiply_is_kept_by_a_resumed_run(monkeypatch):
    choose("bf16", monkeypatch)
    recipe = recipe_of("standard", precision="bf16")
    state = trained(recipe, 2)[0].state_dict()
    choose("float32", monkeypatch)
    other = Trainer(recipe, "cpu")
    other.load_state_dict(*state)
    assert other.choose_products() == []
    assert other.state_dict()[0]["route"] == "bf16"


def test_a_precision_that_brings_nothing_is_said(monkeypatch):
    choose("float32", monkeypatch)
    notes = Trainer(recipe_of("standard", precision="bf16"), "cpu").choose_products()
    assert notes[-1] == "Products in bf16 are no faster on this machine; these are in float32."


def test_a_short_run_and_a_long_one_multiply_in_the_same_way(monkeypatch):
    choose("bf16", monkeypatch)
    for tokens in (BATCH, 10**8):
        sae_trainer = Trainer(recipe_of("standard", precision="bf16", tokens=tokens), "cpu")
        assert sae_trainer.choose_products() == []
        assert sae_trainer.state_dict()[0]["route"] == "bf16"


def test_training_does_without_the_compiler_of_torch(monkeypatch):
    """Whose import takes seconds; torch's optimisers do it at the first call of each method."""
    for method in vars(torch.optim.Optimizer).values():
        monkeypatch.delattr(unwrap(method), "__dynamo_disable", raising=False)
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    with pytest.raises(ImportError):
        torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    recipe = recipe_of("standard")
    state = trained(recipe, 2)[0].state_dict()
    Trainer(recipe, "cpu").load_state_dict(*state)


def test_plain_and_a_precision_exclude_each_other():
    with pytest.raises(InputError, match="--precision tf32 was asked for"):
        recipe_of("standard", plain=True, precision="tf32")
    assert replace(recipe_of("standard"), plain=True).precision == "float32"


@pytest.mark.skipif(not threads.compiles, reason="nothing can be compiled here")
def test_a_sparse_sae_is_trained_sparsely():
    sae_trainer, figures = trained(recipe_of("standard", coefficient=200.0, coefficient_warm_up=0.0, lr=0.02))
    assert figures[-1].l0 < sparse.ON * 16 * D_IN
    assert sae_trainer.state_dict()[0]["sparse"]
