"""Every command that writes, killed at drawn moments: what comes out is what comes out undisturbed, to the byte."""

import os

import pytest
from commands import COMMANDS
from kills import MOST_KILLS, disturb, table

OUTPUTS = int(os.environ.get("FASTCACHE_KILLED_OUTPUTS", "8"))
"""Outputs of each command that the long version kills in each way, each up to three times."""
FEW = {"prepare": 3, "repair": 0, "train": 1, "evaluate": 0, "interpret": 1, "judge": 2, "steer": 2, "dashboard": 1}
"""What the usual suite kills, with a seed at which the first kill comes late enough to leave something."""


@pytest.fixture(scope="module")
def outcomes():
    """All of them; the table is printed at the end."""
    found = []
    yield found
    print(f"\n{table(found)}")


@pytest.mark.usefixtures("quick_judge")
@pytest.mark.parametrize("name", FEW)
def test_killed_at_a_change_of_the_disk_it_goes_on(name, command_inputs, undisturbed, outcomes, tmp_path):
    outcome = disturb(name, "at changes", FEW[name], command_inputs, undisturbed(name), tmp_path / "place")
    outcomes.append(outcome)
    assert outcome.differences == []
    assert outcome.kills > 0


@pytest.mark.long
@pytest.mark.usefixtures("quick_judge")
@pytest.mark.parametrize("how", ["at changes", "by the clock"])
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_again_and_again_it_goes_on(name, how, command_inputs, undisturbed, outcomes, tmp_path, capsys):
    mine = [
        disturb(name, how, seed, command_inputs, undisturbed(name), tmp_path / str(seed)) for seed in range(OUTPUTS)
    ]
    outcomes += mine
    with capsys.disabled():
        print("\n" + table(mine).splitlines()[-2])
    assert [outcome.differences for outcome in mine if outcome.differences] == []
    if how == "at changes":  # by the clock, a command may be too quick
        assert 0 < sum(outcome.kills for outcome in mine) <= MOST_KILLS * OUTPUTS
