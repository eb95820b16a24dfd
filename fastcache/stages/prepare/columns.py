"""The rows of a chunk, cleaned, as columns: straight from the raw rows to the arrays that are hashed and written.

`schema.usable` says what becomes of a row. Most rows are plain dialogues, though, in which nothing is to be found: these are
taken over by a tight loop that gives every other row to `usable`.

A row is a run of *pieces*, texts with a code each: the content of a turn, after it the other fields of the turn, at the end
the row's tools; or one plain text.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fastcache.corpus import MESSAGE, OPTIONAL_FIELDS
from fastcache.errors import InputError
from fastcache.stages.prepare.blocks import Block, Malformed, Row
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.field_sets import FieldSets
from fastcache.stages.prepare.fields import Unusable
from fastcache.stages.prepare.kernels import U32, Bytes, Numbers, whole_hashes
from fastcache.stages.prepare.ngrams import Grams, Turns
from fastcache.stages.prepare.schema import usable
from fastcache.stages.prepare.spellings import CHAT_COLUMNS, COMPANIONS, ROLES, TURN_FIELDS, is_present, plain_name

ROLE_NAMES = tuple(dict.fromkeys(ROLES.values()))
SYSTEM = ROLE_NAMES.index("system")
NO_CONTENT, FIRST_FIELD, TEXT = 8, 16, 255
"""Codes of pieces. A turn's is the place of its role in ROLE_NAMES, with NO_CONTENT added where its content is null; that of
another field of a turn is its place in OPTIONAL_FIELDS from FIRST_FIELD on; TOOLS are a row's, TEXT is a plain text."""

TOOLS = FIRST_FIELD + len(OPTIONAL_FIELDS)
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
        ("fields", pa.dictionary(pa.int32(), pa.string())),
    ]
)
"""`fields` is JSON text of two lists: names of the row's fields beside the dialogue that are kept, and that are not."""

MAX_BYTES = 2**31 - 1
"""Text that an Arrow array of strings holds."""


@lru_cache(maxsize=4096)
def _names_beside(names: tuple[str, ...], used: tuple[str, ...], of_turn: bool) -> tuple[tuple[str, bool], ...]:
    """The names beside those `used`, and for each whether a dialogue may be made of it."""
    known = TURN_FIELDS if of_turn else COMPANIONS
    return tuple((name, plain_name(name) in known) for name in names if name not in used)


def _others(values: Mapping[str, Any], used: tuple[str, ...], of_turn: bool) -> list[str] | None:
    """The names beside those `used` whose fields hold something, or None if a dialogue may be made of one of them."""
    others = []
    for name, is_known in _names_beside(tuple(values), used, of_turn):
        if is_present(values[name]):
            if is_known:
                return None
            others.append(name)
    return others


