"""Many SAEs from one reading: each is what a run of its own would have made."""

import shutil

import pytest
import torch
from deaths import die
from safetensors.torch import load_file

from fastcache.errors import InputError, MismatchError, NonFiniteError, SpaceError
from fastcache.progress import Silent
from fastcache.stages.train import sweep as sweep_module
from fastcache.stages.train.member import Member
from fastcache.stages.train.run import train
from fastcache.stages.train.stream import MixingBuffer
from fastcache.stages.train.sweep import plan_sweep, sweep
from fastcache.stages.train.sweep_config import parse_memory, sweep_config

BASE = {"layer": 1, "batch_size": 64, "tokens": 64 * 40, "buffer_tokens": 512, "checkpoint_every": 10, "expansion": 4}


def make_config(cache, **values):
    return sweep_config({"cache": str(cache), "base": BASE, **values})


MIXED = {
    "runs": [
        {"arch": "jumprelu", "target_l0": 4},
        {"arch": "jumprelu", "target_l0": 8, "seed": 7},
        {"arch": "topk", "k": 4, "tokens": 64 * 25},
        {"arch": "standard", "tokens_of": "content"},
    ]
}


@pytest.fixture(scope="module")
def swept(small_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("swept") / "sweep"
    return out, sweep(make_config(small_cache, **MIXED), out, Silent())


def weights(folder):
    return load_file(folder / "sae.safetensors")


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=0)


def test_each_member_is_what_train_makes_with_its_settings(swept, small_cache, tmp_path):
    out, result = swept
    assert [member["state"] for member in result["members"].values()] == ["trained"] * 4
    for name, config in make_config(small_cache, **MIXED).members.items():
        train(config, tmp_path / name, Silent())
        assert_same_weights(weights(out / name), weights(tmp_path / name))
        assert (out / name / "metrics.jsonl").read_bytes() == (tmp_path / name / "metrics.jsonl").read_bytes()
        assert (out / name / "sae.json").read_bytes() == (tmp_path / name / "sae.json").read_bytes()


def test_members_on_the_same_rows_share_one_stream(small_cache, tmp_path, monkeypatch):
    streams = []
    monkeypatch.setattr(
        MixingBuffer,
        "__init__",
        lambda self, *given, _init=MixingBuffer.__init__: (streams.append(1), _init(self, *given))[1],
    )
    config = make_config(small_cache, grid={"arch": ["topk", "standard"], "seed": [1, 2]})
    sweep(config, tmp_path / "sweep", Silent())
    assert len(streams) == 1


def test_other_rows_or_batches_are_another_pass(small_cache):
    plan = plan_sweep(make_config(small_cache, **MIXED))
    assert sorted(map(len, plan.passes)) == [1, 3]
    assert [name for names in plan.passes for name in names if "content" in name] == plan.passes[-1]


def test_what_does_not_fit_together_takes_turns(small_cache):
    grid = {"arch": ["topk"], "seed": [1, 2, 3]}
    together = plan_sweep(make_config(small_cache, grid=grid))
    assert [len(names) for names in together.passes] == [3]
    plan = plan_sweep(make_config(small_cache, grid=grid, memory=int(together.memory) - 1))
    assert [len(names) for names in plan.passes] == [2, 1]
    assert plan.memory < together.memory
    with pytest.raises(SpaceError, match="topk-seed-1 needs about"):
        plan_sweep(make_config(small_cache, grid=grid, memory=1000))


def test_members_that_take_turns_end_with_the_same_bits_as_together(swept, small_cache, tmp_path):
    """How many fit into the memory together depends on what else the machine does."""
    together = make_config(small_cache, **MIXED)
    alone = max(plan_sweep(make_config(small_cache, runs=[run])).memory for run in MIXED["runs"])
    config = make_config(small_cache, memory=alone + 1, **MIXED)
    assert len(plan_sweep(config).passes) > len(plan_sweep(together).passes)
    sweep(config, tmp_path / "sweep", Silent())
    for name in together.members:
        for file in ("sae.safetensors", "sae.json", "metrics.jsonl"):
            assert (tmp_path / "sweep" / name / file).read_bytes() == (swept[0] / name / file).read_bytes()


