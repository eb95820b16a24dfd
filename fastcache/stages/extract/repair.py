"""Repairing a cache: the damaged parts, and no others, are computed again from model and corpus.

The line of a damaged part stays in the log until the new part is in its place. Killed at any moment, the same command
goes on: what is mended then verifies, what is not is found again.
"""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from fastcache.cache_format.manifest import Log, Manifest, PartRecord, load_manifest, parse_log, read_log
from fastcache.cache_format.schema import LOG_FILE, MANIFEST_FILE, PARTS_FOLDER
from fastcache.cache_format.storage import Storage, open_storage
from fastcache.cache_format.verify import verify
from fastcache.cache_format.verify_part import Finding
from fastcache.cache_format.writer import CacheWriter, groups
from fastcache.config import differences, from_mapping
from fastcache.corpus import CORPUS_FILE
from fastcache.errors import FastcacheError, FormatError, InputError, IntegrityError, MismatchError, ModelError
from fastcache.llm.loading import place_of
from fastcache.progress import Progress
from fastcache.rundir import RUN_FILE, stored_path
from fastcache.stages.extract.compute import as_committed, compute_part
from fastcache.stages.extract.config import ExtractConfig
from fastcache.stages.extract.job import Job, make_job
from fastcache.stages.extract.output import cache_output, run_of
from fastcache.stages.extract.run import finish


def repair(
    root: Path | str,
    progress: Progress,
    corpus: str | None = None,
    device: str | None = None,
    model: str | None = None,
) -> list[int]:
    """Verify the cache at `root`, a folder or an address, and mend what is wrong; returns the parts computed again.

    `corpus` and `model` are where these are now, if they were moved. Raises `InputError` for what can't be mended,
    `ModelError` without the model, `MismatchError` if model or corpus are not those that the cache was made from.
    """
    run = run_of(open_storage(root))
    settings = run["settings"]
    with cache_output(root, settings, fresh=False) as storage:
        problems = _problems(storage, progress)
        if not problems:
            progress.say(f"{root} is whole: nothing to repair.")
            return []
        for finding in problems:
            progress.say(str(finding))
        manifest = _require_mendable(storage, problems)
        _mend_metadata(storage, manifest, problems, progress)
        todo = _damaged(storage, manifest, problems)
        doubtful = [
            finding for finding in problems if finding.part is None and finding.file in (MANIFEST_FILE, LOG_FILE)
        ]
        if todo or doubtful:
            config = from_mapping(ExtractConfig, settings, RUN_FILE)
            where = Path(corpus) if corpus else stored_path(run, config.corpus or "", root)
            job = _job(config, manifest, where, device, model or place_of(config.model, root))
            with CacheWriter(storage, Manifest(job.identity()), replace=todo) as writer:
                for finding in problems:
                    if finding.part is not None and finding.file == LOG_FILE:
                        writer.logged.pop(finding.part, None)  # its line says nothing to compare with
                changed = _recompute(writer, job, todo, progress)
                if manifest.state == "complete" and (changed or doubtful):
                    _finish_anew(writer, job, is_wrong=any(finding.file == MANIFEST_FILE for finding in doubtful))
        if left := _problems(storage, progress):
            raise IntegrityError(f"{root} is still damaged after the repair: {'; '.join(map(str, left[:3]))}.")
        progress.say(f"{root} is whole again.")
        return sorted(todo)


def _problems(storage: Storage, progress: Progress) -> list[Finding]:
    return [finding for finding in verify(storage, progress=progress) if not finding.is_note]


def _require_mendable(storage: Storage, problems: list[Finding]) -> Manifest:
    """The manifest, without which nothing can be computed."""
    try:
        manifest = load_manifest(storage)
    except FastcacheError as error:
        raise InputError(
            f"{storage.url}/{MANIFEST_FILE} is damaged, and it can't be computed from the rest: it says what the cache "
            f"is. Restore the file from a copy, or extract the cache again (its settings are in {RUN_FILE}) with --fresh."
        ) from error
    manifest.require_writable(storage.url)
    if any(finding.file == PARTS_FOLDER for finding in problems):
        raise InputError(
            f"{storage.url}/{PARTS_FOLDER} is a symbolic link or can't be read, and nothing is written through it. "
            "Put the folder itself in its place and repeat the command."
        )
    return manifest


