"""What can't be in the arrays, the statistics and the ledger of a part, whose bytes and shapes are right."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.manifest import PartRecord
from fastcache.cache_format.schema import ROLE_SHIFT, TokenType, TurnRole
from fastcache.cache_format.statistics import GROUPS, Moments

KINDS = TokenType.SPECIAL | TokenType.ROLE_WORD | TokenType.TEMPLATE | TokenType.CONTENT


def token_problems(tokens: dict[str, npt.NDArray[Any]], record: PartRecord) -> Iterator[tuple[str, str]]:
    """What can't be in token arrays whose shapes and offsets are right: array, problem."""
    types, ids = tokens["token_types"], tokens["instance_ids"]
    starts, documents = tokens["instance_offsets"][:-1], tokens["document_ids"]
    kinds = np.bitwise_count(types & np.uint8(KINDS))
    if (kinds != 1).any():
        yield "token_types", f"token {int((kinds != 1).argmax())} should have exactly one of the flags 1, 2, 4, 8"
    if (types >> ROLE_SHIFT > max(TurnRole)).any():
        yield "token_types", f"token {int((types >> ROLE_SHIFT > max(TurnRole)).argmax())} has an unknown turn role"
    if not np.array_equal(np.flatnonzero(types & TokenType.FIRST_POSITION), starts):
        yield "token_types", "FIRST_POSITION should stand at the first token of each instance, and nowhere else"
    if len(tokens["token_ids"]) and tokens["token_ids"].min() < 0:
        yield "token_ids", "has a negative token id"
    if len(ids) and (ids[0] < 0 or (np.diff(ids) <= 0).any()):
        yield "instance_ids", "should rise, from 0 or more"
    if len(documents) and documents.min() < 0:
        yield "document_ids", "has a negative row"
    if not np.isin(starts, tokens["document_offsets"]).all():
        yield "document_offsets", "every instance should begin with a document"
    for problem in _ledger_against_documents(record.ledger, documents):
        yield "document_ids", problem


def ledger_problems(ledger: dict[str, Any]) -> Iterator[str]:
    """What can't be in the ledger of a log line."""
    stored, truncated, skipped = ledger.get("stored"), ledger.get("truncated"), ledger.get("skipped")
    if type(stored) is not int or stored < 0:
        yield f"ledger: stored should be a count, found {stored!r}"
    rows: list[Any] = truncated if isinstance(truncated, list) else [None]
    for reason_rows in skipped.values() if isinstance(skipped, dict) else [None]:
        rows = [*rows, *(reason_rows if isinstance(reason_rows, list) else [None])]
    if not all(type(row) is int and row >= 0 for row in rows):
        yield "ledger: truncated should list rows, and skipped list them by reason"
    elif len(set(rows)) != len(rows):
        yield "ledger: a row is accounted for twice"


def _ledger_against_documents(ledger: dict[str, Any], documents: npt.NDArray[Any]) -> Iterator[str]:
    if list(ledger_problems(ledger)):
        return
    there = set(documents.tolist())
    if not set(ledger["truncated"]) <= there:
        yield "lacks a row that the ledger has as truncated"
    if any(there & set(rows) for rows in ledger["skipped"].values()):
        yield "has a row that the ledger has as skipped"
    if ledger["stored"] + len(ledger["truncated"]) > len(there):
        yield f"has {len(there)} rows of the corpus, fewer than the ledger has as stored"


def moments_problems(moments: Moments, counts: npt.NDArray[np.int64]) -> Iterator[str]:
    """What can't be in the statistics of rows whose groups have these counts."""
    for g, group in enumerate(GROUPS):
        if moments.count[g] != counts[g]:
            yield f"{group} counts {moments.count[g]} tokens, the token types {counts[g]}"
        if moments.norm_counts[g].min() < 0 or moments.norm_counts[g].sum() != counts[g]:
            yield f"{group} has {moments.norm_counts[g].sum()} norms of {counts[g]} tokens"
    floats = (moments.mean, moments.squared_deviation, moments.norm_sum)
    if not all(np.isfinite(values).all() for values in floats):
        yield "has NaN or infinity"
    elif moments.squared_deviation.min() < 0 or moments.norm_sum.min() < 0:
        yield "has a negative squared deviation or norm"
