"""Where things go and come from when the user doesn't say: default output directories and corpora."""

import re
from pathlib import Path

from fastcache.errors import MismatchError
from fastcache.progress import Progress
from fastcache.stages.extract.config import ExtractConfig
from fastcache.stages.prepare.config import PrepareConfig

RUNS = Path("fastcache-runs")

DEFAULT_CHAT, DEFAULT_TEXT = "allenai/tulu-3-sft-mixture", "monology/pile-uncopyrighted"
HUB_ROWS = 120_000
"""Rows read of a hub data set that is prepared on the way: enough for the paper's 40.96M tokens."""


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.").lower() or "x"


def corpus_place(source: str) -> Path:
    """Default directory of a corpus prepared from `source`."""
    return RUNS / f"corpus-{slug(source)}"


def cache_place(config: ExtractConfig) -> Path:
    """Default directory of a cache."""
    layers = "-".join(str(layer) for layer in sorted(set(config.layer)))
    return RUNS / f"cache-{slug(Path(config.model).name)}-{config.method}-{config.split}-layer-{layers}"


def find_corpus(config: ExtractConfig, progress: Progress) -> Path:
    """The corpus directory that `config` means; prepares it first if it is a file or a data set."""
    from fastcache.corpus import CORPUS_FILE, Corpus
    from fastcache.stages.prepare.run import prepare
    from fastcache.stages.prepare.sources import find_source, stamps

    wants_text = config.method == "bt-p"
    source = config.corpus
    if source is None and config.model == "demo":
        source = "demo"
    if source == "demo" and wants_text:
        source = "demo-text"
    if source is None:
        source = DEFAULT_TEXT if wants_text else DEFAULT_CHAT
    if (Path(source) / CORPUS_FILE).is_file():
        return Path(source)
    on_hub = not Path(source).exists() and source not in ("demo", "demo-text")
    place = corpus_place(source)
    if (place / CORPUS_FILE).is_file():
        if Corpus(place).info.get("files") != stamps([find_source(source)]):
            raise MismatchError(
                f"{source} has changed since the corpus {place} was prepared from it. Prepare it again: "
                f"fastcache prepare --source {source} --out {place} --fresh"
            )
        progress.say(f"Corpus: {place}, prepared before")
        return place
    progress.say(f"Corpus: preparing {source} in {place}" + (f" (first {HUB_ROWS:,} rows)" if on_hub else ""))
    prepare(PrepareConfig(source=(source,), max_rows=HUB_ROWS if on_hub else 0), place, progress)
    return place
