"""Where things go and come from when the user doesn't say: default output directories and corpora."""

import shlex
import time
from pathlib import Path

from fastcache.errors import BusyError, MismatchError
from fastcache.pipeline.names import RUNS, model_name, output_name, source_name
from fastcache.progress import Progress
from fastcache.stages.extract.config import ExtractConfig
from fastcache.stages.prepare.config import PrepareConfig

DEFAULT_CHAT, DEFAULT_TEXT = "allenai/tulu-3-sft-mixture", "monology/pile-uncopyrighted"
HUB_ROWS = 120_000
"""Rows read of a hub data set that is prepared on the way: enough for the paper's 40.96M tokens."""

SECONDS_BETWEEN_TRIES = 0.5


def corpus_place(*sources: str) -> Path:
    """Default directory of a corpus prepared from `sources`."""
    return RUNS / f"corpus-{source_name(*sources)}"


def cache_place(config: ExtractConfig) -> Path:
    """Default directory of a cache: named by the model, and by the corpus if it isn't the usual one."""
    layers = "-".join(str(layer) for layer in sorted(set(config.layer)))
    name = f"cache-{model_name(config.model)}-{config.method}-{config.split}-layer-{layers}"
    corpus, usual = config.corpus, _usual_source(config)
    if corpus is None or corpus == usual or Path(corpus).resolve() == corpus_place(usual).resolve():
        return RUNS / name
    is_corpus = (Path(corpus) / "corpus.json").is_file()
    return RUNS / f"{name}-of-{output_name(corpus) if is_corpus else source_name(corpus)}"


def _usual_source(config: ExtractConfig) -> str:
    """The source whose corpus is taken where the user names none."""
    wants_text = config.method == "bt-p"
    if config.model == "demo":
        return "demo-text" if wants_text else "demo"
    return DEFAULT_TEXT if wants_text else DEFAULT_CHAT


def find_corpus(config: ExtractConfig, progress: Progress) -> Path:
    """The corpus directory that `config` means; prepares it first if it is a file or a data set.

    Where another process is preparing it, waits for that. Raises `MismatchError` if the default directory of such a
    corpus holds one of another source, or one of other contents of this source.
    """
    from fastcache.corpus import CORPUS_FILE
    from fastcache.stages.prepare.run import prepare

    source = config.corpus or _usual_source(config)
    if source == "demo" and config.method == "bt-p":
        source = "demo-text"
    if (Path(source) / CORPUS_FILE).is_file():
        return Path(source)
    on_hub = not Path(source).exists() and source not in ("demo", "demo-text")
    place = corpus_place(source)
    settings = PrepareConfig(source=(source,), max_rows=HUB_ROWS if on_hub else 0)
    waited = False
    while True:
        if (place / CORPUS_FILE).is_file():
            _check_source(place, source)
            progress.say(f"Corpus: {place}, prepared before")
            return place
        try:
            if not waited:
                first = f" (first {HUB_ROWS:,} rows)" if on_hub else ""
                progress.say(f"Corpus: preparing {source} in {place}{first}")
            prepare(settings, place, progress)
        except BusyError:
            if not waited:
                progress.say(f"Corpus: another process is preparing {place}; waiting for it (Ctrl-C stops waiting)")
            waited = True
            time.sleep(SECONDS_BETWEEN_TRIES)
        else:
            return place


def _check_source(place: Path, source: str) -> None:
    """Raise `MismatchError` unless the corpus in `place` is of `source` as it is now."""
    from fastcache.corpus import Corpus
    from fastcache.stages.prepare.sources import find_source, stamps

    info = Corpus(place).info
    settings = info.get("settings")
    names = settings.get("source") if isinstance(settings, dict) else None
    elsewhere = f"fastcache prepare --source {shlex.quote(source)} --out DIR, and give --corpus DIR."
    if names != [source]:
        held = " and ".join(map(str, names)) if isinstance(names, list) and names else "another source"
        raise MismatchError(
            f"{place} holds the corpus of {held}, not of {source}. Prepare this one elsewhere: {elsewhere}"
        )
    if info.get("files") != stamps([find_source(source)]):
        raise MismatchError(
            f"{source} has changed since the corpus {place} was prepared from it. To use it as it is now, prepare it "
            f"elsewhere: {elsewhere} Caches that exist go on needing the corpus that they were made from."
        )
