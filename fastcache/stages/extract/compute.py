"""From units to parts: by this process, or by a crew of worker processes that each hold the model."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fastcache.cache_format.layers import LayerWriter
from fastcache.cache_format.manifest import Manifest, PartRecord
from fastcache.cache_format.storage import open_storage
from fastcache.cache_format.writer import QUEUE_BYTES, CacheWriter, PartSink
from fastcache.crew import Advance, Crew, Done, Failed, Report, Work
from fastcache.errors import FormatError, MismatchError, NonFiniteError, SpaceError
from fastcache.llm.backend import Backend, LostBackendError, Residuals
from fastcache.llm.backends import BackendPlan
from fastcache.stages.extract.ledger import NON_FINITE, outcomes, part_ledger
from fastcache.stages.extract.sequences import Entry, Unit
from fastcache.stages.extract.status import Status

STOPPING = (NonFiniteError, FormatError, MismatchError, SpaceError)
"""Errors of a unit that would come again, or that all units would meet."""


@dataclass(frozen=True)
class Worker:
    """All that a worker process needs to begin."""

    place: str
    identity: dict[str, Any]
    plan: BackendPlan
    skip_nonfinite: bool
    queue_bytes: int = QUEUE_BYTES
    sink: type[PartSink] = PartSink


ALL_NON_FINITE = "all of its dialogues have NaN or infinity"
"""Why a unit is given up of which `--on-nonfinite skip` leaves nothing: a part can't be empty."""


def _begin(worker: Worker, number: int) -> Work:
    backend = worker.plan.open(number)
    storage, manifest = open_storage(worker.place), Manifest(worker.identity)

    def work(unit: Unit, report: Report) -> PartRecord | None:
        with worker.sink(storage, manifest, worker.queue_bytes) as sink:
            try:
                made = compute_part(unit, sink, backend, report, worker.skip_nonfinite)
                return made.result() if made else None
            except LostBackendError as error:  # another process takes the unit, with a new backend
                raise SystemExit(str(error)) from error

    return work


def _without(unit: Unit, rows: set[int]) -> Unit:
    """The unit without the dialogues of these corpus rows."""
    if not rows:
        return unit
    return replace(
        unit,
        instances=[instance for instance in unit.instances if instance.instance_id not in rows],
        entries=[Entry(entry.row, NON_FINITE) if entry.row in rows else entry for entry in unit.entries],
        n_tokens=sum(len(i.token_ids) for i in unit.instances if i.instance_id not in rows),
    )


def as_committed(unit: Unit, record: PartRecord, url: str) -> Unit:
    """The unit as it was committed; raises `MismatchError` if it can't have been this one."""
    unit = _without(unit, set(record.ledger["skipped"].get(NON_FINITE, ())))
    n_tokens, n_instances, ledger = _figures(unit)
    there = record.n_tokens, record.n_instances, outcomes(record.ledger)
    if there != (n_tokens, n_instances, outcomes(ledger)):
        raise MismatchError(
            f"Part {unit.index} of {url} holds other sequences than are made now: a package changed since it was begun "
            "(run.json has the versions). Go back to these versions, or start over with --fresh."
        )
    return unit


def _figures(unit: Unit) -> tuple[int, int, dict[str, Any]]:
    return unit.n_tokens, len(unit.instances), part_ledger(unit.entries)


def _is_finite(residuals: Residuals) -> bool:
    return all(bool(np.isfinite(rows).all()) for rows in residuals.values())


def compute_part(
    unit: Unit, sink: PartSink, backend: Backend, report: Report, skip_nonfinite: bool
) -> "Future[PartRecord] | None":
    """Make the part of `unit`; it is committed when the future is done.

    A dialogue with NaN or infinity stops the run, with its number; with `skip_nonfinite` the unit is made again without
    it, and None is returned if none is left.
    """
    while True:
        bad: set[int] = set()
        part = sink.part(unit.index, unit.instances)
        everything = backend.residuals(instance.token_ids for instance in unit.instances)
        for instance, residuals in zip(unit.instances, everything, strict=True):
            if skip_nonfinite and not _is_finite(residuals):
                bad.add(instance.instance_id)
            if not bad:
                part.append(residuals)
                report(len(instance.token_ids))
        if not bad:
            return part.commit_soon(part_ledger(unit.entries))
        part.abandon_soon()
        if len(bad) == len(unit.instances):
            return None
        unit = _without(unit, bad)


def compute_here(
    units: Iterable[Unit], writer: CacheWriter | LayerWriter, backend: Backend, skip_nonfinite: bool, status: Status
) -> dict[int, str]:
    """Make the parts of the units that are missing, in this process; returns those given up, with the reason."""
    failed: dict[int, str] = {}
    for unit in _missing(units, writer):
        if made := compute_part(unit, writer, backend, status.advance, skip_nonfinite):
            made.add_done_callback(lambda _: status.unit_done())
        else:
            failed[unit.index] = ALL_NON_FINITE
            status.unit_failed(unit.index, ALL_NON_FINITE)
    writer.drain()
    return failed


def compute_by_crew(
    units: Iterable[Unit], writer: CacheWriter | LayerWriter, worker: Worker, n_workers: int, status: Status
) -> dict[int, str]:
    """Make the parts of the units that are missing, by `n_workers` processes; returns those given up, with the reason."""
    crew = Crew(partial(_begin, worker), n_workers, STOPPING)
    status.workers = crew.states
    failed: dict[int, str] = {}
    with closing(crew.run((unit.index, unit) for unit in _missing(units, writer))) as messages:
        for message in messages:
            if isinstance(message, Advance):
                status.advance(message.amount)
            elif isinstance(message, Done) and message.result:
                writer.log_part(message.result)
                status.unit_done()
            else:
                failed[message.key] = message.reason if isinstance(message, Failed) else ALL_NON_FINITE
                status.unit_failed(message.key, failed[message.key])
    return failed


def _missing(units: Iterable[Unit], writer: CacheWriter | LayerWriter) -> Iterator[Unit]:
    """The units that are not committed yet; raises `MismatchError` for one that is, with other sequences."""
    for unit in units:
        record = writer.logged.get(unit.index)
        if record is not None:
            unit = as_committed(unit, record, writer.storage.url)  # noqa: PLW2901
        if unit.index not in writer.committed:
            yield unit
