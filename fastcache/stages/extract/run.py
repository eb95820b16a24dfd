"""The extract stage: units of the corpus go through the model, each becomes a committed part of the cache."""

import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastcache.cache_format.manifest import Manifest
from fastcache.cache_format.reader import Cache
from fastcache.cache_format.schema import ROLE_SHIFT, TokenType, TurnRole
from fastcache.cache_format.writer import CacheWriter
from fastcache.config import as_dict
from fastcache.errors import InputError, ModelError
from fastcache.progress import Progress
from fastcache.rundir import versions
from fastcache.stages.extract.config import ExtractConfig
from fastcache.stages.extract.job import Job, make_job
from fastcache.stages.extract.ledger import part_ledger, total_ledger
from fastcache.stages.extract.memory import queue_bytes
from fastcache.stages.extract.output import cache_output
from fastcache.stages.extract.plan import announce, make_plan
from fastcache.stages.extract.sequences import Item
from fastcache.stages.extract.status import STATUS_FILE
from fastcache.stages.extract.unit_run import UnitRun

MOST_REASONS = 3
"""Reasons that are quoted where nothing can be rendered."""
SAMPLE = 256
"""Sequences looked at to estimate the size of the job and to choose those of the parity check."""


def extract(
    config: ExtractConfig,
    find_corpus: Callable[[], Path],
    out: Path | str,
    progress: Progress,
    fresh: bool = False,
    force: bool = False,
) -> Cache:
    """Fill the cache at `out`, a folder or an address such as `s3://bucket/folder`, or go on filling it; returns it opened.

    `find_corpus` names the corpus directory; it is asked once the model is known to serve, for it may be long at it.
    Everything that can be wrong with the input is found before `out` is touched, and what disk or memory can't hold is
    refused, but for `force`. Raises `ModelError`, `InputError`, `MismatchError`, `SpaceError`, `NonFiniteError`.
    """
    job = make_job(config, find_corpus)
    started = time.monotonic()
    items = list(islice(job.items(), SAMPLE))
    sample = [item.instance for item in items if item.instance]
    if not sample:
        raise InputError(_nothing_rendered(items, job))
    n_rows = max(1, sum(len(item.entries) for item in items))  # a long document may not have ended yet
    plan = make_plan(job, out, sample, n_rows, time.monotonic() - started, fresh)
    if plan.new_tokens:
        announce(plan, job.use, out, progress, force)
    queue = queue_bytes(job.use, sample)
    with (
        cache_output(out, as_dict(job.config), fresh) as storage,
        CacheWriter(storage, Manifest(job.identity(), versions=versions()), queue_bytes=queue) as writer,
    ):
        if writer.manifest.state == "complete" and not writer.manifest.failed:
            progress.say(f"{out} is complete; nothing to do (--fresh starts over).")
            return Cache(writer.storage)
        if writer.manifest.state == "complete":  # but for units that failed: they are tried again
            writer.manifest.state = "writing"
            writer.save_manifest()
        job.use.say(progress)
        path = out / STATUS_FILE if isinstance(out, Path) else None

        def keep_parity(figures: dict[str, Any]) -> None:
            writer.manifest.parity = figures
            writer.save_manifest()

        run = UnitRun(job.use, job.worker(writer.storage.url, queue), plan, sample, progress, path)
        failed = run.compute(
            f"extract {config.method}", job.units(), writer, None if writer.manifest.parity else keep_parity
        )
        return finish(writer, job, failed)


def _nothing_rendered(items: Sequence[Item], job: Job) -> str:
    """Why there is no sequence to begin with: the reasons, with how many rows each has and the first of them."""
    ledger = part_ledger(entry for item in items for entry in item.entries)
    reasons = [
        f"{len(rows):,} rows were {reason} (the first one is row {min(rows):,})"
        for reason, rows in sorted(ledger["skipped"].items(), key=lambda reason: -len(reason[1]))
    ]
    fold = "" if job.config.fold_system else " If system turns are refused, --fold-system puts them into the user's."
    return (
        f"None of the first {sum(len(item.entries) for item in items):,} rows of {job.corpus.path} could be rendered: "
        f"{'; '.join(reasons[:MOST_REASONS])}. Choose a model whose chat template takes such dialogues, or another corpus."
        f"{fold}"
    )


def finish(writer: CacheWriter, job: Job, failed: dict[int, str] | None = None) -> Cache:
    """Check the totals and mark the cache complete; a manifest that says so already is left alone.

    `failed` are the units that were given up, with the reason: their rows are in the ledger. None: those of before.
    """
    if failed is None:
        failed = {int(index): reason for index, reason in writer.manifest.failed.items()}
    before = writer.manifest.to_bytes()
    records = [writer.committed[index] for index in sorted(writer.committed)]
    if failed and not records:
        raise ModelError(f"Every unit failed, the first one because: {next(iter(failed.values()))}.")
    if not records:
        raise InputError("--tokens leaves no room for a single sequence; nothing was cached.")
    cache = Cache(writer.storage)
    manifest = writer.manifest
    split = job.config.split
    manifest.failed = {str(index): reason for index, reason in sorted(failed.items())}
    n_failed = sum(len(unit.entries) for unit in job.units() if unit.index in failed) if failed else 0
    manifest.ledger = total_ledger((record.ledger for record in records), n_failed, job.corpus.n_rows(split))
    truncated = {row for record in records for row in record.ledger["truncated"]}
    manifest.ledger["truncated_by_source"] = job.corpus.sources_of(split, truncated)
    manifest.statistics = {hook: cache.summary(hook) for hook in manifest.hook_points}
    manifest.totals = {
        "n_tokens": cache.n_tokens,
        "n_instances": cache.n_instances,
        "n_parts": len(records),
        "n_bytes": sum(record.n_bytes(manifest.hook_points) for record in records),
        **_token_counts(cache),
    }
    if job.config.method != "fast":
        manifest.totals["last_block_tokens"] = len(cache.instance(-1))
    manifest.state = "complete"
    if manifest.to_bytes() != before:
        writer.save_manifest()
    return Cache(writer.storage)


def _token_counts(cache: Cache) -> dict[str, dict[str, int]]:
    """Tokens by the flags of their types and, of roles that there are, by the role of their turn."""
    # Not `part.tokens`, which every part would keep.
    types = (part.small("token_types", (part.record.n_tokens,), "uint8") for part in cache.parts)
    counts = sum((np.bincount(values, minlength=256) for values in types), np.zeros(256, np.int64))
    flags = {
        flag.name or str(int(flag)): int(sum(count for value, count in enumerate(counts) if value & flag))
        for flag in TokenType
    }
    roles = {
        role.name: int(sum(count for value, count in enumerate(counts) if value >> ROLE_SHIFT == role))
        for role in TurnRole
    }
    return {"tokens_by_type": flags, "tokens_by_role": {name: count for name, count in roles.items() if count}}
