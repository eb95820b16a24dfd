"""What an extraction will take, said before it begins: tokens, disk, memory, and as soon as it is measured, time.

What can't fit is refused before anything is written.
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcache.cache_format.manifest import Log, load_manifest
from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.schema import STORED_DTYPES
from fastcache.cache_format.storage import open_storage
from fastcache.errors import FastcacheError, SpaceError
from fastcache.figures import duration, figure, size
from fastcache.llm.backend import Backend, TokenIds
from fastcache.memory import free_memory, process_bytes
from fastcache.progress import Progress
from fastcache.rundir import free_space
from fastcache.stages.extract.job import Job
from fastcache.stages.extract.memory import Needs, estimate_memory, pack_tokens
from fastcache.stages.extract.model_use import ModelUse

TOKEN_BYTES = 3
"""Bytes on disk of a token's id, type and share of offsets and checksums, compressed."""
WARM_UP_SECONDS = 5.0


@dataclass(frozen=True)
class Plan:
    """What will be made, and what it takes."""

    expected_tokens: int
    """Of the whole cache."""
    new_tokens: int
    """Those that aren't there yet; 0 for a cache that is complete."""
    row_bytes: int
    """Bytes of a token's rows, at all hook points."""
    disk_bytes: int
    needs: Needs
    rendered_per_second: float
    """Tokens, before the model sees them."""


def make_plan(job: Job, out: Path | str, sample: list[Instance], n_rows: int, seconds: float, fresh: bool) -> Plan:
    """The plan, by a `sample` of sequences that `n_rows` rows of the corpus gave in `seconds`."""
    n_sampled = sum(len(instance.token_ids) for instance in sample)
    expected = min(job.config.tokens, round(n_sampled / n_rows * job.corpus.n_rows(job.config.split)))
    row_bytes = (
        np.dtype(STORED_DTYPES[job.config.dtype]).itemsize * job.llm_config.hidden_size * len(job.use.hook_points)
    )
    kept = _committed_tokens(out, expected)
    left = max(0, expected - kept)  # with --fresh, what is there makes room
    new = expected if fresh else left
    disk_bytes, rate = left * (row_bytes + TOKEN_BYTES), n_sampled / max(seconds, 1e-3)
    return Plan(expected, new, row_bytes, disk_bytes, estimate_memory(job.use, sample), rate)


def _committed_tokens(out: Path | str, expected: int) -> int:
    """Tokens that are there, `expected` if all are; what is wrong with a cache is told by those who write to it."""
    with suppress(FastcacheError, FileNotFoundError):
        storage = open_storage(out)
        manifest = load_manifest(storage)
        if manifest.state == "complete" and not manifest.failed:
            return expected
        return sum(record.n_tokens for record in Log(storage).records)
    return 0


def _free_on(device: str) -> int:
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def announce(plan: Plan, use: ModelUse, out: Path | str, progress: Progress, force: bool) -> None:
    """Say what the run will take; raises `SpaceError` for what doesn't fit, unless `force` is given."""
    needs = plan.needs
    room, free = free_space(out) if isinstance(out, Path) else None, free_memory()
    figures = [
        f"{plan.new_tokens:,} tokens" + ("" if plan.new_tokens == plan.expected_tokens else " to go"),
        f"{size(plan.disk_bytes)} on disk" + _of(room),
        f"{size(needs.total)} of memory" + _of(free and free + process_bytes()),
    ]
    if use.n_workers > 1:
        figures.append(f"{size(needs.worker)} of it for each of {use.n_workers} workers")
    figures += [f"{size(needed)} of {device}" + _of(_free_on(device)) for device, needed in needs.devices.items()]
    progress.say(f"Plan (estimates): {', '.join(figures)}.")
    lacking = _lacking(plan, out, room, free)
    if lacking and not force:
        raise SpaceError(f"{' '.join(lacking)} Nothing was written. --force begins all the same.")
    for problem in lacking:
        progress.say(f"{problem} Going on, as --force says.")


def _of(free: int | None) -> str:
    return "" if free is None else f" ({size(free)} free)"


def _lacking(plan: Plan, out: Path | str, room: int | None, free: int | None) -> list[str]:
    """What doesn't fit, and what to do about it."""
    needs, problems = plan.needs, []
    if room is not None and room < plan.disk_bytes * 1.01:
        problems.append(
            f"This cache of about {plan.expected_tokens:,} tokens needs about {size(plan.disk_bytes)}, but the disk "
            f"of {out} has {size(room)} free. Free some space, choose an --out on another disk, or lower --tokens."
        )
    more = needs.total - process_bytes()
    if free is not None and more > free:
        problems.append(
            f"The run needs about {size(more)} more memory, but {size(free)} are free. Use fewer --workers, "
            "--model-dtype bfloat16, smaller --pack-tokens, or a machine with more memory."
        )
    for device, needed in needs.devices.items():
        if needed > (there := _free_on(device)):
            problems.append(
                f"The model needs about {size(needed)} of {device}, which has {size(there)} free. "
                "Use another device, fewer --workers, --model-dtype bfloat16, or smaller --pack-tokens."
            )
    return problems


def announce_time(plan: Plan, use: ModelUse, backend: Backend, sample: list[Instance], progress: Progress) -> None:
    """Say how long the run will take, by the time of the first sequences."""
    tokens, seconds = _warm_up(backend, sample, pack_tokens(use, sample))
    # Workers on a CPU share its cores; those on GPUs of their own don't.
    rate = tokens / seconds * max(1, len({device for device in use.devices if device.startswith("cuda")}))
    both = 1 / (1 / rate + 1 / plan.rendered_per_second)
    progress.say(
        f"About {duration(plan.new_tokens / both)} at {figure(both)} tokens/s, measured on {tokens:,} tokens (an estimate)."
    )


def _warm_up(backend: Backend, sample: list[Instance], limit: int) -> tuple[int, float]:
    """Tokens of one pack and the seconds it takes; where it is quick, the second time counts."""
    sequences: list[TokenIds] = []
    total = 0
    for instance in sample:
        if sequences and total + len(instance.token_ids) > limit:
            break
        sequences.append(instance.token_ids)
        total += len(instance.token_ids)
    for _ in range(2):
        begun = time.perf_counter()
        for _residuals in backend.residuals(sequences):
            pass
        seconds = time.perf_counter() - begun
        if seconds > WARM_UP_SECONDS:
            break
    return total, max(seconds, 1e-6)
