"""Processes that send themselves a signal at an exact moment, so that it doesn't depend on how busy the machine is."""

import os
import signal
import time
from importlib import import_module
from itertools import count
from pathlib import Path

from processes import start

STEP = "fastcache.stages.train.member:Member.step"
CHECKPOINT_BEGINS = "fastcache.stages.train.checkpoint:save_file"
CHECKPOINT_HALF_WRITTEN = "fastcache.stages.train.checkpoint:write_file"
PART_WRITTEN = "fastcache.cache_format.storage:LocalStorage.publish"
PART_PUBLISHED = "fastcache.cache_format.storage:LocalStorage.append"


def signal_in(moment, number, which, function, *arguments):
    """Call `function`; before call `number` (from 0) of `moment`, a function of a module, the signal comes."""
    module, _, name = moment.partition(":")
    owner, (*path, last) = import_module(module), name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, calls = getattr(owner, last), count()

    def signalled(*given, **options):
        if next(calls) == number:
            os.kill(os.getpid(), which)
        return real(*given, **options)

    setattr(owner, last, signalled)
    if which == signal.SIGINT:
        signal.signal(which, signal.default_int_handler)  # a script may have begun the tests in its background
    function(*arguments)


def command(words):
    """Run our command line."""
    from fastcache.pipeline.cli import main

    main([str(word) for word in words])


def die(moment, number, function, *arguments):
    """Have `function` called by a process that is killed at that moment."""
    process = start(signal_in, moment, number, signal.SIGKILL, function, *arguments)
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"{moment} wasn't called {number + 1} times"


def start_stopped(moment, number, function, *arguments):
    """A process that stands still at that moment, until it gets SIGCONT."""
    process = start(signal_in, moment, number, signal.SIGSTOP, function, *arguments)
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert process.is_alive(), f"{moment} wasn't called {number + 1} times"
        time.sleep(0.01)
    return process
