"""What models and corpora are called, for people and other libraries: outputs know them by paths and fingerprints."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastcache.errors import FastcacheError
from fastcache.files import read_json
from fastcache.rundir import stored_path

_HUB_FOLDER = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_title(name: str) -> str:
    """A model's name on the hub where it is known, else that of its folder; other names are left as they are.

    A folder is known by its place in the hub's cache, or by `_name_or_path` in its config.json.
    """
    path = Path(name).expanduser()
    is_path = path.is_absolute() or name.startswith((".", "~")) or path.is_dir()
    if not is_path or name == "demo":
        return name
    if match := _HUB_FOLDER.search(f"{path.as_posix()}/"):
        return f"{match[1]}/{match[2]}"
    with suppress(FastcacheError, OSError):
        known = _at(read_json(path / "config.json"), "_name_or_path")
        if isinstance(known, str) and _HUB_NAME.fullmatch(known) and not Path(known).exists():
            return known
    return path.resolve().name or name


def corpus_sources(cache: Path | str, fingerprint: str) -> list[str]:
    """The data sets that the corpus of a cache was prepared from; empty where the corpus is nowhere to be found.

    It is looked for where the cache was made from it, and beside the cache, and known by its fingerprint.
    """
    if "://" in str(cache):
        return []
    for folder in _corpora(Path(cache)):
        with suppress(FastcacheError, OSError):
            info = read_json(folder / "corpus.json")
            counts = _at(info, "counts")
            if _at(info, "fingerprint") == fingerprint and isinstance(counts, dict):
                return [_source_title(source) for source in counts]
    return []


def cache_of_sae(sae: Path) -> str | None:
    """The cache that an SAE was trained from, by its run.json."""
    with suppress(FastcacheError, OSError):
        run = read_json(sae / "run.json")
        if isinstance(cache := _at(run, "settings", "cache"), str):
            return cache if "://" in cache else _as_given(stored_path(run, cache, sae))
    return None


def _corpora(cache: Path) -> Iterator[Path]:
    with suppress(FastcacheError, OSError):
        run = read_json(cache / "run.json")
        if isinstance(made_from := _at(run, "settings", "corpus"), str):
            yield stored_path(run, made_from, cache)
    with suppress(OSError):
        yield from sorted(path.parent for path in cache.resolve().parent.glob("*/corpus.json"))


def _source_title(source: str) -> str:
    """A data set's name; of a file or folder its own name, not the path on this machine."""
    return Path(source).name if Path(source).is_absolute() or source.startswith((".", "~")) else source


def _as_given(path: Path) -> str:
    """A path as one would type it here: relative where it is below the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _at(mapping: Any, *keys: str) -> Any:
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, dict) else None
    return mapping
