"""Commits to disk: in which order every command writes, flushes, renames and logs; see `recorder.py` for the rules."""

import ast
from pathlib import Path

import pytest
from commands import COMMANDS
from recorder import Recorder

import fastcache

PACKAGE = Path(fastcache.__file__).parent
IN_PROCESS = [name for name in COMMANDS if "workers" not in name]


@pytest.fixture(scope="session")
def recorded(command_inputs, undisturbed):
    return undisturbed


@pytest.mark.parametrize("name", IN_PROCESS)
def test_what_a_command_writes_is_durable_before_anything_says_so(name, undisturbed):
    _, recorder = undisturbed(name)
    assert recorder.faults == []
    assert any(kind == "rename" for kind, _ in recorder.changes)