def test_a_member_that_fails_does_not_stop_the_others(swept, small_cache, tmp_path, monkeypatch):
    config = make_config(small_cache, **MIXED)
    victim = list(config.members)[1]
    step = Member.step

    def failing(self, x, numbers):
        if self.out.name == victim and self.trainer.step_number == 15:
            raise NonFiniteError("Training became NaN or infinite at step 15.")
        step(self, x, numbers)

    monkeypatch.setattr(Member, "step", failing)
    out = tmp_path / "sweep"
    result = sweep(config, out, Silent())
    assert result["members"][victim] == {
        "state": "failed", "step": 15, "reason": "Training became NaN or infinite at step 15.",
    }  # fmt: skip
    for name in config.members:
        if name != victim:
            assert_same_weights(weights(out / name), weights(swept[0] / name))
    assert sweep(config, out, Silent()) == result  # it would fail again


def test_a_sweep_that_is_done_does_nothing(swept, small_cache, monkeypatch):
    out, result = swept
    monkeypatch.setattr(sweep_module, "train_together", None)
    assert sweep(make_config(small_cache, **MIXED), out, Silent()) == result


def test_other_members_are_refused_in_the_same_folder(swept, small_cache):
    with pytest.raises(MismatchError, match=r"members\.standard-tokens-of-content"):
        sweep(make_config(small_cache, runs=MIXED["runs"][:3]), swept[0], Silent())


def sweep_in_threads(config, out, n_threads):
    torch.set_num_threads(n_threads)
    sweep(config, out, Silent())


@pytest.mark.parametrize("n_checkpoints", [1, 3, 5])
def test_a_sweep_that_is_killed_goes_on_bit_for_bit(swept, small_cache, tmp_path, n_checkpoints):
    out = tmp_path / "sweep"
    config = make_config(small_cache, **MIXED)
    # Some members have written their checkpoint of this moment by then, others haven't.
    die(
        "fastcache.stages.train.member:save_checkpoint",
        n_checkpoints,
        sweep_in_threads,
        config,
        out,
        torch.get_num_threads(),
    )
    assert len(list(out.glob("*/checkpoints/[0-9]*"))) == n_checkpoints
    result = sweep(config, out, Silent())
    assert result["members"] == swept[1]["members"]
    for name in result["members"]:
        assert_same_weights(weights(out / name), weights(swept[0] / name))


def test_a_grid_is_every_combination_and_a_list_is_as_it_stands(small_cache):
    members = make_config(
        small_cache, grid={"seed": [1, 2]}, runs=[{"arch": "topk", "k": 3}, {"arch": "jumprelu", "target-l0": 5.0}]
    ).members
    assert list(members) == [
        "topk-k-3-seed-1", "topk-k-3-seed-2", "jumprelu-seed-1-target-l0-5.0", "jumprelu-seed-2-target-l0-5.0",
    ]  # fmt: skip
    assert {member.shuffle_seed for member in members.values()} == {42}
    assert members["topk-k-3-seed-2"].seed == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing to train"),
        ({"grid": {"arch": ["topk", "topk"]}}, "two members are topk-?"),
        ({"grid": {"arch": "topk"}}, "arch should be a list"),
        ({"runs": ["topk"]}, "list of mappings"),
        ({"gird": {}}, "no key 'gird'.*Did you mean 'grid'"),
        ({"runs": [{"arch": "topk", "kk": 3}]}, "no option 'kk'"),
        ({"runs": [{"arch": "topk", "checkpoint_every": 3}]}, "checkpoint_every is the same for all"),
        ({"base": {}, "runs": [{"arch": "topk"}], "memory": "lots"}, "--memory 'lots': expected a size"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        sweep_config({"cache": "somewhere", **values})


@pytest.mark.parametrize(("text", "size"), [("16GB", 16e9), ("1.5 TB", 1.5e12), ("800mb", 8e8), (12, 12), (None, None)])
def test_sizes_are_understood(text, size):
    assert parse_memory(text) == size


def test_a_member_that_can_not_be_trained_is_named_before_anything_is_written(small_cache, tmp_path):
    config = make_config(small_cache, runs=[{"arch": "topk"}, {"arch": "standard", "k": 3}])
    with pytest.raises(InputError, match="standard-k-3: --k is an option of"):
        sweep(config, tmp_path / "sweep", Silent())
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_goes_on_where_its_cache_was_moved(small_cache, tmp_path):
    shutil.copytree(small_cache, tmp_path / "before")
    runs = [{"arch": "topk", "k": 4}, {"arch": "topk", "k": 8}]
    sweep(make_config(tmp_path / "before", runs=runs), tmp_path / "sweep", Silent())
    (tmp_path / "before").rename(tmp_path / "after")
    result = sweep(make_config(tmp_path / "after", runs=runs), tmp_path / "sweep", Silent())
    assert [member["state"] for member in result["members"].values()] == ["trained"] * 2
