"""The ledger: what became of every corpus row, per part and in total, with a check that the sums come out."""

from collections.abc import Iterable
from typing import Any

from fastcache.errors import IntegrityError
from fastcache.stages.extract.sequences import NOT_RENDERED, REFUSED, Entry

NON_FINITE = "non-finite residuals"
"""Why a dialogue was skipped."""


def part_ledger(entries: Iterable[Entry]) -> dict[str, Any]:
    """Entries of one part: a count of the stored, the rows of all others by outcome.

    Where rendering changed dialogues or the chat template left something out, there are counts of that as well.
    """
    ledger: dict[str, Any] = {"stored": 0, "truncated": [], "skipped": {}}
    for row, outcome, changes, left_out in entries:
        for change in changes:
            changed = ledger.setdefault("changed", {})
            changed[change] = changed.get(change, 0) + 1
        for name, n_characters in left_out:
            counts = ledger.setdefault("left_out", {}).setdefault(name, {"rows": 0, "characters": 0})
            counts["rows"] += 1
            counts["characters"] += n_characters
        if outcome == "stored":
            ledger["stored"] += 1
        elif outcome == "truncated":
            ledger["truncated"].append(row)
        else:
            ledger["skipped"].setdefault(outcome, []).append(row)
    return ledger


def outcomes(ledger: dict[str, Any]) -> dict[str, Any]:
    """What became of the rows of a part, without the words of refusals, which caches of older versions don't have."""
    skipped: dict[str, list[int]] = {}
    for reason, rows in ledger["skipped"].items():
        kind = REFUSED if reason.startswith((REFUSED, NOT_RENDERED)) else reason
        skipped[kind] = sorted([*skipped.get(kind, []), *rows])
    return {"stored": ledger["stored"], "truncated": ledger["truncated"], "skipped": skipped}


def total_ledger(parts: Iterable[dict[str, Any]], n_failed: int, n_rows: int) -> dict[str, Any]:
    """Sum of the parts' ledgers, and of the rows of units that failed, over a corpus of `n_rows`.

    Rows beyond the token budget are `not reached`. `first_skipped` has the first row of each reason.

    Raises `IntegrityError` if the parts account for more rows than there are.
    """
    stored = truncated = 0
    skipped: dict[str, int] = {}
    first: dict[str, int] = {}
    changed: dict[str, int] = {}
    left_out: dict[str, dict[str, int]] = {}
    for ledger in parts:
        stored += ledger["stored"]
        truncated += len(ledger["truncated"])
        for reason, rows in ledger["skipped"].items():
            skipped[reason] = skipped.get(reason, 0) + len(rows)
            first[reason] = min([*rows, *([first[reason]] if reason in first else [])])
        for change, count in ledger.get("changed", {}).items():
            changed[change] = changed.get(change, 0) + count
        for name, counts in ledger.get("left_out", {}).items():
            total = left_out.setdefault(name, {"rows": 0, "characters": 0})
            for unit, count in counts.items():
                total[unit] += count
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
        **({"first_skipped": dict(sorted(first.items()))} if first else {}),
        **({"changed": dict(sorted(changed.items()))} if changed else {}),
        **({"left_out": dict(sorted(left_out.items()))} if left_out else {}),
    }


def rendering_notes(ledger: dict[str, Any]) -> list[str]:
    """What a total ledger says about rendering, a sentence each: refusals with their first row, changes, losses."""
    notes = [
        f"{_dialogues(count)} skipped ({reason}); the first one is row {ledger['first_skipped'][reason]:,}."
        for reason, count in ledger.get("skipped", {}).items()
        if reason in ledger.get("first_skipped", {})
    ]
    notes += [f"{_dialogues(count)} changed: {change}." for change, count in ledger.get("changed", {}).items()]
    notes += [
        f"{_dialogues(counts['rows'])} shortened by the chat template: it left out {name} ({counts['characters']:,} "
        "characters)."
        for name, counts in ledger.get("left_out", {}).items()
    ]
    return notes


def _dialogues(count: int) -> str:
    return "1 dialogue was" if count == 1 else f"{count:,} dialogues were"