def _mend_metadata(storage: Storage, manifest: Manifest, problems: list[Finding], progress: Progress) -> None:
    """Write anew what needs no computing: the groups above the parts, the log without its bad lines."""
    for name, data in groups(manifest.format_version).items():
        if any(finding.file == name for finding in problems):
            storage.write(name, data)
            progress.say(f"{name}: written anew")
    parsed = parse_log(read_log(storage))
    if parsed.bad or parsed.is_torn:
        Log(storage, salvage=True).rewrite()
        progress.say(f"{LOG_FILE}: {len(parsed.good)} good lines kept")


def _damaged(storage: Storage, manifest: Manifest, problems: list[Finding]) -> set[int]:
    """Parts that are damaged, or of which a complete cache has lost the line."""
    damaged = {finding.part for finding in problems if finding.part is not None}
    n_parts = manifest.totals.get("n_parts", 0) if manifest.state == "complete" else 0
    if type(n_parts) is not int or n_parts > 2**24:
        raise FormatError(f"{storage.url}/{MANIFEST_FILE}: n_parts is {n_parts!r}. Restore the file from a copy.")
    failed = {int(index) for index in manifest.failed}  # these were never made
    expected = set(range(n_parts + len(failed))) - failed
    return damaged | (expected - {record.index for record in Log(storage).records})


def _job(config: ExtractConfig, manifest: Manifest, corpus: Path, device: str | None, model: str | None) -> Job:
    """The job that made the cache; raises `MismatchError` if it would make another one now."""
    if not (corpus / CORPUS_FILE).is_file():
        raise InputError(f"The corpus of the cache is not at {corpus.absolute()}. Say where it is with --corpus DIR.")
    # A model that ran in bfloat16 because there was a GPU must do so again.
    model_dtype = manifest.identity.get("model_dtype", config.model_dtype)
    backend = manifest.identity.get("backend", "transformers")
    config = replace(config, model_dtype=model_dtype, backend=backend, device=device or config.device)
    try:
        job = make_job(config, lambda: corpus, model)
    except ModelError as error:
        raise ModelError(f"{error} Say where the model of the cache is with --model DIR.") from error
    if found := differences(manifest.identity, job.identity()):
        raise MismatchError(
            f"Model or corpus are not those that the cache was made from ({'; '.join(found)}); nothing was computed. "
            "Repair it where they are, or say with --corpus and --model where they are now."
        )
    return job


def _recompute(writer: CacheWriter, job: Job, todo: set[int], progress: Progress) -> bool:
    """Make the parts `todo` again; returns whether any of them is not what its line in the log had."""
    if not todo:
        return False
    progress.say(f"Computing {len(todo)} of {len(writer.committed) + len(todo)} parts again ...")
    made = set()
    tokens = sum(record.n_tokens for record in writer.logged.values() if record.index in todo)
    with closing(job.use.plan().open()) as backend, progress.task("repair", tokens, "tokens") as task:
        for unit in job.units():
            made.add(unit.index)
            if unit.index in todo:
                record = writer.logged.get(unit.index)
                wanted = as_committed(unit, record, writer.storage.url) if record else unit
                compute_part(wanted, writer, backend, task.advance, skip_nonfinite=False)
            if todo <= made:
                break
        writer.drain()
    if missing := sorted(todo - made):
        raise MismatchError(
            f"The corpus makes no part {missing[0]}: a package changed since it was begun ({RUN_FILE})."
        )
    is_changed = False
    for index in sorted(todo):
        is_same = _is_same(writer.logged.get(index), writer.committed[index])
        is_changed |= not is_same
        progress.say(
            f"part {index}: computed again, " + ("identical to the original" if is_same else "not the same bytes")
        )
    return is_changed


def _is_same(before: PartRecord | None, now: PartRecord) -> bool:
    return before is not None and before.files == now.files


def _finish_anew(writer: CacheWriter, job: Job, is_wrong: bool) -> None:
    """Bring the manifest's figures up to date."""
    if is_wrong:  # while they are computed, readers must not compare the log with them
        writer.manifest.state = "writing"
        writer.save_manifest()
    finish(writer, job)
