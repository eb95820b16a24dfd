"""Sees every change that this process makes to the disk below a folder, and may end the process at one of them.

A change is the opening of a file for writing, a write, a flush, a rename, a new or a removed folder or file. They are
counted, so that a kill falls at the same change in every run, however busy the machine is.
"""

import os
import signal
import sys
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_watchers = []


class Changes:
    """Calls `seen(kind, path, source)` before each change below `root`, until it is closed.

    `source` is the old name of what is renamed, and otherwise None.
    """

    def __init__(self, root, seen):
        self.root, self.seen = str(Path(root).resolve()), seen
        self._fsync, self._write = os.fsync, os.write

    def __enter__(self):
        if not _watchers:
            sys.addaudithook(_hook)  # it can't be taken away again
        _watchers.append(self)
        os.fsync, os.write = self._see_fsync, self._see_write
        return self

    def __exit__(self, *_):
        os.fsync, os.write = self._fsync, self._write
        _watchers[_watchers.index(self)] = None

    def _below(self, path):
        return path == self.root or path.startswith(self.root + os.sep)

    def see(self, kind, path, source=None):
        if self._below(path):
            self.seen(kind, path, source)

    def _see_fsync(self, descriptor):
        self.see("flush", _path_of(descriptor))
        self._fsync(descriptor)

    def _see_write(self, descriptor, data):
        path = _path_of(descriptor)
        if self._below(path):
            half = memoryview(data)[: len(data) // 2]
            if half:  # a write may be torn
                self._write(descriptor, half)
                self.seen("write", path, None)
                return len(half) + self._write(descriptor, memoryview(data)[len(half) :])
        return self._write(descriptor, data)


def _path_of(descriptor):
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _absolute(path, folder=-1):
    base = Path.cwd() if folder in (-1, None) else Path(_path_of(folder))
    return str(base / os.fsdecode(path))


def _hook(event, arguments):
    if not any(_watchers) or event not in _KINDS:
        return
    change = _KINDS[event](*arguments)
    for watcher in _watchers:
        if watcher is not None and change is not None:
            watcher.see(*change)


def _opened(path, _mode, flags):
    if isinstance(path, str | bytes | os.PathLike) and flags & WRITING:
        return "open", _absolute(path)
    return None


_KINDS = {
    "open": _opened,
    "os.rename": lambda old, new, there, here: ("rename", _absolute(new, here), _absolute(old, there)),
    "os.mkdir": lambda path, _mode, folder: ("mkdir", _absolute(path, folder)),
    "os.remove": lambda path, folder: ("remove", _absolute(path, folder)),
    "os.rmdir": lambda path, folder: ("remove", _absolute(path, folder)),
}


def signal_at(root, change, number=signal.SIGKILL, name=""):
    """Give this process a signal at a change below `root`: the one of this number, from 1, among those of such a name."""
    left = change

    def seen(_kind, path, _source):
        nonlocal left
        left -= name in path
        if left == 0:
            left = -1
            os.kill(os.getpid(), number)

    return Changes(root, seen)


def run_and_die(words, root, change, name=""):
    """Run a command of our command line that is killed at a change; see `signal_at`."""
    run_and_signal(words, root, change, signal.SIGKILL, name)


def run_and_signal(words, root, change, number, name=""):
    """Run a command of our command line that gets a signal at a change; see `signal_at`."""
    from fastcache.pipeline.cli import main

    with signal_at(root, change, number, name):
        main([str(word) for word in words])
