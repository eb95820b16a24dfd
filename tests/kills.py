"""Kills commands at drawn moments, has them go on, and compares what they leave with what an undisturbed run left.

A moment is the number of a change of the disk (`disk_changes.py`), which is the same on a busy machine; the long version
also kills by the clock, which reaches what lies between two changes.
"""

import random
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

from commands import COMMANDS, Inputs, Undisturbed, files_of
from disk_changes import run_and_die
from processes import kill, run_to_its_end, start, start_command

MOST_KILLS = 3
"""Of one output: each goes on where the one before died."""


class Outcome(NamedTuple):
    """What became of one output."""

    name: str
    how: str
    kills: int
    differences: list[str]
    """Files that are not what an undisturbed run leaves, or not there."""


def at_changes(words: list[Any], folder: Path, n_changes: int, rng: random.Random) -> int:
    """Kill the command and those that go on, each at a change; returns how often one was killed."""
    for number in range(MOST_KILLS):
        process = start(run_and_die, words, folder, rng.randint(1, n_changes))
        process.join()
        if process.exitcode == 0:
            return number
        assert process.exitcode == -9, f"ended by itself with {process.exitcode}"
    return MOST_KILLS


def by_the_clock(words: list[Any], folder: Path, seconds: float, rng: random.Random) -> int:
    """Kill the command and those that go on, each after a drawn time; returns how often one was killed."""
    for number in range(MOST_KILLS):
        process = start_command(*words)
        time.sleep(rng.random() * seconds)
        is_done = not process.is_alive()
        kill(process)
        if is_done:
            assert process.exitcode == 0, f"ended by itself with {process.exitcode}"
            return number
    return MOST_KILLS


def differences(folder: Path, name: str, undisturbed: Undisturbed) -> list[str]:
    files = files_of(folder, COMMANDS[name])
    names = sorted(files.keys() | undisturbed.files.keys())
    return [file for file in names if files.get(file) != undisturbed.files.get(file)]


def disturb(name: str, how: str, seed: int, inputs: Inputs, undisturbed: Undisturbed, folder: Path) -> Outcome:
    """Kill one command again and again in `folder`, let it finish, and compare."""
    command, rng = COMMANDS[name], random.Random(f"{name} {how} {seed}")
    folder.mkdir()
    command.before(inputs, folder)
    words = command.words(inputs, folder)
    if how == "at changes":
        kills = at_changes(words, folder, len(undisturbed.recorder.changes), rng)
    else:
        kills = by_the_clock(words, folder, undisturbed.seconds, rng)
    code, errors = run_to_its_end(words)
    is_done = command.says_when_done is not None and command.says_when_done in " ".join(errors.split())
    left = [f"exit code {code}: {errors}"] if code and not is_done else differences(folder, name, undisturbed)
    shutil.rmtree(folder)
    return Outcome(name, how, kills, left)


def table(outcomes: list[Outcome]) -> str:
    """A line for each command: how often it was killed, and how many of its outputs came out the same or otherwise."""
    lines = [f"{'command':20} {'kills':>6} {'outputs':>8} {'identical':>10} {'other':>6}"]
    for name in (*dict.fromkeys(outcome.name for outcome in outcomes), "all"):
        mine = [outcome for outcome in outcomes if name in (outcome.name, "all")]
        other = sum(bool(outcome.differences) for outcome in mine)
        kills = sum(outcome.kills for outcome in mine)
        lines.append(f"{name:20} {kills:6} {len(mine):8} {len(mine) - other:10} {other:6}")
    return "\n".join(lines)
