"""The output of extract: a folder that is ours alone, or a place in a bucket that we hold a lease on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastcache.cache_format.object_storage import ObjectStorage
from fastcache.cache_format.storage import LocalStorage, Storage
from fastcache.errors import InputError
from fastcache.files import parse_json, readable_json
from fastcache.rundir import RUN_FILE, check_same, new_run, output_directory
from fastcache.stages.extract.config import FREE_ON_RESUME
from fastcache.stages.extract.status import STATUS_FILE

OWNED = ("manifest.json", "zarr.json", "parts.jsonl", "parts", STATUS_FILE)


@contextmanager
def cache_output(out: Path | str, settings: dict[str, Any], fresh: bool) -> Iterator[Storage]:
    """Hold `out` as the output of extract with these settings; see `output_directory` for what is refused."""
    if isinstance(out, Path):
        with output_directory(out, "extract", settings, OWNED, free=FREE_ON_RESUME, fresh=fresh):
            yield LocalStorage(out)
        return
    storage = ObjectStorage(out)
    with storage.lease():
        _begin(storage, settings, fresh)
        yield storage


def _begin(storage: ObjectStorage, settings: dict[str, Any], fresh: bool) -> None:
    """Check that what is there is ours, with these settings, and write run.json where it isn't."""
    try:
        run = parse_json(storage.read(RUN_FILE), f"{storage.url}/{RUN_FILE}")
    except FileNotFoundError:
        if any(not name.startswith(".") for name in storage.sizes("")):
            raise InputError(
                f"{storage.url} is not empty and holds no {RUN_FILE}, so it is no output of fastcache. "
                "Choose another --out; nothing was changed."
            ) from None
        run = None
    if run is not None:
        check_same(run, storage.url, "extract", settings, FREE_ON_RESUME, fresh)
        if not fresh:
            return
        for name in OWNED:
            storage.remove(name)
    storage.write(RUN_FILE, readable_json(new_run("extract", settings, storage.url)))


def run_of(storage: Storage) -> dict[str, Any]:
    """The run.json of a cache, with the settings that it was made with; raises `InputError` if there is none."""
    where = f"{storage.url}/{RUN_FILE}"
    try:
        run = parse_json(storage.read(RUN_FILE), where)
    except FileNotFoundError as error:
        raise InputError(f"{where} is missing: it has the settings that the cache was made with.") from error
    if not isinstance(run, dict) or run.get("command") != "extract" or not isinstance(run.get("settings"), dict):
        raise InputError(f"{where} is not that of a cache: it should have the settings of `fastcache extract`.")
    return run