class Columns:
    """Grows row by row: each row's number of pieces, each piece's code and UTF-8 text, and reasons for unusable rows."""

    def __init__(self) -> None:
        self.n_pieces: list[int] = []
        self.codes = bytearray()
        self.data = bytearray()
        self.stops: list[int] = []
        self.fields: list[int] = []
        """The number in `field_sets` of each row."""
        self.field_sets = FieldSets()
        self.reasons: dict[int, str] = {}
        self.sources: list[tuple[str, int, int]] = []
        """Source, number there of the first row, number of rows."""
        self.first_places: dict[str, dict[str, str]] = {}
        """The place of the first unusable row, by source and reason."""
        self.files: dict[str, tuple[int, int, str]] = {}
        """For each file: its rows, those that could not be parsed as rows, and the place of the first of these."""

    def add(
        self,
        rows: Iterable[Row | Malformed],
        source: str,
        first_row: int,
        column: str | None,
        config: PrepareConfig,
        block: Block | None = None,
    ) -> None:
        """Add rows of a source, from `block`; raises `InputError` for an unusable one if that is asked for."""
        names = (column,) if column else CHAT_COLUMNS
        plain = not (config.alternating or config.max_turn_chars)
        n_before = len(self.n_pieces)
        malformed: list[str] = []
        for row in rows:
            number = len(self.n_pieces)
            n_pieces = self._take(row, names) if plain else 0
            if not n_pieces:
                try:
                    n_pieces = self._clean(row, column, config)
                except Unusable as verdict:
                    place = f"{source}, row {first_row + number - n_before}"
                    if isinstance(row, Malformed):
                        place = row.place
                        malformed.append(place)
                    if config.strict:
                        raise InputError(f"{place}: {verdict} (--strict). Nothing was written.") from None
                    places = self.first_places.setdefault(source, {})
                    if str(verdict) not in places:
                        places[str(verdict)] = (block and block.place(number - n_before)) or place
                    self.reasons[number] = str(verdict)
                    self.fields.append(0)
            self.n_pieces.append(n_pieces)
        n_rows = len(self.n_pieces) - n_before
        self.sources.append((source, first_row, n_rows))
        path = block.path if block else ""
        of_file = self.files.get(path, (0, 0, ""))
        first = of_file[2] or (malformed[0] if malformed else "")
        self.files[path] = (of_file[0] + n_rows, of_file[1] + len(malformed), first)
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
            not_kept = _others(row, (name,), False) if len(row) > 1 else []  # type: ignore[arg-type]
            for turn in turns if not_kept is not None else ():  # type: ignore[union-attr]
                used = ("role", "content") if "role" in turn else ("from", "value")
                code, text = _CODES[turn[used[0]]], turn[used[1]]
                if text.isspace() or not text:
                    break
                if len(turn) > 2:
                    others = _others(turn, used, True)
                    if others is None:
                        break
                    not_kept += [f"{name}[].{other}" for other in others]  # type: ignore[operator]
                data += text.encode()
                stops.append(len(data))
                codes.append(code)
            else:
                if code != SYSTEM:  # so that not all turns are the system's
                    self.fields.append(self.field_sets.number((), not_kept) if not_kept else 0)
                    return len(stops) - n_before
        except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
            pass
        del data[n_bytes:], stops[n_before:], codes[n_before:]
        return 0

    def _clean(self, row: Row | Malformed, column: str | None, config: PrepareConfig) -> int:
        """Add any usable row and return its number of pieces; raises `Unusable`."""
        if isinstance(row, Malformed):
            raise Unusable(row.reason)
        found = usable(row, column, config.alternating, config.max_turn_chars)
        pieces = [(TEXT, found["text"])] if found["messages"] is None else []
        for message in found["messages"] or ():
            content = message.get("content")
            pieces.append((_CODES[message["role"]] | (NO_CONTENT if content is None else 0), content or ""))
            pieces += [
                (code, message[name]) for code, name in enumerate(OPTIONAL_FIELDS, FIRST_FIELD) if name in message
            ]
        if found["tools"] is not None:
            pieces.append((TOOLS, found["tools"]))
        for code, text in pieces:
            self.data += text.encode()
            self.stops.append(len(self.data))
            self.codes.append(code)
        self.fields.append(self.field_sets.number(found["kept"], found["not_kept"]))
        return len(pieces)


