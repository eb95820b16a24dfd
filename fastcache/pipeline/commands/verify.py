"""`fastcache verify`."""

import os
from pathlib import Path

import click

from fastcache.config import parse_number
from fastcache.errors import FormatError, InputError, quoted
from fastcache.pipeline.command import Command
from fastcache.pipeline.console import RichProgress, make_console

HELP = """Check every byte, index and count of a cache, and its ledger.

Exit code 0 if the cache is whole, 1 if something is wrong: then all of it is listed. --quick reads no array: it checks
manifest, log, ledger, and that all files are there with their sizes.

\b
Examples:
  fastcache verify fastcache-runs/cache-demo-fast-train-layer-2
  fastcache verify CACHE --quick
  fastcache verify CACHE --workers 32
"""

MOST_THREADS = 1024


def _require_cache(place: str) -> None:
    """Raise `InputError` for a place that nothing of a cache is in, `StorageError` for a store that doesn't answer.

    Either is a wrong path or a network that is down, not damage.
    """
    from fastcache.cache_format.schema import LOG_FILE, MANIFEST_FILE, PARTS_FOLDER
    from fastcache.cache_format.storage import open_storage

    folder = Path(place.removeprefix("file://"))
    if "://" in place.removeprefix("file://"):
        storage = open_storage(place)
        try:
            storage.read(MANIFEST_FILE)
            return
        except FormatError:
            return
        except FileNotFoundError:
            is_there = bool(storage.sizes(""))
    else:
        is_there = any(os.path.lexists(folder / name) for name in (MANIFEST_FILE, LOG_FILE, PARTS_FOLDER))
    if not is_there:
        raise InputError(
            f"{quoted(place)} is no cache: there is no folder with a {MANIFEST_FILE}. Name a folder made by `extract`."
        )


@click.command(cls=Command, help=HELP)
@click.argument("cache")
@click.option("--quick", is_flag=True, help="Check structure and sizes only.")
@click.option("--workers", metavar="N", help="Threads.  [default: one a core, at most 16]")
@click.pass_context
def command(context: click.Context, cache: str, quick: bool, workers: str | None) -> None:
    """Print what is wrong, and then how much."""
    n_threads = None if workers is None else parse_number("--workers", workers, 1, MOST_THREADS)
    from fastcache.cache_format.storage import open_storage
    from fastcache.cache_format.verify import verify

    _require_cache(cache)
    progress = RichProgress(make_console())
    parts, n_problems = set(), 0
    for finding in verify(open_storage(cache), quick=quick, workers=n_threads, progress=progress):
        progress.say(f"note: {finding}" if finding.is_note else str(finding))
        if not finding.is_note:
            parts.add(finding.part)
            n_problems += 1
    if not n_problems:
        progress.say(f"{cache}: nothing is wrong" + (" with structure and sizes." if quick else "."))
        return
    progress.say(f"{cache}: damaged parts: {len(parts - {None}):,}, problems: {n_problems:,}.")
    progress.say_commands("Next:", [["fastcache", "repair", cache]])
    context.exit(1)
