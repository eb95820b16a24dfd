"""What only shows over all parts: the manifest's figures against theirs, and order and uniqueness of what they hold."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.manifest import Manifest, PartRecord
from fastcache.cache_format.schema import LOG_FILE, MANIFEST_FILE, PARTS_FOLDER, TokenType
from fastcache.cache_format.statistics import Moments
from fastcache.cache_format.verify_part import Finding, PartFacts
from fastcache.cache_format.verify_values import ledger_problems


class Totals:
    """Sums over the parts, taken in one by one in their order."""

    def __init__(self, manifest: Manifest | None, knows_all: bool) -> None:
        """`knows_all`: no line of the log is lost."""
        self._manifest = manifest
        self._knows_log = self._knows_arrays = self._knows_ledger = knows_all
        self._counts = dict.fromkeys(("n_parts", "n_tokens", "n_instances", "n_bytes"), 0)
        self._type_counts = np.zeros(256, np.int64)
        self._moments = {hook: Moments.empty(manifest.d_in) for hook in manifest.hook_points} if manifest else {}
        self._squared_errors: dict[str, npt.NDArray[np.float64]] = {}
        self._ledger: dict[str, Any] = {"stored": 0, "truncated": 0, "skipped": {}}
        self._rows: set[int] = set()
        self._last_instance = -1

    def add(self, record: PartRecord, facts: PartFacts | None, is_intact: bool) -> Iterator[Finding]:
        """Take in a part; yields what doesn't fit the parts before."""
        n_bytes = record.n_bytes(self._manifest.hook_points) if self._manifest else 0
        amounts = (1, record.n_tokens, record.n_instances, n_bytes)
        for name, amount in zip(self._counts, amounts, strict=True):
            self._counts[name] += amount
        yield from self._add_ledger(record)
        if facts is None or facts.type_counts is None or not is_intact:
            self._knows_arrays = False
            return
        self._type_counts += facts.type_counts
        for hook, moments in facts.moments.items():
            self._moments[hook].merge(moments)
        for hook, squared_error in facts.squared_errors.items():
            self._squared_errors[hook] = self._squared_errors.get(hook, 0) + squared_error
        if facts.instance_ids is not None:
            first, last = facts.instance_ids
            if first <= self._last_instance:
                place = f"{PARTS_FOLDER}/{record.name}/instance_ids"
                yield Finding(
                    record.index, place, f"begin with {first}, the parts before end with {self._last_instance}"
                )
            self._last_instance = last

    def _add_ledger(self, record: PartRecord) -> Iterator[Finding]:
        ledger = record.ledger
        if list(ledger_problems(ledger)):  # told with the part
            self._knows_ledger = False
            return
        self._ledger["stored"] += ledger["stored"]
        self._ledger["truncated"] += len(ledger["truncated"])
        rows = list(ledger["truncated"])
        for reason, skipped in ledger["skipped"].items():
            self._ledger["skipped"][reason] = self._ledger["skipped"].get(reason, 0) + len(skipped)
            rows += skipped
        if not self._rows.isdisjoint(rows):
            yield Finding(
                record.index, LOG_FILE, f"part {record.index}: the ledger has a row that another part has too"
            )
        self._rows.update(rows)

    def compare(self) -> Iterator[Finding]:
        """The sums against a complete cache's manifest, as far as they are known."""
        if self._manifest is None or self._manifest.state != "complete":
            return
        if self._knows_log:
            yield from self._compare_counts(self._manifest.totals)
        if self._knows_log and self._knows_ledger and self._manifest.ledger:
            yield from self._compare_ledger(self._manifest.ledger)
        if self._knows_log and self._knows_arrays:
            yield from self._compare_arrays(self._manifest)

    def _compare_counts(self, totals: dict[str, Any]) -> Iterator[Finding]:
        for name, found in self._counts.items():
            if totals.get(name, found if name == "n_bytes" else None) != found:
                yield Finding(
                    None, LOG_FILE, f"{name} of all parts is {found:,}, the manifest says {totals.get(name)!r}"
                )

    def _compare_ledger(self, ledger: dict[str, Any]) -> Iterator[Finding]:
        for name, found in self._ledger.items():
            if ledger.get(name) != found:
                yield _figure(f"ledger.{name} is {ledger.get(name)!r}, the parts have {found!r}")
        counts: list[Any] = [
            ledger.get("stored"),
            ledger.get("truncated"),
            ledger.get("not reached"),
            ledger.get("failed", 0),  # 1.0 knew no failures
            ledger.get("rows"),
        ]
        skipped = self._ledger["skipped"].values()
        if not all(type(count) is int and count >= 0 for count in counts):
            yield _figure("ledger: stored, truncated, not reached and rows should be counts")
        elif sum(counts[:4]) + sum(skipped) != counts[4]:
            yield _figure(f"ledger: the rows of all outcomes are not {counts[3]:,}, the rows of the corpus")
        by_source = ledger.get("truncated_by_source", {})
        if by_source and sum(by_source.values()) != ledger.get("truncated"):
            yield _figure("ledger.truncated_by_source doesn't sum up to ledger.truncated")

    def _compare_arrays(self, manifest: Manifest) -> Iterator[Finding]:
        by_type = {
            str(flag.name): int(sum(count for value, count in enumerate(self._type_counts) if value & flag))
            for flag in TokenType
        }
        if (said := manifest.totals.get("tokens_by_type", by_type)) != by_type:
            yield _figure(f"totals.tokens_by_type is {said!r}, the parts have {by_type!r}")
        for hook, moments in self._moments.items():
            if manifest.statistics and not _alike(
                manifest.statistics.get(hook), moments.summary(self._squared_errors.get(hook))
            ):
                yield _figure(f"statistics.{hook} is not what the parts' statistics sum up to")


def _figure(problem: str) -> Finding:
    return Finding(None, MANIFEST_FILE, problem)


def _alike(said: Any, found: Any) -> bool:
    """Equal, but for the last digits of numbers that another machine may round otherwise."""
    if isinstance(said, dict) and isinstance(found, dict):
        return said.keys() == found.keys() and all(_alike(said[key], found[key]) for key in said)
    if isinstance(said, list) and isinstance(found, list):
        return len(said) == len(found) and all(map(_alike, said, found))
    if isinstance(said, float) and isinstance(found, float):
        return math.isclose(said, found, rel_tol=1e-9)
    return type(said) is type(found) and bool(said == found)
