"""From corpus rows to the sequences that the model sees, by data method, with a ledger entry for every row.

`fast` makes one sequence of one dialogue. `bt-f` and `bt-p` concatenate dialogues or documents and cut the stream into
blocks, `--tokens` in all; the row's entry stands with the block in which it ends. A last, shorter block is kept.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.part_writer import Instance
from fastcache.cache_format.schema import TokenType
from fastcache.corpus import CorpusRow
from fastcache.errors import InputError, TemplateRefusalError

REFUSED = "refused by the chat template"
"""Beginning of the reason why a dialogue was skipped; the template's own message follows."""
NOT_RENDERED = "not rendered"
"""The same for what is no dialogue, or no text."""


class Tokens(NamedTuple):
    """A corpus row as tokens: ids `[n]` and types `[n]`, and what rendering did to it."""

    ids: npt.NDArray[np.int32]
    types: npt.NDArray[np.uint8]
    changes: tuple[str, ...] = ()
    """How the dialogue was changed so that the chat template takes it."""
    left_out: tuple[tuple[str, int], ...] = ()
    """What the chat template left out, and how many characters of it."""


Tokenize = Callable[[CorpusRow], Tokens]


class Entry(NamedTuple):
    """What became of one corpus row: `stored`, `truncated`, or the reason it was skipped for."""

    row: int
    outcome: str
    changes: tuple[str, ...] = ()
    left_out: tuple[tuple[str, int], ...] = ()
    """As of `Tokens`; empty for a row that was skipped."""


def reason_of(error: InputError) -> str:
    """Why a row was skipped that can't be rendered: short, and the same for all rows of one kind."""
    if isinstance(error, TemplateRefusalError):
        return f"{REFUSED}: {error.reason}"
    return f"{NOT_RENDERED}: {str(error).split('.')[0]}"


@dataclass(frozen=True)
class Item:
    """One step of the stream: a sequence, or None for rows that made none, with the entries it settles."""

    instance: Instance | None
    entries: list[Entry]


def fast_items(rows: Iterable[CorpusRow], tokenize: Tokenize, max_length: int) -> Iterator[Item]:
    """One sequence a dialogue; longer ones keep their head."""
    for row in rows:
        try:
            token_ids, token_types, changes, left_out = tokenize(row)
        except InputError as error:
            yield Item(None, [Entry(row.row, reason_of(error))])
            continue
        if not len(token_ids):
            yield Item(None, [Entry(row.row, "no tokens")])
            continue
        outcome = "truncated" if len(token_ids) > max_length else "stored"
        instance = Instance(row.row, token_ids[:max_length], token_types[:max_length], [(row.row, 0)])
        yield Item(instance, [Entry(row.row, outcome, changes, left_out)])


@dataclass
class _Block:
    """A block being filled."""

    token_ids: list[npt.NDArray[np.int32]] = field(default_factory=list)
    token_types: list[npt.NDArray[np.uint8]] = field(default_factory=list)
    documents: list[tuple[int, int]] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    length: int = 0

    def take(self, row: int, token_ids: npt.NDArray[np.int32], token_types: npt.NDArray[np.uint8]) -> None:
        self.documents.append((row, self.length))
        self.token_ids.append(token_ids)
        self.token_types.append(token_types)
        self.length += len(token_ids)

    def item(self, number: int) -> Item:
        """The block as an item; only its own first token is at the first position."""
        types = np.concatenate(self.token_types) & np.uint8(0xFF ^ TokenType.FIRST_POSITION)
        types[0] |= TokenType.FIRST_POSITION
        return Item(Instance(number, np.concatenate(self.token_ids), types, self.documents), self.entries)


def block_items(
    rows: Iterable[CorpusRow], tokenize: Tokenize, block_size: int, separator: int | None, budget: int
) -> Iterator[Item]:
    """Blocks of `block_size` tokens, `budget` in all: the last one may be shorter, its last row `truncated`.

    `separator` ends each row where it is given.
    """
    number, block = 0, _Block()
    for row in rows:
        try:
            token_ids, token_types, changes, left_out = tokenize(row)
        except InputError as error:
            block.entries.append(Entry(row.row, reason_of(error)))
            continue
        if not len(token_ids):
            block.entries.append(Entry(row.row, "no tokens"))
            continue
        if separator is not None:
            token_ids = np.append(token_ids, np.int32(separator))
            token_types = np.append(token_types, np.uint8(TokenType.SPECIAL))
        is_cut = len(token_ids) > budget
        token_ids, token_types = token_ids[:budget], token_types[:budget]
        budget -= len(token_ids)
        while len(token_ids):
            room = block_size - block.length
            block.take(row.row, token_ids[:room], token_types[:room])
            token_ids, token_types = token_ids[room:], token_types[room:]
            if not len(token_ids):
                block.entries.append(Entry(row.row, "truncated" if is_cut else "stored", changes, left_out))
            if block.length == block_size:
                yield block.item(number)
                number, block = number + 1, _Block()
        if not budget:
            break
    if block.length:
        yield block.item(number)
    elif block.entries:
        yield Item(None, block.entries)


@dataclass
class Unit:
    """Sequences that one worker computes and that become one part."""

    index: int
    instances: list[Instance] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    n_tokens: int = 0


def cut_units(items: Iterable[Item], unit_tokens: int, budget: int) -> Iterator[Unit]:
    """Cut the stream into units of at most `unit_tokens` (or one longer sequence), up to `budget` tokens in all.

    The cuts depend on the stream alone, not on who computes the units.
    """
    unit, total = Unit(0), 0
    for item in items:
        length = len(item.instance.token_ids) if item.instance else 0
        if total + length > budget:
            break
        if unit.instances and unit.n_tokens + length > unit_tokens:
            yield unit
            unit = Unit(unit.index + 1)
        if item.instance:
            unit.instances.append(item.instance)
        unit.entries += item.entries
        unit.n_tokens += length
        total += length
    if unit.instances:
        yield unit
