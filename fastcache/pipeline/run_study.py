"""Runs a study: the stages as a user would run them, ending in a report. Each resumes, so a study goes on where it was."""

from functools import partial
from pathlib import Path
from typing import Any

from fastcache.config import as_dict
from fastcache.corpus import Corpus
from fastcache.errors import InputError
from fastcache.files import read_json, write_json_atomic
from fastcache.pipeline.study import Study
from fastcache.progress import Progress
from fastcache.stages.evaluate.config import EvaluateConfig
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.report.config import ReportConfig

REPORT_FILE = "report.html"
EVALUATED_FILE = "evaluated.json"
"""Which SAEs were evaluated, and how: with the model that takes a while."""
Evaluations = list[dict[str, Any]]


def cache_folder(out: Path, method: str, split: str) -> Path:
    """Where a study has the cache of a method and split."""
    return out / f"cache-{method}-{split}"


def sweep_folder(out: Path, method: str) -> Path:
    """Where a study has the SAEs of a method."""
    return out / f"sae-{method}"


def run_study(study: Study, out: Path, progress: Progress, fresh: bool = False) -> Evaluations:
    """Make the corpora, the caches, the SAEs, their evaluations and `report.html`, each in a folder in `out`, or go on.

    Raises what the stages raise; a member of a sweep that fails doesn't stop the others, and isn't evaluated.
    """
    from fastcache.stages.report.run import require_report_packages, write_report

    require_report_packages()
    corpora = {kind: _corpus(kind, corpus, out, progress, fresh) for kind, corpus in study.corpora.items()}
    caches = _extract(study, corpora, out, progress, fresh)
    saes = _train(study, out, progress, fresh)
    if not saes:
        raise InputError(f"None of the SAEs was trained; {out}/sae-*/*/failed.json says why.")
    evaluations = _evaluate(study.evaluation(saes, caches[-1]), out / EVALUATED_FILE, progress, fresh)
    write_report(
        ReportConfig(
            sae=tuple(str(sweep_folder(out, method)) for method in study.methods),
            cache=tuple(map(str, caches)),
            corpus=tuple(map(str, corpora.values())),
            title=study.title,
            note=study.note,
            html=str(out / REPORT_FILE),
        )
    )
    return evaluations


def _corpus(kind: str, corpus: PrepareConfig | Path, out: Path, progress: Progress, fresh: bool) -> Path:
    from fastcache.stages.prepare.run import prepare

    if isinstance(corpus, Path):
        return Corpus(corpus).path  # raises where there is none, before the first cache is made
    place = out / f"corpus-{kind}"
    prepare(corpus, place, progress, fresh)
    return place


def _extract(study: Study, corpora: dict[str, Path], out: Path, progress: Progress, fresh: bool) -> list[Path]:
    from fastcache.stages.extract.run import extract

    places: list[Path] = []
    for method, split in study.caches:
        corpus = corpora["text" if method == "bt-p" else "chat"]
        place = cache_folder(out, method, split)
        progress.say(f"Cache {len(places) + 1} of {len(study.caches)}: {place}")
        extract(study.cache(method, split, corpus), partial(Path, corpus), place, progress, fresh)
        places.append(place)
    return places


def _train(study: Study, out: Path, progress: Progress, fresh: bool) -> list[Path]:
    """Folders of the trained SAEs."""
    from fastcache.cache_format.reader import open_cache
    from fastcache.stages.train.sweep import sweep

    saes = []
    caches = {method: cache_folder(out, method, "train") for method in study.methods}
    # The same number of tokens for each method, so that none is trained longer.
    common = min(open_cache(cache).n_tokens for cache in caches.values())
    for method, cache in caches.items():
        place = sweep_folder(out, method)
        progress.say(f"SAEs of {method}: {place}")
        result = sweep(study.members(cache, common), place, progress, fresh)
        saes += [place / name for name, member in result["members"].items() if member["state"] == "trained"]
    return saes


def _evaluate(config: EvaluateConfig, done: Path, progress: Progress, fresh: bool) -> Evaluations:
    """The evaluations; those that are there, if `done` says that they are of these SAEs and settings."""
    from fastcache.sae.storage import sae_fingerprint
    from fastcache.stages.evaluate.earlier import EVALUATION_FILE
    from fastcache.stages.evaluate.run import evaluate

    folders = [Path(sae) for sae in config.sae]
    wanted = {"settings": as_dict(config), "saes": [sae_fingerprint(folder) for folder in folders]}
    files = [folder / EVALUATION_FILE for folder in folders]
    if not fresh and done.is_file() and read_json(done) == wanted and all(file.is_file() for file in files):
        progress.say(f"Evaluation of {len(files)} SAEs is there; nothing to do.")
        return [read_json(file) for file in files]
    evaluations = evaluate(config, progress)
    write_json_atomic(done, wanted)
    return evaluations
