"""A run computes with the threads that it began with, because the last bits of sums depend on their number."""

import json

import pytest
import torch

from fastcache.errors import FormatError
from fastcache.progress import Silent
from fastcache.stages.train.config import TrainConfig
from fastcache.stages.train.run import train
from fastcache.stages.train.sweep import sweep
from fastcache.stages.train.sweep_config import sweep_config
from fastcache.stages.train.threads import THREADS_FILE
from fastcache.stages.train.trainer import Trainer

STEPS = 12
SETTINGS = {"layer": 1, "batch_size": 64, "tokens": 64 * STEPS, "checkpoint_every": 5}


@pytest.fixture
def threads():
    """Sets how many threads torch takes by itself, for the length of a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def steps(monkeypatch):
    """The threads of every step, and of the initialisation, that is made; `stop_after` steps the run dies."""
    made, step, initialise = [], Trainer.step, Trainer.initialise

    def recorded(trainer, x):
        if len(made) == recorded.stop_after:
            raise RuntimeError("killed")
        made.append(torch.get_num_threads())
        return step(trainer, x)

    def begun(trainer, *given):
        made.append(torch.get_num_threads())
        initialise(trainer, *given)

    recorded.stop_after = None
    monkeypatch.setattr(Trainer, "step", recorded)
    monkeypatch.setattr(Trainer, "initialise", begun)
    return made, recorded


class Said(Silent):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def test_threads_are_written_down_before_the_first_step(small_cache, tmp_path, threads, steps):
    made, control = steps
    control.stop_after = 1
    threads(2)
    with pytest.raises(RuntimeError, match="killed"):
        train(TrainConfig(cache=str(small_cache), arch="topk", **SETTINGS), tmp_path / "sae", Silent())
    assert made == [2]
    assert json.loads((tmp_path / "sae" / THREADS_FILE).read_text()) == {"threads": 2}


@pytest.mark.parametrize("n_steps", [1, 3, 9])
def test_a_resumed_run_takes_the_threads_that_it_began_with(small_cache, tmp_path, threads, steps, n_steps):
    """Killed before its first checkpoint, and after it."""
    config, (made, control), said = TrainConfig(cache=str(small_cache), arch="topk", **SETTINGS), steps, Said()
    threads(3)
    control.stop_after = n_steps
    with pytest.raises(RuntimeError, match="killed"):
        train(config, tmp_path / "sae", Silent())
    threads(1)
    control.stop_after = None
    train(config, tmp_path / "sae", said)
    assert set(made) == {3}
    assert torch.get_num_threads() == 1
    assert any("begun with 3 threads, not 1" in line for line in said.lines)


def test_all_passes_of_a_sweep_take_the_threads_that_it_began_with(small_cache, tmp_path, threads, steps):
    made, control = steps
    runs = [{"arch": "topk", "k": 4}, {"arch": "topk", "k": 4, "batch_size": 32}]
    config = sweep_config({"cache": str(small_cache), "base": SETTINGS, "runs": runs})
    threads(3)
    control.stop_after = 4
    with pytest.raises(RuntimeError, match="killed"):
        sweep(config, tmp_path / "sweep", Silent())
    threads(1)
    control.stop_after = None
    sweep(config, tmp_path / "sweep", Silent())
    assert set(made) == {3}
    assert len(made) > STEPS + 2 * STEPS
    for folder in (tmp_path / "sweep").iterdir():
        if folder.is_dir():
            assert json.loads((folder / THREADS_FILE).read_text()) == {"threads": 3}


def test_a_fresh_run_takes_the_threads_of_today(small_cache, tmp_path, threads, steps):
    config, (made, _) = TrainConfig(cache=str(small_cache), arch="topk", **SETTINGS), steps
    threads(3)
    train(config, tmp_path / "sae", Silent())
    threads(2)
    made.clear()
    train(config, tmp_path / "sae", Silent(), fresh=True)
    assert set(made) == {2}


@pytest.mark.parametrize("text", ["{}", '{"threads": 0}', '{"threads": "two"}', '{"threads": 1000000000}', "damage"])
def test_a_damaged_number_of_threads_is_refused(small_cache, tmp_path, text):
    config = TrainConfig(cache=str(small_cache), arch="topk", **SETTINGS)
    train(config, tmp_path / "sae", Silent())
    (tmp_path / "sae/sae.json").unlink()
    (tmp_path / "sae" / THREADS_FILE).write_text(text)
    with pytest.raises(FormatError, match=THREADS_FILE):
        train(config, tmp_path / "sae", Silent())
