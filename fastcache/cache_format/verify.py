"""Checks of a whole cache: every byte, index, count and the ledger, by threads.

Damage never raises: it is yielded as findings, so that all of it is seen at once.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from crc32c import crc32c

from fastcache.cache_format.arrays import to_bytes
from fastcache.cache_format.manifest import Manifest, PartRecord, load_manifest, parse_log, read_log
from fastcache.cache_format.schema import FORMAT_VERSION, LOG_FILE, MANIFEST_FILE, PARTS_FOLDER, hook_of_file, layer_of
from fastcache.cache_format.storage import Storage
from fastcache.cache_format.verify_part import ADDED, Finding, Findings, PartCheck, PartFacts
from fastcache.cache_format.verify_totals import Totals
from fastcache.cache_format.writer import groups
from fastcache.errors import FastcacheError, FormatError, IntegrityError
from fastcache.files import canonical_json, parse_json
from fastcache.progress import Progress, Silent, Task

MAX_WORKERS = 16
AHEAD = 4
"""Pieces of work begun before the oldest is done, for each worker."""


def verify(
    storage: Storage, *, quick: bool = False, workers: int | None = None, progress: Progress | None = None
) -> Iterator[Finding]:
    """Everything that is wrong with a cache, part by part; notes are what deserves a word but is no damage.

    `quick` reads only the metadata above the parts, and compares the sizes of all files. Raises `FormatError` where
    there is no cache.
    """
    _require_cache(storage)
    above = Findings(storage.url)
    manifest, records = check_above(storage, above)
    _note_added_layers(manifest, records, above)
    is_linked = _check_folder(storage, records, above)
    totals = Totals(manifest, knows_all=not any(finding.file == LOG_FILE for finding in above.problems()))
    yield from above.found
    if is_linked:
        return
    total = sum(size for record in records for size, _ in record.files.values())
    with (Silent() if quick or progress is None else progress).task("verify", total, "bytes") as task:
        workers = workers or min(MAX_WORKERS, os.cpu_count() or 1)
        for record, found, facts in _check_parts(storage, manifest, records, quick, workers, task):
            yield from found
            yield from totals.add(record, facts, is_intact=all(finding.is_note for finding in found))
    last = Findings(storage.url)
    with last.catching(MANIFEST_FILE):
        last.found.extend(totals.compare())
    yield from last.found


def check_above(storage: Storage, findings: Findings) -> tuple[Manifest | None, list[PartRecord]]:
    """What stands above the parts: manifest (None if it can't be trusted), groups, log with its good records."""
    manifest = _check_manifest(storage, findings)
    if manifest is not None:
        _check_groups(storage, manifest, findings)
    return manifest, _check_log(storage, manifest, findings)


def _require_cache(storage: Storage) -> None:
    """Raise `FormatError` if there is neither a manifest nor a log: then nothing is damaged, but the name is wrong."""
    with suppress(OSError, FormatError):
        if read_log(storage):
            return
    try:
        storage.read(MANIFEST_FILE)
    except FileNotFoundError as error:
        raise FormatError(f"{storage.url} is not a fastcache cache. Give the --out of an extract run.") from error
    except (OSError, FormatError):
        return


def _check_manifest(storage: Storage, findings: Findings) -> Manifest | None:
    """The manifest, unless it can't be trusted."""
    manifest = None
    with findings.catching(MANIFEST_FILE):
        manifest = load_manifest(storage)
    if manifest is None:
        return None
    if manifest.state != "complete":
        findings.note(
            MANIFEST_FILE, "the cache is not complete: run its `fastcache extract` command again to finish it"
        )
    minor = _minor(manifest.format_version)
    if not minor:
        findings.note(MANIFEST_FILE, "format 1.0 has no checksums of the files above the parts")
    elif minor <= _minor(FORMAT_VERSION):
        with findings.catching(MANIFEST_FILE):
            if storage.read(MANIFEST_FILE) != manifest.to_bytes():
                findings.add(MANIFEST_FILE, "is valid, but not the bytes that fastcache writes")
    return manifest


def _minor(version: str) -> int:
    return int(version.partition(".")[2])


def _check_groups(storage: Storage, manifest: Manifest, findings: Findings) -> None:
    """The metadata files above the parts; what those of a newer version say is its own business."""
    is_newer = _minor(manifest.format_version) > _minor(FORMAT_VERSION)
    for name, data in groups(manifest.format_version).items():
        entry = manifest.files.get(name)
        if entry is None and manifest.format_version != "1.0":
            findings.add(MANIFEST_FILE, f"files should list {name}")
        with findings.catching(name):
            found = storage.read(name)
            if entry is not None and [len(found), crc32c(found)] != entry:
                findings.add(name, "differs from its checksum in the manifest")
            elif not is_newer and to_bytes(parse_json(found, name)) != data:
                findings.add(name, "is not the metadata of a Zarr group of this format")


def _check_log(storage: Storage, manifest: Manifest | None, findings: Findings) -> list[PartRecord]:
    """The good records, by part."""
    records: list[PartRecord] = []
    with findings.catching(LOG_FILE):
        parsed = parse_log(read_log(storage))
        for error in parsed.bad:
            with findings.catching(LOG_FILE):
                raise error
        if parsed.is_torn and manifest is not None and manifest.state != "complete":
            findings.note(LOG_FILE, "the last line is torn, as a crash leaves it; the next run cuts it off")
        elif parsed.is_torn:
            findings.add(LOG_FILE, "the last line is torn")
        for line, record in parsed.good:
            text = line[9:-1]
            if canonical_json(parse_json(text, LOG_FILE)).encode() != text:
                findings.add(LOG_FILE, f"the line of part {record.index} is not canonical JSON")
        records = sorted((record for _, record in parsed.good), key=lambda record: record.index)
    return records


def _note_added_layers(manifest: Manifest | None, records: list[PartRecord], findings: Findings) -> None:
    """Notes layers that parts have and the manifest hasn't: they are being added, or their adding was broken off."""
    files = {name for record in records for name in record.files}
    hooks = {hook for name in files if (hook := hook_of_file(name)) is not None}
    for hook in sorted(hooks - set(manifest.hook_points), key=layer_of) if manifest else ():
        findings.note(LOG_FILE, f"parts have {hook}, which the manifest doesn't list: {ADDED.format(layer_of(hook))}")


def _check_folder(storage: Storage, records: list[PartRecord], findings: Findings) -> bool:
    """Notes what lies in `parts/` and is no part; True if the folder itself can't be trusted."""
    try:
        storage.sizes(f"{PARTS_FOLDER}/.none")  # raises for a link on the way
    except (FastcacheError, OSError):
        findings.add(PARTS_FOLDER, "is a symbolic link or can't be read; nothing below it was checked")
        return True
    there: set[str] = set()
    with findings.catching(PARTS_FOLDER), suppress(IntegrityError):  # a link in a part, which will tell it
        there = {name.partition("/")[0] for name in storage.sizes(PARTS_FOLDER)}
    for name in sorted(there - {"zarr.json"} - {record.name for record in records}):
        findings.note(f"{PARTS_FOLDER}/{name}", "has no line in the log, so it doesn't count: a killed run left it")
    return False


def _check_parts(
    storage: Storage, manifest: Manifest | None, records: Iterable[PartRecord], quick: bool, workers: int, task: Task
) -> Iterator[tuple[PartRecord, list[Finding], PartFacts | None]]:
    """The findings and facts of each part, in order."""
    pool = ThreadPoolExecutor(workers, "cache-verify")
    waiting: deque[tuple[PartRecord, list[Future[tuple[list[Finding], PartFacts | None, int]]]]] = deque()
    left = iter(records)
    try:
        while True:
            while sum(len(futures) for _, futures in waiting) < AHEAD * workers and (record := next(left, None)):
                work = PartCheck(storage, record, manifest).work(quick)
                waiting.append((record, [pool.submit(one) for one in work]))
            if not waiting:
                return
            record, futures = waiting.popleft()
            found: list[Finding] = []
            facts = None
            for future in futures:
                more, facts_or_none, n_bytes = future.result()
                found += more
                facts = facts_or_none or facts
                task.advance(n_bytes)
            yield record, found, facts
    finally:
        pool.shutdown(cancel_futures=True)
