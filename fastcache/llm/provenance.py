"""Text that knows where each of its characters comes from.

A chat template cuts, strips, joins and escapes what a dialogue says. `Tracked` is a `str` that goes through all of
that and still says of every character whether a message or the template wrote it. Equality, hashes and everything
that only reads a text are those of `str`, so a template can't tell the difference.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any, SupportsIndex

UNOWNED = -1
"""Code of text that a template wrote outside every message."""

MAX_COMPARED = 4_000_000
"""Largest product of two lengths that are compared character by character."""

Runs = tuple[tuple[int, int], ...]
"""Pairs of a length and a code. Codes of 0 and above number the texts of a dialogue; those below 0 are the template's."""


def owner_code(turn: int | None) -> int:
    """Code of text that the template wrote while it was at message `turn`; None: at no message."""
    return UNOWNED if turn is None else -2 - turn


def owner_of(code: int) -> int | None:
    """The message at which the template wrote text of this code."""
    return None if code >= UNOWNED else -2 - code


class Tracked(str):
    """A text with a code for each of its characters, kept as runs of equal codes."""

    __slots__ = ("_runs",)
    _runs: Runs

    def __new__(cls, text: str = "", runs: Runs | None = None) -> "Tracked":
        self = str.__new__(cls, text)
        self._runs = ((len(text), UNOWNED),) if runs is None and text else runs or ()
        return self

    def __str__(self) -> str:
        return self  # `str(text)` in a template's compiled code must not lose the codes

    def __iter__(self) -> Iterator["Tracked"]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: SupportsIndex | slice) -> "Tracked":
        if not isinstance(key, slice):
            index = range(len(self))[key]
            return self._cut(index, index + 1)
        start, stop, step = key.indices(len(self))
        if step == 1:
            return self._cut(start, max(start, stop))
        codes = [code for length, code in self._runs for _ in range(length)][key]
        return Tracked(str.__getitem__(self, key), _runs_of(codes))

    def _cut(self, start: int, stop: int) -> "Tracked":
        if start == 0 and stop == len(self):
            return self
        return Tracked(str.__getitem__(self, slice(start, stop)), _cut_runs(self._runs, start, stop))

    def __add__(self, other: str) -> "Tracked":
        return joined((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> "Tracked":
        return joined((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> "Tracked":
        return Tracked(str.__mul__(self, count), self._runs * max(0, int(count)))

    __rmul__ = __mul__

    def lstrip(self, chars: str | None = None, /) -> "Tracked":
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> "Tracked":
        return self._cut(0, len(str.rstrip(self, chars)))

    def strip(self, chars: str | None = None, /) -> "Tracked":
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str, /) -> "Tracked":
        return self._cut(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> "Tracked":
        return self._cut(0, len(str.removesuffix(self, suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines = self._located(str.splitlines(self, keepends=True))
        if keepends:
            return lines
        bare = str.splitlines(self)
        return [line[: len(text)] for line, text in zip(lines, bare, strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, tail = self._located(str.partition(self, sep))
        return head, middle, tail

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        head, middle, tail = self._located(str.rpartition(self, sep))
        return head, middle, tail

    def _located(self, pieces: Sequence[str], gap: int = 0) -> list[str]:
        """The pieces, which stand in this text in this order with `gap` characters between them, with their codes.

        With a gap of 0, there may be blanks between pieces that begin with none.
        """
        located: list[str] = []
        position = 0
        for piece in pieces:
            start = str.index(self, piece, position) if piece else position
            located.append(self._cut(start, start + len(piece)))
            position = start + len(piece) + gap
        return located

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> "Tracked":
        """What takes the place of a text has the code of the text, unless it has codes of its own."""
        if not old:
            return realigned(str.replace(self, old, new, count), [self])
        parts: list[str] = []
        position, left = 0, int(count)
        while left and (start := str.find(self, old, position)) >= 0:
            parts.append(self._cut(position, start))
            code = self._cut(start, start + 1)._runs[0][1]
            parts.append(new if isinstance(new, Tracked) else Tracked(new, ((len(new), code),) if new else ()))
            position, left = start + len(old), left - 1
        return joined([*parts, self._cut(position, len(self))])

    def _recased(self, text: str) -> "Tracked":
        return Tracked(text, self._runs) if len(text) == len(self) else realigned(text, [self])

    def lower(self) -> "Tracked":
        return self._recased(str.lower(self))

    def upper(self) -> "Tracked":
        return self._recased(str.upper(self))

    def title(self) -> "Tracked":
        return self._recased(str.title(self))

    def capitalize(self) -> "Tracked":
        return self._recased(str.capitalize(self))

    def join(self, parts: Iterable[str], /) -> "Tracked":
        return joined(parts, self)


class TrackedDict(dict[Any, Any]):
    """A JSON object of a dialogue; its keys and values are tracked."""

    _code = UNOWNED


class TrackedList(list[Any]):
    """A JSON array of a dialogue."""

    _code = UNOWNED


class TrackedInt(int):
    """A number of a dialogue."""

    _code = UNOWNED


class TrackedFloat(float):
    """A number of a dialogue."""

    _code = UNOWNED


def tracked(value: Any, code: int) -> Any:
    """JSON data, all of whose texts and numbers have this code."""
    if isinstance(value, str):
        return Tracked(value, ((len(value), code),) if value else ())
    made: Any
    if isinstance(value, Mapping):
        made = TrackedDict({tracked(key, code): tracked(item, code) for key, item in value.items()})
    elif isinstance(value, list | tuple):
        made = TrackedList(tracked(item, code) for item in value)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        return value
    else:
        made = TrackedInt(value) if isinstance(value, int) else TrackedFloat(value)
    made._code = code
    return made


def plain(text: str) -> str:
    """The text without its codes."""
    return str.__str__(text)


def runs_of(text: str, code: int = UNOWNED) -> Runs:
    """The codes of a text; `code` is that of a text that has none."""
    if isinstance(text, Tracked):
        return text._runs
    return ((len(text), code),) if text else ()


def recoded(text: str, code: int) -> Tracked:
    """The text with `code` in place of `UNOWNED`."""
    runs = tuple((length, code if old == UNOWNED else old) for length, old in runs_of(text))
    return Tracked(plain(text), runs)


def joined(parts: Iterable[str], separator: str = "", code: int = UNOWNED) -> Tracked:
    """`separator.join(parts)`; `code` is that of texts without codes."""
    parts = list(parts)
    runs: list[tuple[int, int]] = []
    for number, part in enumerate(parts):
        if number and separator:
            runs += runs_of(separator, code)
        runs += part._runs if isinstance(part, Tracked) else ((len(part), code),)
    return Tracked(str.join(plain(separator), parts), _merged(runs))


def leaves(value: Any) -> list[Tracked]:
    """The tracked texts in a value, its keys included, in order."""
    found: list[Tracked] = []
    open_values = [value]
    while open_values:
        value = open_values.pop()
        if isinstance(value, Tracked):
            found.append(value)
        elif isinstance(value, Mapping):
            open_values += reversed([part for pair in value.items() for part in pair])
        elif isinstance(value, list | tuple):
            open_values += reversed(value)
    return found


def code_of(value: Any) -> int:
    """The code of JSON data; `UNOWNED` for data of the template's own."""
    if isinstance(value, TrackedDict | TrackedList | TrackedInt | TrackedFloat):
        return value._code
    codes = (code for text in leaves(value) for _, code in text._runs)
    return next((code for code in codes if code != UNOWNED), UNOWNED)


def to_json(value: Any, **options: Any) -> Tracked:
    """`json.dumps`. All of an object's or array's JSON has the code of the data; characters of a text keep theirs."""
    text = json.dumps(value, **options)
    if not isinstance(value, Tracked) or len(value._runs) < 2:
        code = value._runs[0][1] if isinstance(value, Tracked) and value._runs else code_of(value)
        return Tracked(text, ((len(text), code),) if text else ())
    runs, position = [], 0
    for length, code in value._runs:
        escaped = json.dumps(plain(value[position : position + length]), **options)
        runs.append((len(escaped) - 2, code))
        position += length
    runs = [(1, runs[0][1]), *runs, (1, runs[-1][1])]  # the quotation marks
    return Tracked(text, _merged(runs)) if sum(length for length, _ in runs) == len(text) else realigned(text, [value])


def realigned(text: str, sources: Iterable[Tracked]) -> Tracked:
    """A text that something unknown made of `sources`, with their codes where they are recognised in it."""
    codes = [UNOWNED] * len(text)
    position = 0
    missed: list[Tracked] = []
    for source in sources:
        start = text.find(source, position) if source else -1
        if start < 0:
            missed.append(source)
            continue
        codes[start : start + len(source)] = [code for length, code in source._runs for _ in range(length)]
        position = start + len(source)
    for source in missed:
        if len(source) * len(text) > MAX_COMPARED:
            continue
        source_codes = [code for length, code in source._runs for _ in range(length)]
        matcher = SequenceMatcher(None, plain(source), plain(text), autojunk=False)
        for start, target, size in matcher.get_matching_blocks():
            for offset in range(size):
                if codes[target + offset] == UNOWNED:
                    codes[target + offset] = source_codes[start + offset]
    return Tracked(plain(text), _runs_of(codes))


def _runs_of(codes: Iterable[int]) -> Runs:
    return tuple((sum(1 for _ in group), code) for code, group in groupby(codes))


def _merged(runs: Iterable[tuple[int, int]]) -> Runs:
    merged: list[tuple[int, int]] = []
    for length, code in runs:
        if not length:
            continue
        if merged and merged[-1][1] == code:
            merged[-1] = merged[-1][0] + length, code
        else:
            merged.append((length, code))
    return tuple(merged)


def _cut_runs(runs: Runs, start: int, stop: int) -> Runs:
    cut: list[tuple[int, int]] = []
    position = 0
    for length, code in runs:
        first, last = max(start, position), min(stop, position + length)
        if first < last:
            cut.append((last - first, code))
        position += length
        if position >= stop:
            break
    return tuple(cut)
