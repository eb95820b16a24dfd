"""Whose turn each stretch of a rendered dialogue belongs to.

Texts of a message belong to it. Text of the template's own belongs to the message at which the template wrote it; but
for what stands before the message's header, which closes the turn before, and for what stands outside the template's
loop. The header of each role is learnt from short dialogues.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, cast

from fastcache.errors import InputError, ModelError
from fastcache.llm.dialogue import CALLS, Source
from fastcache.llm.provenance import Tracked, owner_of, plain, runs_of
from fastcache.llm.template import ChatTemplate, Written, probe

NOBODY = None
"""The turn of what the template writes before the first one."""

HEADERS_SEEN: dict[str, list[tuple[tuple[str, ...], int]]] = {
    "system": [(("system", "user"), 0)],
    "developer": [(("developer", "user"), 0)],
    "user": [(("user",), 0), (("user", "assistant", "user"), 2), (("user", "assistant", "user", "assistant"), 2)],
    "assistant": [
        (("user", "assistant"), 1),
        (("user", "assistant", "user"), 1),
        (("user", "assistant", "user", "assistant"), 3),
    ],
    "tool": [(("user", "assistant", "tool"), 2), (("user", "assistant", "tool", "assistant"), 2)],
}
"""Where the header of each role is looked for: dialogues, and the number of the turn."""


class Piece(NamedTuple):
    """A stretch of a rendered dialogue."""

    start: int
    stop: int
    turn: int | None
    """The message it belongs to, or `NOBODY`."""
    field: str
    """What of the message it is (`dialogue.Source`); empty for text of the template's own."""


