"""Never lose, never lie: kills, failing disks, other writers and clocks.

`make test-faults` runs the long versions too.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import synthetic
from conftest import tree_bytes
from disk_changes import Changes, signal_at
from processes import kill, n_lines, start, wait_for

import fastcache
from fastcache.cache_format.manifest import Log
from fastcache.cache_format.storage import LocalStorage
from fastcache.cache_format.verify import verify
from fastcache.errors import BusyError, FastcacheError, StorageError

TESTS = Path(__file__).parent
few_or_many = pytest.mark.parametrize("n", [25, pytest.param(200, marks=pytest.mark.long)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of an undisturbed cache."""
    root = tmp_path_factory.mktemp("whole")
    synthetic.write(root)
    return tree_bytes(root)


# Kills


def write_and_die(root, change):
    with signal_at(root, change):
        synthetic.write(root)


@few_or_many
def test_killed_at_any_moment_nothing_is_lost(n, whole, tmp_path):
    changes = []
    with Changes(tmp_path / "counted", lambda kind, *_: changes.append(kind)):
        synthetic.write(tmp_path / "counted")
    rng, unfinished = random.Random(0), 0
    for number in range(n):
        root = tmp_path / str(number)
        process = start(write_and_die, root, rng.randint(1, len(changes)))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        parts = Log(LocalStorage(root)).records
        kept = {one.index: (root / f"parts/{one.name}").stat().st_mtime_ns for one in parts}
        unfinished += len(parts) < len(synthetic.LENGTHS)
        if (root / "manifest.json").exists():
            assert [finding for finding in verify(LocalStorage(root)) if not finding.is_note] == []
        synthetic.write(root)
        assert tree_bytes(root) == whole
        assert {index: (root / f"parts/{index:08d}").stat().st_mtime_ns for index in kept} == kept
        shutil.rmtree(root)
    assert unfinished > n // 4


# Failing disks


class FaultyStorage(LocalStorage):
    """Fails at the k-th operation: before it is done, after it, having done half of it, or then and ever after."""

    def __init__(self, root, k, how):
        super().__init__(root)
        self.left, self.how = k, how


def faulty(name):
    def operation(self, *arguments):
        self.left -= 1
        if self.left > 0 or (self.left < 0 and self.how != "dead"):
            return getattr(LocalStorage, name)(self, *arguments)
        if name in ("read", "read_into", "sizes"):
            raise StorageError("Input/output error")
        if self.how == "half" and name == "append":
            path, old, line = arguments
            (self.root / path).write_bytes(old + line[: len(line) // 2])
        elif self.how == "half" and name == "publish":
            workspace, place = arguments
            shutil.copytree(workspace, self.root / place, ignore=lambda _folder, names: names[::2])
        elif self.how in ("half", "after"):
            getattr(LocalStorage, name)(self, *arguments)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    return operation


for _name in ("read", "read_into", "sizes", "write", "append", "workspace", "publish", "clear_workspaces"):
    setattr(FaultyStorage, _name, faulty(_name))


@pytest.mark.parametrize("how", ["before", "half", "after", "dead"])
def test_whichever_operation_fails_it_is_told_and_the_next_run_completes(how, tmp_path):
    lengths = ((20, 3), (5,))
    synthetic.write(tmp_path / "whole", lengths)
    whole = tree_bytes(tmp_path / "whole")
    for k in range(1, 1000):
        root = tmp_path / str(k)
        storage = FaultyStorage(root, k, how)
        told = None
        try:
            synthetic.write(storage, lengths)
        except FastcacheError as error:
            told = error
        if storage.left > 0:
            break
        assert isinstance(told, StorageError)
        assert "Input/output error" in str(told)
        for one in Log(LocalStorage(root)).records:  # what is committed is whole, whatever happened
            files = {name: size for name, (size, _) in one.files.items()}
            assert LocalStorage(root).sizes(f"parts/{one.name}") == files
        synthetic.write(root, lengths)
        assert tree_bytes(root) == whole, f"operation {k}"
        shutil.rmtree(root)
    assert k > 15


def test_whichever_reading_fails_verify_tells_it_and_goes_on(tmp_path):
    synthetic.write(tmp_path, ((300, 7), (20,)))
    for k in range(1, 1000):
        storage = FaultyStorage(tmp_path, k, "dead")
        found = [finding for finding in verify(storage, workers=1) if not finding.is_note]
        if storage.left > 0:
            assert found == []
            break
        assert found, f"operation {k}"
    assert k > 20


def test_an_unreadable_sector_is_an_error_of_ours(tmp_path, monkeypatch):
    synthetic.write(tmp_path)
    cache = fastcache.open_cache(tmp_path)

    def fails(*_arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(FastcacheError, match="Input/output error"):
        cache.residuals(synthetic.HOOK, 0, 10)
    monkeypatch.setattr(os, "fdopen", fails)
    with pytest.raises(FastcacheError, match="Input/output error"):
        fastcache.open_cache(tmp_path)


# Writers and clocks


def test_a_second_writer_is_refused_until_the_first_has_ended(tmp_path):
    from fastcache.rundir import output_directory

    code = """
        import pathlib, sys, time
        from fastcache.rundir import output_directory
        with output_directory(pathlib.Path(sys.argv[1]), "extract", {}, ()):
            print("held", flush=True)
            time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(BusyError), output_directory(tmp_path / "cache", "extract", {}, ()):
        pass
    process.kill()
    process.wait()
    with output_directory(tmp_path / "cache", "extract", {}, ()):
        pass


def test_a_clock_that_runs_backwards_changes_no_byte(whole, tmp_path, monkeypatch):
    now = [2**31]

    def earlier():
        now[0] -= 1000
        return now[0]

    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: float(earlier()))
        monkeypatch.setattr(time, f"{name}_ns", lambda: earlier() * 10**9)
    synthetic.write(tmp_path)
    monkeypatch.undo()
    assert tree_bytes(tmp_path) == whole


@pytest.mark.parametrize("when", [0, 4_000_000_000])
def test_times_of_files_mean_nothing(when, whole, tmp_path):
    process = start(synthetic.write, tmp_path / "cache")
    wait_for(lambda: n_lines(tmp_path / "cache/parts.jsonl") >= 1, process)
    kill(process)
    for path in tmp_path.rglob("*"):
        os.utime(path, (when, when))
    synthetic.write(tmp_path / "cache")
    assert tree_bytes(tmp_path / "cache") == whole
