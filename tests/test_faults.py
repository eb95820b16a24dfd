"""Never lose, never lie: kills, full and failing disks, clocks, and every single bit.

`make test-faults` runs the long versions too.
"""

import contextlib
import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import synthetic
from conftest import tree_bytes
from processes import kill, n_lines, start, wait_for

import fastcache
from fastcache.cache_format.manifest import Log
from fastcache.cache_format.storage import LocalStorage
from fastcache.cache_format.verify import check_above, verify
from fastcache.cache_format.verify_part import Findings, PartCheck
from fastcache.errors import BusyError, FastcacheError, IntegrityError, SpaceError, StorageError

TESTS = Path(__file__).parent
few_or_many = pytest.mark.parametrize("n", [25, pytest.param(200, marks=pytest.mark.long)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of an undisturbed cache."""
    root = tmp_path_factory.mktemp("whole")
    synthetic.write(root)
    return tree_bytes(root)


def child(code, *arguments, **options):
    """A process that runs `code` with what the tests import."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **options)


def leftovers(root):
    return list((root / "parts").glob(".*"))


# Kills


@few_or_many
def test_killed_at_any_moment_nothing_is_lost(n, whole, tmp_path):
    root = tmp_path / "timed"
    process = start(synthetic.write, root)
    wait_for(root.exists, process)
    begun = time.perf_counter()
    process.join()
    assert process.exitcode == 0
    duration = time.perf_counter() - begun
    rng, unfinished = random.Random(0), 0
    for number in range(n):
        root = tmp_path / str(number)
        process = start(synthetic.write, root)
        wait_for(root.exists, process)  # so that the kill falls into the writing
        time.sleep(rng.random() * duration)
        kill(process)
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


# Full disks

LIMITED = """
    import resource, sys, pathlib, synthetic
    from fastcache.errors import FastcacheError
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
    try:
        synthetic.write(pathlib.Path(sys.argv[1]))
    except FastcacheError as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize("limit", [60, 300, 700, 2000, 4500, 6000])
def test_a_file_that_may_not_grow_is_told_and_leaves_nothing_half_done(limit, whole, tmp_path):
    done = child(LIMITED, tmp_path / "cache", limit)
    assert done.stderr.startswith("SpaceError: "), done.stderr
    assert "the same command goes on from there" in done.stderr
    assert "Traceback" not in done.stderr
    assert leftovers(tmp_path / "cache") == []
    synthetic.write(tmp_path / "cache")
    assert tree_bytes(tmp_path / "cache") == whole


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a file system of so many KiB, or changes its size."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def mount(kilobytes):
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={kilobytes}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("no file system may be mounted here")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("kilobytes", [4, 40, 120, 200, 300])
def test_a_full_disk_is_told_and_given_its_space_back(kilobytes, whole, small_disk):
    root = small_disk(kilobytes) / "cache"
    with pytest.raises(SpaceError, match=r"the disk is full.*Free some space.*goes on from there"):
        synthetic.write(root)
    assert leftovers(root) == []
    kept = {one.index for one in Log(LocalStorage(root)).records}
    small_disk(2000)
    synthetic.write(root)
    assert tree_bytes(root) == whole
    assert kept != set(range(len(synthetic.LENGTHS)))


READ_ONLY = """
    import os, pathlib, sys, synthetic
    from fastcache.errors import FastcacheError
    synthetic.write(pathlib.Path(sys.argv[1]))  # all modules are loaded now
    if os.getuid() == 0:
        os.setgid(65534), os.setuid(65534)  # root may write everywhere
    try:
        synthetic.write(pathlib.Path(sys.argv[2]))
    except FastcacheError as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.mark.parametrize("made_before", ["nothing", "cache"])
def test_a_folder_that_may_not_be_written_is_told(made_before, tmp_path):
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if made_before == "cache":
            synthetic.write(place, synthetic.LENGTHS[:1])
            (place / "manifest.json").unlink()
            (place / "parts.jsonl").unlink()
        before = tree_bytes(place)
        place.chmod(0o555)
        done = child(READ_ONLY, tmp_path / "cache", place)
        place.chmod(0o755)
        assert done.stderr.startswith("StorageError: "), done.stderr
        assert "Permission denied" in done.stderr
        assert "Traceback" not in done.stderr
        assert tree_bytes(place) == before


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


# Damage


@pytest.mark.parametrize("damage", ["deleted", "cut", "longer", "empty"])
def test_any_file_that_is_gone_or_of_another_length_is_named(damage, whole, tmp_path):
    synthetic.write(tmp_path)
    for name, data in whole.items():
        path = tmp_path / name
        if damage == "deleted":
            path.unlink()
        else:
            path.write_bytes({"cut": data[:-1], "longer": data + b"\0", "empty": b""}[damage])
        found = [finding.file for finding in verify(LocalStorage(tmp_path), quick=True) if not finding.is_note]
        assert name in found, found
        path.write_bytes(data)


class Memory:
    """A cache in memory, as a storage to read from."""

    url = "memory"

    def __init__(self, files):
        self.files = {name: bytearray(data) for name, data in files.items()}

    def read(self, name, limit=0):
        if name not in self.files:
            raise FileNotFoundError(name)
        return bytes(self.files[name])

    def read_into(self, name, offset, buffer):
        data = self.files[name][offset : offset + len(buffer)]
        if len(data) < len(buffer):
            raise IntegrityError(f"{name} ends early")
        buffer[:] = data

    def sizes(self, folder):
        return {
            name[len(folder) + 1 :]: len(data) for name, data in self.files.items() if name.startswith(f"{folder}/")
        }

    def zarr_store(self, folder):
        raise NotImplementedError


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def tiny(request, tmp_path_factory):
    """The files of a complete cache of a few tens of kilobytes, and what stands above its parts."""
    root = tmp_path_factory.mktemp("tiny")
    synthetic.write(root, ((3, 2), (4,)), d_in=4, dtype=request.param)
    storage = Memory(tree_bytes(root))
    findings = Findings("memory")
    manifest, records = check_above(storage, findings)
    assert findings.found == [], findings.found
    assert list(verify(storage)) == []
    return storage, manifest, records


def is_noticed(tiny, name):
    """Whether the checks of the place where the file `name` stands find anything."""
    storage, manifest, records = tiny
    if not name.startswith("parts/0"):
        findings = Findings("memory")
        check_above(storage, findings)
        return bool(findings.problems())
    record = next(one for one in records if name.startswith(f"parts/{one.name}/"))
    return any(work()[0] for work in PartCheck(storage, record, manifest).work(quick=False))


def missed(tiny, flips):
    """Of these bits, given as file, byte and bit, those whose flip nobody notices."""
    storage = tiny[0]
    unseen = []
    for name, position, bit in flips:
        storage.files[name][position] ^= 1 << bit
        if not is_noticed(tiny, name):
            unseen.append((name, position, bit))
        storage.files[name][position] ^= 1 << bit
    return unseen


def all_bits(storage):
    return [(name, i, bit) for name, data in storage.files.items() for i in range(len(data)) for bit in range(8)]


def test_flips_of_random_bits_are_noticed(tiny):
    """Some of every file: all bits of the log's first bytes and of the shards' index, samples of the rest."""
    rng = random.Random(0)
    flips = []
    for name, data in tiny[0].files.items():
        n = 800 if name in ("manifest.json", "parts.jsonl") else 60
        flips += [(name, rng.randrange(len(data)), rng.randrange(8)) for _ in range(n)]
        edges = range(max(0, len(data) - 20), len(data)) if "/c/" in name or name == "parts.jsonl" else range(10)
        flips += [(name, i, bit) for i in edges if i < len(data) for bit in range(8)]
    assert missed(tiny, flips) == []


@pytest.mark.long
def test_every_single_bit_is_noticed(tiny):
    flips = all_bits(tiny[0])
    assert len(flips) > 100_000
    assert missed(tiny, flips) == []


def test_reading_a_cache_with_a_flipped_bit_gives_the_right_values_or_an_error(tiny, tmp_path_factory):
    """What readers check by themselves: no value is ever wrong, in token arrays and residuals."""
    from fastcache.cache_format.reader import Cache

    storage = tiny[0]

    def values():
        cache = Cache(storage)
        tokens = [part.tokens[name].tobytes() for part in cache.parts for name in sorted(part.tokens)]
        return [*tokens, cache.residuals(synthetic.HOOK, 0, cache.n_tokens).tobytes()]

    right = values()
    rng = random.Random(1)
    for name, data in storage.files.items():
        if "int8.mean" in name or "int8.deviation" in name or ".statistics." in name:
            continue
        for _ in range(25):
            position, bit = rng.randrange(len(data)), rng.randrange(8)
            data[position] ^= 1 << bit
            with contextlib.suppress(FastcacheError):
                assert values() == right, (name, position, bit)
            data[position] ^= 1 << bit


def test_the_synthetic_cache_is_what_it_says(tmp_path):
    synthetic.write(tmp_path)
    cache = fastcache.open_cache(tmp_path)
    assert [len(one) for one in cache.instances()] == [n for part in synthetic.LENGTHS for n in part]
    assert np.allclose(cache.instance(2).residuals(synthetic.HOOK), synthetic.rows_of(2, 20, 8), rtol=0.01)