class TurnFinder:
    """Finds the turns in what one template writes."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self.header = lru_cache(None)(self._learn_header)
        self.closing = lru_cache(None)(self._learn_closing)
        self._ending = lru_cache(None)(self._learn_ending)

    def pieces(self, written: Written) -> list[Piece]:
        """The text in pieces, each of one turn, in order."""
        return self._assigned(written.text, written.dialogue.sources, written.dialogue.roles)

    def _assigned(self, text: Tracked, sources: Sequence[Source], roles: Sequence[str]) -> list[Piece]:
        pieces = _pieces_of(text, sources)
        assigned: list[Piece] = []
        begun: set[int] = set()
        last: int | None = NOBODY
        position = 0
        while position < len(pieces):
            here = next((i for i in range(position, len(pieces)) if pieces[i].turn is not None), None)
            if here is None:  # nothing but the end
                assigned += [piece._replace(turn=last) for piece in pieces[position:]]
                break
            turn = cast(int, pieces[here].turn)
            stop = here
            if turn not in begun:
                while stop < len(pieces) and pieces[stop].turn == turn and not pieces[stop].field:
                    stop += 1
                before = roles[last] if last is not None else None
                split = self._split(text, pieces[position:here], pieces[here:stop], roles[turn], before)
                assigned += _divided(pieces[position:stop], split, last, turn)
            else:
                assigned += [piece._replace(turn=last) for piece in pieces[position:here]]
            if stop == here:
                assigned.append(pieces[here])
                stop += 1
            begun.add(turn)
            last, position = turn, stop
        return assigned

    def _split(
        self, text: Tracked, unowned: Sequence[Piece], owned: Sequence[Piece], role: str, before: str | None
    ) -> int:
        """Where a turn of `role` begins, in what stands before its first text; `before` is the role of the turn before."""
        header = self.header(role)
        for stretch in (owned, unowned):
            if not stretch or not header:
                continue
            start = stretch[0].start
            own = "".join(
                "\0" * (piece.stop - piece.start) if piece.field else plain(text[piece.start : piece.stop])
                for piece in stretch
            )
            if (place := own.rfind(header)) >= 0:
                return start + place
        if owned:
            start, stop = owned[0].start, owned[-1].stop
            ending = self._ending(before) if before and header else ""
            return start + len(ending) if ending and text[start:stop].startswith(ending) else start
        if unowned and before is None and header and role not in ("system", "developer"):
            return unowned[-1].stop
        return unowned[0].start if unowned else 0

    def _learn_header(self, role: str) -> str:
        """What opens a turn of `role`: the shortest text that is written before its first text; empty for none."""
        headers: list[str] = []
        for roles, turn in HEADERS_SEEN[role]:
            if (seen := self._seen(roles)) is None:
                continue
            text, sources = seen
            pieces = _pieces_of(text, sources)
            first = next((i for i, piece in enumerate(pieces) if piece.turn == turn), None)
            if first is None:
                continue
            stop = first
            while stop < len(pieces) and pieces[stop].turn == turn and not pieces[stop].field:
                stop += 1
            start = first
            if start == stop and (turn or role in ("system", "developer")):  # nothing was written in a loop
                while start and pieces[start - 1].turn is None:
                    start -= 1
            if start < stop:
                headers.append(plain(text[pieces[start].start : pieces[stop - 1].stop]))
        return min((header for header in headers if header), key=len, default="")

    def _learn_closing(self, role: str) -> str:
        """What closes a turn of `role` before another one."""
        seen = self._seen(("user", "assistant", "user", "assistant"))
        turn = {"user": 2, "assistant": 1}.get(role)
        if seen is None or turn is None:
            return ""
        pieces = self._assigned(*seen, ("user", "assistant", "user", "assistant"))
        text = "".join(
            "\0" if piece.field else plain(seen[0][piece.start : piece.stop]) for piece in pieces if piece.turn == turn
        )
        return text.rpartition("\0")[2]

    def _learn_ending(self, role: str) -> str:
        """What is written at the very end of a dialogue, behind the template's loop, where a turn of `role` is the last."""
        roles = {
            "system": ("system",),
            "developer": ("developer",),
            "user": ("user",),
            "assistant": ("user", "assistant"),
        }
        if (seen := self._seen(roles.get(role, ("user", "assistant", "tool")))) is None:
            return ""
        text, sources = seen
        pieces = _pieces_of(text, sources)
        stop = len(pieces)
        while stop and pieces[stop - 1].turn is None:
            stop -= 1
        return plain(text[pieces[stop].start :]) if stop < len(pieces) else ""

    def _seen(self, roles: tuple[str, ...]) -> tuple[Tracked, Sequence[Source]] | None:
        """What the template writes for a short dialogue; None if it refuses that, or changes it."""
        try:
            written = self._template.apply(probe(*roles))
        except (InputError, ModelError):
            return None
        return None if written.changes else (written.text, written.dialogue.sources)


def _pieces_of(text: Tracked, sources: Sequence[Source]) -> list[Piece]:
    """The runs of a text, with the turn of each as far as its code says it."""
    pieces: list[Piece] = []
    position = 0
    for length, code in runs_of(text):
        turn, field = (sources[code].turn, sources[code].field) if code >= 0 else (owner_of(code), "")
        pieces.append(Piece(position, position + length, turn, field))
        position += length
    for i in range(1, len(pieces) - 1):
        if (
            pieces[i].field == CALLS
            and not pieces[i - 1].field
            and pieces[i - 1].turn == pieces[i + 1].turn is not None
        ):
            pieces[i] = pieces[i]._replace(turn=pieces[i - 1].turn)  # a tool's turn begins with the name of the tool
    return pieces


def _divided(pieces: Sequence[Piece], split: int, before: int | None, turn: int) -> list[Piece]:
    """The pieces, those up to `split` of the turn `before` and those from there on of `turn`."""
    divided: list[Piece] = []
    for piece in pieces:
        if piece.start < split < piece.stop:
            divided += [piece._replace(stop=split, turn=before), piece._replace(start=split, turn=turn)]
        else:
            divided.append(piece._replace(turn=before if piece.stop <= split else turn))
    return divided
