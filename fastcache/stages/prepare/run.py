"""The prepare stage: every input row ends as a row of the corpus, or in the ledger with its reason."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastcache.config import as_dict
from fastcache.corpus import CORPUS_FILE, CORPUS_VERSION, Corpus
from fastcache.errors import InputError
from fastcache.extras import require_packages
from fastcache.files import read_json, write_json_atomic
from fastcache.llm.loading import ModelSource, load_tokenizer
from fastcache.progress import Progress
from fastcache.rundir import RUN_FILE, output_directory, require_space
from fastcache.stages.prepare.config import FREE_ON_RESUME, PrepareConfig
from fastcache.stages.prepare.dedup import find_repeats
from fastcache.stages.prepare.ledger import LEDGER_FILE, Ledger
from fastcache.stages.prepare.lengths import token_lengths
from fastcache.stages.prepare.minhash import near_duplicates
from fastcache.stages.prepare.ngrams import COLLISION_BITS
from fastcache.stages.prepare.output import split_bounds, write_rows
from fastcache.stages.prepare.page import PAGE_FILE, write_page
from fastcache.stages.prepare.sources import RECIPES, Source, find_source, hub_revisions, stamps
from fastcache.stages.prepare.staging import FILE_FAULT_SHARE, check_files, first_places, stage, worker_count

WORK_FOLDER = ".work"
OWNED = (CORPUS_FILE, "*.parquet", PAGE_FILE, WORK_FOLDER)


def prepare(config: PrepareConfig, out: Path, progress: Progress, fresh: bool = False) -> dict[str, Any]:
    """Make the corpus directory `out`, or go on making it; returns what stands in its corpus.json.

    Does nothing if `out` already holds this corpus. Raises `MismatchError` if it was begun with other settings,
    `InputError` for sources that can't be read or leave nothing.
    """
    names = (*(RECIPES[config.recipe] if config.recipe else ()), *config.source)
    if config.minhash:
        require_packages("--minhash", "minhash", "datasketch")
    if config.model:
        load_tokenizer(ModelSource(config.model))  # so that a wrong name is told now, not after hours
    if not names:
        raise InputError("--source is needed (or --recipe fast-paper).")
    if len(set(names)) < len(names):
        raise InputError(f"--source names the same source twice: {', '.join(names)}.")
    sources = [find_source(name) for name in names]
    excluded = [find_source(name) for name in config.exclude]
    revisions = hub_revisions([*sources, *excluded])
    sources = [replace(source, revision=revisions.get(source.name)) for source in sources]
    settings = {**as_dict(config), "files": stamps(sources), "revisions": revisions}
    with output_directory(out, "prepare", settings, OWNED, free=FREE_ON_RESUME, fresh=fresh):
        if (out / CORPUS_FILE).exists():
            if (out / PAGE_FILE).exists() or not _make_page(out, progress):
                progress.say(f"{out} is already prepared; nothing to do (--fresh starts over).")
            return read_json(out / CORPUS_FILE)
        try:
            info = _prepare(sources, config, out, progress)
        except InputError:
            if not list((out / WORK_FOLDER).glob("staged/*.json")):  # nothing that a next try could go on with
                shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
                (out / RUN_FILE).unlink()
            raise
        if config.model:
            info["token_lengths"] = token_lengths(Corpus(out, info), config.model, progress)
        shutil.rmtree(out / WORK_FOLDER)
        write_json_atomic(out / CORPUS_FILE, info)  # last: it says that all is there
        _make_page(out, progress)
    return info


def _make_page(out: Path, progress: Progress) -> bool:
    """Write the page of the corpus, which is whole without it; returns whether that could be done."""
    try:
        progress.say(f"Report: {write_page(out)}")
    except InputError as error:
        progress.say(str(error))
        return False
    return True


def _prepare(sources: list[Source], config: PrepareConfig, out: Path, progress: Progress) -> dict[str, Any]:
    work = out / WORK_FOLDER
    plain = replace(config, strict=False, max_rows=0, alternating=False, max_turn_chars=0)
    excluded = [find_source(name) for name in config.exclude]
    given = stage(excluded, plain, work / "excluded", progress, texts_too=True) if excluded else []
    chunks = stage(sources, config, work / "staged", progress)
    if not chunks:
        raise InputError(f"No row in {', '.join(source.name for source in sources)}. Nothing was written.")
    places = first_places(chunks)
    try:
        check_files([*given, *chunks])
    except InputError:
        shutil.rmtree(work)  # of no use once the file is mended
        raise
    n_given = sum(chunk.n_rows for chunk in given)
    n_grams = sum(chunk.n_grams for chunk in [*given, *chunks])
    require_space(out, 16 * n_grams, "The deduplication's working files")
    memory = int(config.memory_gib * 2**30)
    repeats = find_repeats([*given, *chunks], n_given, work / "shared", worker_count(config), memory, progress)[
        n_given:
    ]
    # Numbered from the first row of the corpus: an excluded row gets a number below -1.
    ledger = Ledger.of(chunks, np.where(repeats < 0, -1, np.where(repeats < n_given, -2, repeats - n_given)))
    if len(ledger.kinds) > 1:
        raise InputError("The sources mix dialogues and plain texts; prepare them as two corpora.")
    if config.exclude and ledger.kinds == {"text"}:
        raise InputError("--exclude is for dialogues: n-grams are not compared in a corpus of plain texts.")
    if config.minhash:
        ledger.drop_near_duplicates(near_duplicates(chunks, ledger.outcome == 0, config.minhash, progress))
    kept = ledger.kept
    if not len(kept):
        names = ", ".join(source.name for source in sources)
        first = next(iter(places[sources[0].name].values())) if sources[0].name in places else ""
        seen = f"; the first is {first}" if first else ""
        raise InputError(f"No usable row in {names}: {ledger.explain()}{seen}. Nothing was written.")
    counts = ledger.counts()
    for source, by_reason in places.items():
        for reason, place in by_reason.items():
            n_rows = counts[source]["dropped"][reason]
            rows = "1 row" if n_rows == 1 else f"{n_rows:,} rows"
            progress.say(f"Not usable: {rows} of {source} ({reason}), the first at {place}")
        n_bad = sum(counts[source]["dropped"][reason] for reason in by_reason)
        if n_bad >= FILE_FAULT_SHARE * counts[source]["rows"]:
            progress.say(
                f"Nearly all rows of {source} can't be used: {n_bad:,} of {counts[source]['rows']:,}. Look at the places "
                "above; --column names the column to read."
            )
    for source, by_reason in first_places(given).items():
        for reason, place in by_reason.items():
            progress.say(f"Not usable: rows of the excluded {source} ({reason}), the first at {place}")
    numbers = np.full(len(repeats), -1, np.int64)
    numbers[kept[np.random.default_rng(config.seed).permutation(len(kept))]] = np.arange(len(kept))
    bounds = split_bounds(len(kept), config)
    fingerprint = write_rows(chunks, numbers, bounds, out, work / "shards", progress)
    ledger.write(out / LEDGER_FILE, numbers)
    return {
        "format": "fastcache-corpus",
        "format_version": CORPUS_VERSION,
        "kind": ledger.kinds.pop(),
        "fingerprint": fingerprint,
        "settings": as_dict(config),
        "files": stamps(sources),
        "revisions": {source.name: source.revision for source in sources if source.revision},
        "splits": {name: stop - start for name, (start, stop) in bounds.items()},
        "counts": counts,
        "first_unusable": places,
        "fields": ledger.field_counts(chunks),
        "duplicates": ledger.duplicates(),
        "n_grams": n_grams,
        "false_drop_probability": float(n_grams) ** 2 / 2.0 ** (COLLISION_BITS + 1),
    }
