"""A quicker way for plain dialogues: what a template writes around contents is mostly the same for the same roles.

The first dialogue of a sequence of roles is traced (`template`). The next one is rendered once, by transformers, and if the
result is the same template text around its own contents, it needs no trace.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from fastcache.llm.dialogue import CONTENT, split_reasoning
from fastcache.llm.turns import Piece

MAX_LAYOUTS = 1024
"""Layouts kept, one for each sequence of roles; the least recently used goes."""

Segment = tuple[int | None, str, str]
"""A piece without its place: turn, field, and the text if it is the template's."""


def _readings(content: str) -> list[str]:
    """What a template may leave of a content, those that keep more first."""
    if not content or not (content[0].isspace() or content[-1].isspace()):
        return [content]
    newlines = [content.rstrip("\n"), content.lstrip("\n"), content.strip("\n")]
    return [content, *newlines, content.rstrip(), content.lstrip(), content.strip()]


def plain_contents(messages: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The contents of a dialogue that has nothing else, and no reasoning."""
    contents: list[str] = []
    for message in messages:
        content = message.get("content")
        has_more = any(value is not None for key, value in message.items() if key not in ("role", "content"))
        if has_more or not isinstance(content, str):
            return None
        if message.get("role") == "assistant" and split_reasoning(content) != [(content, CONTENT)]:
            return None
        contents.append(content)
    return contents


class Layouts:
    """The layouts of one template, by the roles of a dialogue."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, ...], list[Segment]] = OrderedDict()

    def __contains__(self, roles: tuple[str, ...]) -> bool:
        return roles in self._kept

    def keep(self, roles: tuple[str, ...], contents: Sequence[str], text: str, pieces: Sequence[Piece]) -> None:
        """Learn from a traced dialogue, if each of its contents is one piece."""
        segments: list[Segment] = []
        for start, stop, turn, field in pieces:
            if field and (field != CONTENT or turn is None or text[start:stop] not in _readings(contents[turn])):
                return
            segments.append((turn, field, "" if field else text[start:stop]))
        if sorted(turn for turn, field, _ in segments if field and turn is not None) == [*range(len(contents))]:
            self._kept[roles] = segments
            if len(self._kept) > MAX_LAYOUTS:
                self._kept.popitem(last=False)

    def pieces(self, roles: tuple[str, ...], contents: Sequence[str], text: str) -> list[Piece] | None:
        """The pieces of a rendered dialogue; None if it isn't the layout of its roles filled with its contents."""
        self._kept.move_to_end(roles)
        pieces: list[Piece] = []
        position = 0
        for turn, field, template_text in self._kept[roles]:
            readings = _readings(contents[turn]) if field and turn is not None else [template_text]
            segment = next((reading for reading in readings if text.startswith(reading, position)), None)
            if segment is None:
                return None
            if segment:
                pieces.append(Piece(position, position + len(segment), turn, field))
            position += len(segment)
        return pieces if position == len(text) else None
