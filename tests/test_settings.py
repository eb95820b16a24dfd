"""Settings that contradict each other, are out of range, or mean nothing are refused wherever they are built."""

import json

import pytest
import torch

from fastcache.errors import InputError
from fastcache.pipeline.cli import main
from fastcache.progress import Silent
from fastcache.sae.architectures import LogJumpReluSae
from fastcache.stages.evaluate.config import EvaluateConfig
from fastcache.stages.interpret.config import InterpretConfig
from fastcache.stages.steer.config import SteerConfig
from fastcache.stages.train.config import ARCHES, ShuffleConfig, TrainConfig
from fastcache.stages.train.recipe import resolve
from fastcache.stages.train.run import train
from fastcache.stages.train.selection import norm_factor


def recipe_of(arch="jumprelu", d_in=16, **options):
    return resolve(TrainConfig(cache="", arch=arch, **options), d_in, 10**6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_warm_up": 0.7, "lr_decay": 0.7}, "together 1.4 of them: the learning rate would jump"),
        ({"lr_warm_up": 0.9}, "--lr-warm-up 0.9 and --lr-decay 0.2"),
        ({"lr_decay": 0.96}, "--lr-warm-up 0.05 and --lr-decay 0.96"),
        ({"lr_decay": 0.96, "recipe": "fast-paper"}, "together 1.01"),
        ({"lr": 1e-4, "lr_end": 1e-3}, "--lr-end 0.001 is above the peak learning rate, 0.0001"),
        ({"lr_end": 0.5}, "is above the peak learning rate"),
        ({"arch": "topk", "coefficient_warm_up": 0.1}, "--coefficient-warm-up means nothing to topk"),
        ({"arch": "batchtopk", "coefficient": 1.0}, "--coefficient means nothing to batchtopk"),
        ({"arch": "gated", "aux_coefficient": 0.1}, "--aux-coefficient means nothing to gated"),
        ({"target_l0": 5.0, "coefficient": 0.0}, "--coefficient 0 leaves out the penalty"),
        ({"arch": "standard", "bandwidth": 1.0}, "--bandwidth is an option of --arch jumprelu, not of standard"),
        ({"arch": "gated", "theta_lr": 1.0}, "--theta-lr is an option of --arch jumprelu, not of gated"),
        ({"arch": "topk", "widths": (3,)}, "--widths is an option of --arch matryoshka, not of topk"),
        ({"arch": "topk", "k": 129}, "--k 129 is more than d_sae, 128"),
        ({"arch": "topk", "k": 9, "expansion": 1, "d_in": 8}, "--k 9 is more than d_sae, 8"),
        ({"plain": True, "precision": "bf16"}, "--plain multiplies in float32"),
        ({"batch_size": 512, "tokens": 511}, "less than one batch"),
    ],
)
def test_contradictory_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        recipe_of(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_warm_up": 0.7, "lr_decay": 0.3}, {"lr_warm_up": 0.35, "lr_decay": 0.65}, {"lr_warm_up": 1.0, "lr_decay": 0.0},
        {"lr_warm_up": 0.0, "lr_decay": 1.0}, {"lr": 1e-3, "lr_end": 1e-3}, {"target_l0": 5.0, "coefficient": 2.0},
        {"arch": "topk", "coefficient_warm_up": 0.0}, {"arch": "gated", "aux_coefficient": 0.0},
        {"arch": "standard", "coefficient": 0.0}, {"arch": "topk", "k": 128},
    ],
)  # fmt: skip
def test_options_at_the_edge_are_taken(options):
    recipe = recipe_of(**options)
    assert {name: getattr(recipe, name) for name in options} == options


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("recipe", ["modern", "fast-paper"])
def test_what_the_recipes_choose_goes_together(arch, recipe):
    if recipe == "fast-paper" and arch not in ("standard", "jumprelu"):
        return
    for d_in in (1, 7, 4096):
        chosen = recipe_of(arch, d_in, recipe=recipe)
        assert chosen.lr_warm_up + chosen.lr_decay <= 1
        assert chosen.k is None or chosen.k <= chosen.d_sae


