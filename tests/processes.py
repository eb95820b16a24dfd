"""Processes to be killed. They are forked off one that has imported what they need, which takes longer than what they do."""

import gc
import io
import os
import signal
import time
import traceback
from contextlib import contextmanager, redirect_stderr
from multiprocessing import get_context

forks = get_context("forkserver")
forks.set_forkserver_preload(
    [
        "fastcache.pipeline.commands.dashboard",
        "fastcache.pipeline.commands.evaluate",
        "fastcache.pipeline.commands.export",
        "fastcache.pipeline.commands.extract",
        "fastcache.pipeline.commands.interpret",
        "fastcache.pipeline.commands.prepare",
        "fastcache.pipeline.commands.repair",
        "fastcache.pipeline.commands.report",
        "fastcache.pipeline.commands.steer",
        "fastcache.pipeline.commands.train",
        "fastcache.stages.extract.add_layer",
        "fastcache.stages.extract.repair",
        "fastcache.stages.extract.run",
        "fastcache.stages.interpret.run",
        "fastcache.stages.prepare.run",
        "fastcache.stages.steer.run",
        "fastcache.stages.train.sweep",
        "pyarrow.dataset",
        "pytest",  # where it is the main module, each process imports it
        "tokenizers",
        "transformers.models.qwen2.modeling_qwen2",
    ]
)


@contextmanager
def _handling_ctrl_c(handler):
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def hearing_ctrl_c():
    """Processes started in the block receive Ctrl-C, even if the tests run in the background of a script and ignore it."""
    return _handling_ctrl_c(signal.default_int_handler)


def ignoring_ctrl_c():
    """Processes started in the block ignore Ctrl-C, as if a script had started them in the background."""
    return _handling_ctrl_c(signal.SIG_IGN)


def start(function, *arguments):
    """A process that calls `function`, of a module, and whose standard output is dropped."""
    process = forks.Process(target=_call, args=(dict(os.environ), function, arguments))
    process.start()
    return process


def start_command(*words):
    """A process of our command line."""
    return start(_main, [str(word) for word in words])


def _call(environment, function, arguments):
    os.environ.clear()  # that of the server is of an earlier test
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    function(*arguments)


def _main(words):
    from fastcache.pipeline.cli import main

    main(words)


def run_to_its_end(words, before=None, *arguments):
    """Run a command of our command line in a process; returns its exit code and what it said on standard error.

    `before`, of a module, is called first, with the arguments: it may set limits for the process.
    """
    mine, theirs = forks.Pipe(duplex=False)
    process = start(_run_and_tell, theirs, [str(word) for word in words], before, *arguments)
    theirs.close()
    said = mine.recv()
    process.join()
    return said


def _run_and_tell(connection, words, before, *arguments):
    code, errors = 0, io.StringIO()
    with redirect_stderr(errors):
        if before is not None:
            before(*arguments)
        try:
            _main(words)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            code = 1
            traceback.print_exc()
        gc.collect()  # what fails when it is forgotten says so now
    connection.send((code, errors.getvalue()))


def kill(process):
    process.kill()
    process.join()


def wait_for(condition, process, seconds=120):
    """Until it holds, or the process has come to its end, though not by failing."""
    for _ in range(seconds * 200):
        is_alive = process.is_alive()
        if condition():
            return
        if not is_alive:
            assert process.exitcode == 0
            return
        time.sleep(0.005)
    raise TimeoutError


def n_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0