class CleanRows:
    """The rows of a chunk as arrays: `pieces` with their `codes` `[p]`, and `n_pieces` `[r]` of each row, 0 if unusable."""

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self.pieces = pieces = Turns.of(columns.data, columns.stops)
        self.codes: Bytes = np.frombuffer(columns.codes, np.uint8)
        self.n_pieces: Numbers = np.array(columns.n_pieces, np.int64)
        self.owners: U32 = np.repeat(np.arange(len(self.n_pieces), dtype=np.uint32), self.n_pieces)
        """The row `[p]` of each piece."""
        self._hashes = np.empty(len(self.n_pieces), np.uint64)
        self._checks = np.empty(len(self.n_pieces), np.uint32)
        whole_hashes(*pieces, self.codes, self.n_pieces, self._hashes, self._checks)

    @property
    def is_turn(self) -> npt.NDArray[np.bool_]:
        """Which pieces `[p]` are contents of turns."""
        return self.codes < FIRST_FIELD

    @property
    def whole(self) -> Grams:
        """Every usable row as one n-gram: all its pieces, with their codes."""
        usable = np.flatnonzero(self.n_pieces)
        return Grams(self._hashes[usable], self._checks[usable], usable.astype(np.uint32))

    def table(self) -> pa.Table:
        """As `STAGED`, every row of the input."""
        n_rows = len(self.n_pieces)
        whole = np.empty(n_rows, WHOLE)
        whole["hash"], whole["check"] = self._hashes, self._checks
        digests = pa.Array.from_buffers(pa.binary(WHOLE.itemsize), n_rows, [None, pa.py_buffer(whole.tobytes())])
        parts = self._columns.sources
        names = _strings(Turns.join([name.encode() for name, _, _ in parts]))
        names = names.take(_numbers(np.repeat(np.arange(len(parts)), [n for _, _, n in parts])))
        numbers = _numbers(np.concatenate([np.arange(first, first + n) for _, first, n in parts]))
        sets = _strings(Turns.join([text.encode() for text in self._columns.field_sets.texts]))
        fields = pa.DictionaryArray.from_arrays(_numbers(np.array(self._columns.fields, np.int32)), sets)
        columns = [names, numbers, self._reasons(), digests, *self._dialogues(), fields]
        return pa.Table.from_arrays(columns, schema=STAGED)

    def _dialogues(self) -> tuple[pa.Array, pa.Array, pa.Array]:
        """Messages, text and tools of every row."""
        n_rows = len(self.n_pieces)
        said, is_turn = _strings(self.pieces), self.is_turn
        turns, roles = np.flatnonzero(is_turn), self.codes[is_turn]
        turn_of_piece = np.cumsum(is_turn) - 1

        def spread(code: int, n: int, owners: npt.NDArray[Any]) -> pa.Array:
            """The pieces with this code as a column of `n`, of which `owners` `[p]` says to which each belongs."""
            mine = np.flatnonzero(self.codes == code)
            if not len(mine):
                return pa.nulls(n, pa.string())
            places = np.full(n, -1, np.int64)
            places[owners[mine]] = mine
            return said.take(_numbers(places, places >= 0))

        contents = said if len(turns) == len(is_turn) else said.take(_numbers(turns))
        if (empty := roles >= NO_CONTENT).any():
            contents = said.take(_numbers(turns, ~empty))
        optional = [spread(FIRST_FIELD + i, len(turns), turn_of_piece) for i in range(len(OPTIONAL_FIELDS))]
        role_names = _ROLE_STRINGS.take(_numbers(roles % NO_CONTENT))
        structs = pa.StructArray.from_arrays([role_names, contents, *optional], fields=list(MESSAGE))
        n_turns = np.bincount(self.owners[is_turn], minlength=n_rows)
        edges = np.append(0, np.cumsum(n_turns)).astype(np.int32)
        validity = _bits(n_turns > 0)
        messages = pa.Array.from_buffers(pa.list_(MESSAGE), n_rows, [validity, pa.py_buffer(edges)], children=[structs])
        return messages, spread(TEXT, n_rows, self.owners), spread(TOOLS, n_rows, self.owners)

    def _reasons(self) -> pa.Array:
        reasons = self._columns.reasons
        texts = [reasons.get(row, "").encode() for row in range(len(self.n_pieces))] if reasons else []
        none = pa.nulls(len(self.n_pieces), pa.string())
        return _strings(Turns.join(texts), self.n_pieces == 0) if reasons else none


# Not pa.array(), which imports pandas: a quarter of a second in every process.


def _bits(mask: npt.NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(mask, bitorder="little"))


def _numbers(values: npt.NDArray[Any], valid: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Numbers; null where they are not `valid`."""
    nulls = None if valid is None else _bits(valid)
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [nulls, pa.py_buffer(values)])


def _strings(turns: Turns, valid: npt.NDArray[np.bool_] | None = None) -> pa.Array:
    """Texts that stand one after the other; null where they are not `valid`."""
    edges = pa.py_buffer(np.append(0, turns.stops).astype(np.int32))
    nulls = None if valid is None else _bits(valid)
    return pa.Array.from_buffers(pa.string(), len(turns.stops), [nulls, edges, pa.py_buffer(turns.data)])


_ROLE_STRINGS = _strings(Turns.join([name.encode() for name in ROLE_NAMES]))