@pytest.mark.parametrize(
    "options",
    [
        {"arch": "nope"}, {"expansion": -3}, {"expansion": 10**9}, {"seed": 10**23}, {"seed": -1}, {"shuffle_seed": 2**63},
        {"keep_checkpoints": 0}, {"batch_size": 0}, {"k": 0}, {"k": 2.5}, {"k": True}, {"k": "5"}, {"bandwidth": 0.0},
        {"bandwidth": -1.0}, {"threshold": 0.0}, {"lr": 0.0}, {"lr": float("nan")}, {"lr": float("inf")}, {"lr_decay": 1.5},
        {"recipe": None}, {"widths": (3, 0)}, {"widths": 3}, {"plain": 1}, {"cache": 5}, {"tokens_of": "everything"},
        {"target_l0": 0.0}, {"dead_window": 0}, {"device": 1}, {"precision": "float64"}, {"checkpoint_every": 0},
    ],
)  # fmt: skip
def test_values_that_can_not_be_are_refused_in_python_too(options):
    with pytest.raises(InputError, match=f"TrainConfig: {next(iter(options))} = "):
        TrainConfig(**{"cache": "", "arch": "jumprelu", **options})


def test_other_settings_are_checked_in_python_too():
    for build in (
        lambda: EvaluateConfig(sae=("a",), cache="c", max_instances=0),
        lambda: EvaluateConfig(sae="a", cache="c"),  # a text is no list of folders
        lambda: SteerConfig(sae="a", latent=(-1,)),
        lambda: InterpretConfig(sae="a", cache="c", top=0),
        lambda: ShuffleConfig(seed=10**23),
    ):
        with pytest.raises(InputError, match="Config: "):
            build()
    assert EvaluateConfig(sae=["a", "b"], cache="c").sae == ["a", "b"]
    assert TrainConfig(cache="", arch="jumprelu", target_l0=5).target_l0 == 5


@pytest.mark.parametrize("options", ["--lr-warm-up 0.7 --lr-decay 0.7", "--seed 1" + 23 * "0", "--lr-end 9 --lr 1"])
def test_train_refuses_them_before_anything_is_written(small_cache, tmp_path, capsys, options):
    command = f"train --cache {small_cache} --layer 1 --arch topk --out {tmp_path / 'out'} {options}"
    with pytest.raises(SystemExit) as exit_info:
        main(command.split())
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("Error: ")
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_the_largest_seed_trains(small_cache, tmp_path):
    config = TrainConfig(cache=str(small_cache), arch="topk", layer=1, seed=2**63 - 1, tokens=512)
    assert train(config, tmp_path / "sae", Silent())["training"]["seed"] == 2**63 - 1
    assert json.loads((tmp_path / "sae/sae.json").read_text())["training"]["shuffle_seed"] == 2**63 - 1


@pytest.mark.parametrize("text", ["1x-median", "0.5x-median", "x-median", "10", "9" * 400 + "x-median", "-3x-median"])
def test_a_norm_filter_needs_a_factor(text):
    with pytest.raises(InputError, match="expected a factor above 1"):
        norm_factor(text)


def test_a_norm_filter_that_leaves_nothing_is_refused(small_cache, tmp_path, monkeypatch):
    monkeypatch.setattr("fastcache.stages.train.selection.norm_factor", lambda _: 1e-6)
    config = TrainConfig(cache=str(small_cache), arch="topk", layer=1, norm_filter="2x-median", tokens_of="special")
    with pytest.raises(InputError, match="no rows that --norm-filter 2x-median keeps"):
        train(config, tmp_path / "sae", Silent())


def test_a_threshold_of_zero_has_a_logarithm():
    sae = LogJumpReluSae(4, 8)
    sae.set_threshold(torch.zeros(8))
    assert torch.isfinite(sae.log_threshold).all()
    assert sae.theta.max() < 1e-11
