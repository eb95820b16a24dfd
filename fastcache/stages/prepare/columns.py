"""The rows of a chunk, cleaned, as columns: straight from the raw rows to the arrays that are hashed and written.

`schema.usable` says what becomes of a row. Most rows are plain dialogues, though, in which nothing is to be found: these are
taken over by a tight loop that gives every other row to `usable`.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fastcache.corpus import MESSAGE, OPTIONAL_FIELDS
from fastcache.errors import InputError
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.kernels import U32, Bytes, Numbers, whole_hashes
from fastcache.stages.prepare.ngrams import Grams, Turns
from fastcache.stages.prepare.reading import Malformed, Row
from fastcache.stages.prepare.schema import CHAT_COLUMNS, ROLES, Unusable, usable

ROLE_NAMES = tuple(dict.fromkeys(ROLES.values()))
SYSTEM, TEXT = ROLE_NAMES.index("system"), 255
"""Codes of turns: places in ROLE_NAMES; a plain text is one turn of its own code."""

_CODES = {name: ROLE_NAMES.index(role) for name, role in ROLES.items()}
WHOLE = np.dtype([("hash", "<u8"), ("check", "<u4")])
STAGED = pa.schema(
    [
        ("source", pa.string()),
        ("source_row", pa.int64()),
        ("reason", pa.string()),
        ("whole", pa.binary(WHOLE.itemsize)),
        ("messages", pa.list_(MESSAGE)),
        ("text", pa.string()),
        ("tools", pa.string()),
    ]
)
MAX_BYTES = 2**31 - 1
"""Text that an Arrow array of strings holds."""


class Columns:
    """Grows row by row: each row's number of turns, each turn's code and UTF-8 text, and reasons for unusable rows."""

    def __init__(self) -> None:
        self.n_turns: list[int] = []
        self.codes = bytearray()
        self.data = bytearray()
        self.stops: list[int] = []
        self.reasons: dict[int, str] = {}
        self.sources: list[tuple[str, int, int]] = []
        """Source, number there of the first row, number of rows."""

    def add(
        self, rows: Iterable[Row | Malformed], source: str, first_row: int, column: str | None, config: PrepareConfig
    ) -> None:
        """Add rows of a source; raises `InputError` for an unusable one if that is asked for."""
        names = (column,) if column else CHAT_COLUMNS
        plain = not (config.alternating or config.max_turn_chars)
        n_before = len(self.n_turns)
        for row in rows:
            n_turns = self._take(row, names) if plain else 0
            if not n_turns:
                try:
                    n_turns = self._clean(row, column, config)
                except Unusable as verdict:
                    number = len(self.n_turns)
                    if config.strict:
                        place = f"{source}, row {first_row + number - n_before}"
                        place = row.place if isinstance(row, Malformed) else place
                        raise InputError(f"{place}: {verdict} (--strict). Nothing was written.") from None
                    self.reasons[number] = str(verdict)
            self.n_turns.append(n_turns)
        self.sources.append((source, first_row, len(self.n_turns) - n_before))
        if len(self.data) > MAX_BYTES:
            raise InputError(f"{source}: more than 2 GiB of text in the few rows from row {first_row} on.")

    def _take(self, row: Row | Malformed, names: tuple[str, ...]) -> int:
        """Take over a plain dialogue and return its number of turns; take nothing and return 0 if it is not so plain."""
        codes, data, stops = self.codes, self.data, self.stops
        n_before, n_bytes = len(stops), len(data)
        code = SYSTEM
        try:
            for name in names:
                turns = row.get(name)  # type: ignore[union-attr]
                if turns is not None:
                    break
            for turn in turns:  # type: ignore[union-attr]
                if "role" in turn:
                    code, text = _CODES[turn["role"]], turn["content"]
                elif len(turn) == 2:
                    code, text = _CODES[turn["from"]], turn["value"]
                else:
                    break
                if text.isspace() or not text:
                    break
                data += text.encode()
                stops.append(len(data))
                codes.append(code)
            else:
                if code != SYSTEM:  # so that not all turns are the system's
                    return len(stops) - n_before
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
            pass
        del data[n_bytes:], stops[n_before:], codes[n_before:]
        return 0

    def _clean(self, row: Row | Malformed, column: str | None, config: PrepareConfig) -> int:
        """Add any usable row and return its number of turns; raises `Unusable`."""
        if isinstance(row, Malformed):
            raise Unusable(row.reason)
        found = usable(row, column, config.alternating, config.max_turn_chars)
        turns = [(TEXT, found["text"])]
        if found["messages"] is not None:
            turns = [(_CODES[message["role"]], message["content"]) for message in found["messages"]]
        for code, text in turns:
            self.data += text.encode()
            self.stops.append(len(self.data))
            self.codes.append(code)
        return len(turns)


class CleanRows:
    """The rows of a chunk as arrays: `turns` with their `codes` `[t]`, and `n_turns` `[r]` of each row, 0 if unusable."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self.turns = turns = Turns.of(columns.data, columns.stops)
        self.codes: Bytes = np.frombuffer(columns.codes, np.uint8)
        self.n_turns: Numbers = np.array(columns.n_turns, np.int64)
        self.owners: U32 = np.repeat(np.arange(len(self.n_turns), dtype=np.uint32), self.n_turns)
        """The row `[t]` of each turn."""
        self._hashes = np.empty(len(self.n_turns), np.uint64)
        self._checks = np.empty(len(self.n_turns), np.uint32)
        whole_hashes(*turns, self.codes, self.n_turns, self._hashes, self._checks)

    @property
    def whole(self) -> Grams:
        """Every usable row as one n-gram: all its turns, with their roles."""
        usable = np.flatnonzero(self.n_turns)
        return Grams(self._hashes[usable], self._checks[usable], usable.astype(np.uint32))

    def table(self) -> pa.Table:
        """As `STAGED`, every row of the input."""
        n_rows = len(self.n_turns)
        is_text = self.codes == TEXT
        is_chat = self.n_turns > 0
        is_chat[self.owners[is_text]] = False
        said, roles, texts = _strings(self.turns), self.codes, pa.nulls(n_rows, pa.string())
        if is_text.any():
            places = np.cumsum(self.n_turns) - 1  # of a text in the turns
            texts = said.take(pa.array(places, mask=is_chat | (self.n_turns == 0)))
            said, roles = said.filter(pa.array(~is_text)), roles[~is_text]
        absent = [pa.nulls(len(roles), pa.string())] * len(OPTIONAL_FIELDS)
        turns = pa.StructArray.from_arrays([_ROLE_STRINGS.take(_numbers(roles)), said, *absent], fields=list(MESSAGE))
        edges = np.append(0, np.cumsum(np.where(is_chat, self.n_turns, 0))).astype(np.int32)
        messages = pa.Array.from_buffers(
            pa.list_(MESSAGE), n_rows, [_bits(is_chat), pa.py_buffer(edges)], children=[turns]
        )
        whole = np.empty(n_rows, WHOLE)
        whole["hash"], whole["check"] = self._hashes, self._checks
        digests = pa.Array.from_buffers(pa.binary(WHOLE.itemsize), n_rows, [None, pa.py_buffer(whole.tobytes())])
        parts = self._columns.sources
        names = _strings(Turns.join([name.encode() for name, _, _ in parts]))
        names = names.take(_numbers(np.repeat(np.arange(len(parts)), [n for _, _, n in parts])))
        numbers = _numbers(np.concatenate([np.arange(first, first + n) for _, first, n in parts]))
        return pa.Table.from_arrays(
            [names, numbers, self._reasons(), digests, messages, texts, pa.nulls(n_rows, pa.string())], schema=STAGED
        )

    def _reasons(self) -> pa.Array:
        reasons = self._columns.reasons
        texts = [reasons.get(row, "").encode() for row in range(len(self.n_turns))] if reasons else []
        return _strings(Turns.join(texts), self.n_turns == 0) if reasons else pa.nulls(len(self.n_turns), pa.string())


# Not pa.array(), which imports pandas: a quarter of a second in every process.


def _bits(mask: npt.NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(mask, bitorder="little"))


def _numbers(values: npt.NDArray[Any]) -> pa.Array:
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _strings(turns: Turns, valid: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Texts that stand one after the other; null where they are not `valid`."""
    edges = pa.py_buffer(np.append(0, turns.stops).astype(np.int32))
    nulls = None if valid is None else _bits(valid)
    return pa.Array.from_buffers(pa.string(), len(turns.stops), [nulls, edges, pa.py_buffer(turns.data)])


_ROLE_STRINGS = _strings(Turns.join([name.encode() for name in ROLE_NAMES]))
