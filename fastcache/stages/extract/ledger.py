"""The ledger: what became of every corpus row, per part and in total, with a check that the sums come out."""

from collections.abc import Iterable
from typing import Any

from fastcache.errors import IntegrityError
from fastcache.stages.extract.sequences import Entry

NON_FINITE = "non-finite residuals"
"""Why a dialogue was skipped."""


def part_ledger(entries: Iterable[Entry]) -> dict[str, Any]:
    """Entries of one part: a count of the stored, the rows of all others by outcome."""
    ledger: dict[str, Any] = {"stored": 0, "truncated": [], "skipped": {}}
    for row, outcome in entries:
        if outcome == "stored":
            ledger["stored"] += 1
        elif outcome == "truncated":
            ledger["truncated"].append(row)
        else:
            ledger["skipped"].setdefault(outcome, []).append(row)
    return ledger


def total_ledger(parts: Iterable[dict[str, Any]], n_failed: int, n_rows: int) -> dict[str, Any]:
    """Sum of the parts' ledgers, and of the rows of units that failed, over a corpus of `n_rows`.

    Rows beyond the token budget are `not reached`.

    Raises `IntegrityError` if the parts account for more rows than there are.
    """
    stored = truncated = 0
    skipped: dict[str, int] = {}
    for ledger in parts:
        stored += ledger["stored"]
        truncated += len(ledger["truncated"])
        for reason, rows in ledger["skipped"].items():
            skipped[reason] = skipped.get(reason, 0) + len(rows)
    accounted = stored + truncated + sum(skipped.values()) + n_failed
    if accounted > n_rows:
        raise IntegrityError(f"The ledger accounts for {accounted} rows of a corpus with {n_rows}.")
    return {
        "rows": n_rows,
        "stored": stored,
        "truncated": truncated,
        "skipped": dict(sorted(skipped.items())),
        "failed": n_failed,
        "not reached": n_rows - accounted,
    }
