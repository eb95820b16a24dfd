"""Disks that take no more: every command says so in one paragraph, keeps what it had, and goes on when there is room."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import synthetic
from commands import COMMANDS, files_of
from conftest import tree_bytes
from processes import run_to_its_end

from fastcache.cache_format.manifest import Log
from fastcache.cache_format.storage import LocalStorage
from fastcache.disk import disk_error, disk_errors
from fastcache.errors import FormatError, SpaceError, StorageError
from fastcache.pipeline.cli import main

ENOUGH = 64 * 2**20
TESTS = Path(__file__).parent


def limit_files(n_bytes):
    """No file of this process may grow larger; that is an error like that of a full disk, wherever it is written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a file system of so many bytes, or changes its size."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def mount(n_bytes):
        nonlocal mounted
        options = f"{'remount,' if mounted else ''}size={n_bytes}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=False)
        if done.returncode:
            pytest.skip("no file system may be mounted here")
        mounted = True
        return place

    yield mount
    if mounted:
        subprocess.run(["umount", place], check=True)


def begin(name, inputs, folder):
    command = COMMANDS[name]
    command.before(inputs, folder)
    return command.words(inputs, folder)


def check_is_told(code, errors):
    text = " ".join(errors.split())
    assert code == 2, errors
    assert text.startswith("Error: "), errors
    assert "could not be written: the disk is full" in text, errors
    assert text.endswith("goes on from there."), errors
    assert "Traceback" not in text
    assert "\n\n" not in errors


def finish(name, words, folder, undisturbed):
    main([str(word) for word in words])
    assert files_of(folder, COMMANDS[name]) == undisturbed(name).files


def check_limit(name, n_bytes, inputs, folder, undisturbed):
    words = begin(name, inputs, folder)
    check_is_told(*run_to_its_end(words, limit_files, n_bytes))
    finish(name, words, folder, undisturbed)


MANY = [pytest.param(name, marks=pytest.mark.long) if "workers" in name else name for name in COMMANDS]


@pytest.mark.usefixtures("quick_judge")
@pytest.mark.parametrize("name", MANY)
def test_a_file_that_may_not_grow_is_told_by_every_command(name, command_inputs, undisturbed, tmp_path):
    check_limit(name, max(undisturbed(name).sizes.values()) - 1, command_inputs, tmp_path, undisturbed)


@pytest.mark.long
@pytest.mark.usefixtures("quick_judge")
@pytest.mark.parametrize("name", COMMANDS)
def test_whichever_file_may_not_grow_it_is_told(name, command_inputs, undisturbed, tmp_path):
    for n_bytes in sorted({size - 1 for size in undisturbed(name).sizes.values() if size}):
        folder = tmp_path / str(n_bytes)
        folder.mkdir()
        check_limit(name, n_bytes, command_inputs, folder, undisturbed)
        shutil.rmtree(folder)


# A real file system that is full


def pages_of(folder):
    """Bytes that the files below a folder take of a file system in memory."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def fill(name, share, inputs, small_disk, undisturbed):
    """Run a command with room for a share of what it writes; returns whether that was too little."""
    disk = small_disk(ENOUGH)
    words = begin(name, inputs, disk)
    needed = sum(-(-size // 4096) * 4096 for size in undisturbed(name).sizes.values())
    small_disk(pages_of(disk) + max(4096, int(needed * share) // 4096 * 4096))
    if "extract" in words and "--add-layer" not in words:
        words = [*words, "--force"]  # the plan would refuse to begin
    code, errors = run_to_its_end(words)
    small_disk(ENOUGH)
    if code:
        check_is_told(code, errors)
    finish(name, words, disk, undisturbed)
    return bool(code)


@pytest.mark.usefixtures("quick_judge")
@pytest.mark.parametrize("name", ["prepare", "export"])
def test_a_full_disk_is_told(name, command_inputs, undisturbed, small_disk):
    assert fill(name, 0.5, command_inputs, small_disk, undisturbed)


@pytest.mark.long
@pytest.mark.usefixtures("quick_judge")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full_at_any_moment_is_told_by_every_command(name, command_inputs, undisturbed, small_disk):
    told = [fill(name, share, command_inputs, small_disk, undisturbed) for share in (0.0, 0.2, 0.4, 0.6, 0.8)]
    assert sum(told) >= 2


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


# A cache

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


@pytest.mark.parametrize("kilobytes", [4, 40, 120, 200, 300])
def test_a_full_disk_is_told_and_given_its_space_back(kilobytes, whole, small_disk):
    root = small_disk(kilobytes * 1024) / "cache"
    with pytest.raises(SpaceError, match=r"the disk is full.*Free some space.*goes on from there"):
        synthetic.write(root)
    assert leftovers(root) == []
    kept = {one.index for one in Log(LocalStorage(root)).records}
    small_disk(ENOUGH)
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


# What libraries say


def test_an_error_without_a_number_is_told_as_a_disk_that_may_be_full(tmp_path):
    """numpy's `tofile` writes as much as it can, and then says how much that was."""
    error = disk_error(OSError("121800 requested and 84991 written"), "grams")
    assert isinstance(error, StorageError)
    assert "grams was written only in part (121800 requested and 84991 written); the disk may be full" in str(error)


class RustError(Exception):
    """As safetensors raises."""


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, ""), SpaceError, "the disk is full (No space left on device)"),
        (OSError(errno.EDQUOT, ""), SpaceError, "the disk is full (Disk quota exceeded)"),
        (OSError(errno.EROFS, ""), StorageError, "(Read-only file system). Mend the disk or its permissions"),
        (OSError(errno.EIO, ""), StorageError, "(Input/output error). Mend the disk"),
        (RustError("I/O error: No space left on device (os error 28)"), SpaceError, "(No space left on device)"),
        (OSError("[Errno 28] Error writing bytes to file"), SpaceError, "(No space left on device)"),
    ],
)
def test_errors_of_the_disk_are_ours_whoever_raises_them(error, kind, words, tmp_path):
    with pytest.raises(kind) as told, disk_errors(tmp_path / "file"):
        raise error
    assert f"{tmp_path / 'file'} could not be written" in str(told.value)
    assert words in str(told.value)


def test_errors_that_are_no_disk_s_pass(tmp_path):
    with pytest.raises(ZeroDivisionError), disk_errors(tmp_path):
        raise ZeroDivisionError
    with pytest.raises(FormatError, match="mine"), disk_errors(tmp_path):
        raise FormatError("mine")
