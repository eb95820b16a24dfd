"""What a chat template writes around the contents of a dialogue, learnt from the template itself.

A dialogue is rendered once with its contents replaced by probes. What stands around the probes is the template's text,
and the probes tell what it does to contents (Llama strips them, and writes a tool's answer as JSON). This *layout*
depends on the roles alone and is kept; a dialogue then needs one rendering, which must equal its layout filled with its
contents. Nothing here knows any model's name.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from fastcache.cache_format.schema import TurnRole
from fastcache.errors import InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {"system": TurnRole.SYSTEM, "user": TurnRole.USER, "assistant": TurnRole.ASSISTANT, "tool": TurnRole.TOOL}

FIXED_DATE = "26 Jul 2024"
"""Templates that print today's date get this one, so that rendering is the same every day."""

MAX_LAYOUTS = 1024
"""Layouts kept, one for each sequence of roles; the least recently used goes."""

_DAY = datetime(2024, 7, 26)
_DATE_PARTS = {f"%{letter}": _DAY.strftime(f"%{letter}") for letter in "aAbBdHIjmMpSyY"} | {"%-d": "26", "%-m": "7"}
_DATE_MACRO = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f".replace('{part}', '{value}')" for part, value in _DATE_PARTS.items())
    # The plus keeps a newline that the template may begin with.
    + " }}{% endmacro +%}"
)
"""Put before a template, it hides the function of this name that transformers gives to templates."""

# The em space tells stripping of blanks from stripping of newlines; three newlines, as a header may well end in two.
_PROBE = "\n\n\n\u2003\ue000{}\ue001\u2003\n\n\n"

_WAYS_TO_WRITE: tuple[Callable[[str], str], ...] = (
    lambda content: json.dumps(content, ensure_ascii=False),
    lambda content: content,
    lambda content: content.rstrip("\n"),
    lambda content: content.lstrip("\n"),
    lambda content: content.strip("\n"),
    str.rstrip,
    str.lstrip,
    str.strip,
)
"""What templates make of contents; ways that keep more stand first, as the others leave a part of the same text."""


class SpecialToken(NamedTuple):
    """A special token and where it stands in a text."""

    token_id: int
    start: int
    stop: int


class Span(NamedTuple):
    """A stretch of the rendered text."""

    length: int
    role: TurnRole
    is_content: bool = False
    is_header: bool = False


@dataclass(frozen=True)
class Layout:
    """What the template writes for a sequence of roles: template text and contents in turn, `n_spans` of them."""

    pieces: tuple[str, ...]
    """Template text before, between and after the contents."""
    left_out: str
    """A default system turn that the template writes at the end of `kept` and that the renderer leaves out."""
    kept: str
    """The part of the first piece before `left_out`."""
    turns: tuple[int, ...]
    """Message of each content, as the template orders them."""
    ways: tuple[Callable[[str], str], ...]
    """What the template makes of each content."""
    spans: tuple[Span, ...]
    """Contents have length 0 here."""
    specials: tuple[tuple[int, SpecialToken], ...]
    """Special tokens of the template's text: the span each begins in, and its place in that span."""


class ChatTemplate:
    """A tokenizer's chat template, taken apart.

    With `default_system` false, a whole turn that the template writes of its own accord before the first turn of a
    dialogue without system message is left out; begin-of-sequence stays, and so does all that the template writes
    into or around a system message of the dialogue's own.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        find_specials: Callable[[str], list[SpecialToken]],
        token_stops: Callable[[str], list[int]],
        default_system: bool,
    ) -> None:
        self._tokenizer = tokenizer
        try:
            self._source = _DATE_MACRO + tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(f"The tokenizer has no chat template that can be used: {error}") from error
        self._find_specials = find_specials
        self._token_stops = token_stops
        self._default_system = default_system
        self._closings: dict[tuple[str, str, str], int] = {}
        self.layout = lru_cache(MAX_LAYOUTS)(self._learn)
        self._boundary = lru_cache(len(ROLES))(self._find_boundary)

    def apply(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        """The dialogue as the template writes it, on the fixed date.

        Raises `InputError` if the template refuses it, `ModelError` if the template is no valid one.
        """
        import jinja2

        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return str(self._tokenizer.apply_chat_template(messages, chat_template=self._source, tokenize=False))
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"The model's chat template is no valid Jinja: {error}") from error
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise InputError(f"The model's chat template refuses this dialogue: {error}") from error

    def _probe(self, roles: tuple[str, ...]) -> tuple[list[str], list[int], list[Callable[[str], str]]]:
        """Template texts around the contents, the turns in the order they are written, what becomes of each."""
        probes = [_PROBE.format(turn) for turn in range(len(roles))]
        text = self.apply(roles, probes)
        found: list[tuple[int, int, Callable[[str], str]]] = []
        for turn, probe in enumerate(probes):
            ways = [way for way in _WAYS_TO_WRITE if way(probe) in text]
            if not ways or text.count(probe.strip()) != 1:
                how = "leaves out or changes" if not ways else "repeats"
                raise InputError(f"The chat template {how} the content of turn {turn} ({roles[turn]}).")
            found.append((text.index(ways[0](probe)), turn, ways[0]))
        found.sort(key=lambda entry: entry[0])  # some templates write a system message into a later turn
        stops = [start + len(way(probes[turn])) for start, turn, way in found]
        starts = [start for start, _, _ in found]
        pieces = [text[stop:start] for stop, start in zip([0, *stops], [*starts, len(text)], strict=True)]
        return pieces, [turn for _, turn, _ in found], [way for _, _, way in found]

    def _learn(self, roles: tuple[str, ...]) -> Layout:
        """The layout of dialogues with these roles; raises `InputError` if contents can't be found again."""
        pieces, turns, ways = self._probe(roles)
        kept, lead, header = self._cut_first(pieces[0], roles[turns[0]])
        left_out = lead if not self._default_system and roles[0] != "system" and self._is_turn(lead) else ""
        spans = [Span(len(kept), TurnRole.NONE), Span(len(lead) - len(left_out), TurnRole.SYSTEM)]
        owner = ROLES[roles[turns[0]]]
        spans += [Span(len(header), owner, is_header=True), Span(0, owner, is_content=True)]
        written = tuple(roles[turn] for turn in turns)
        for number, piece in enumerate(pieces[1:-1], 1):
            closing = self._closing_length(piece, written[:number], written[number])
            spans.append(Span(closing, owner))
            owner = ROLES[written[number]]
            spans += [Span(len(piece) - closing, owner, is_header=True), Span(0, owner, is_content=True)]
        spans.append(Span(len(pieces[-1]), owner))
        pieces[0] = kept + header if left_out else pieces[0]
        specials = tuple(self._place_specials(pieces, spans))
        return Layout(tuple(pieces), left_out, kept, tuple(turns), tuple(ways), tuple(spans), specials)

    def _place_specials(self, pieces: list[str], spans: list[Span]) -> Iterator[tuple[int, SpecialToken]]:
        """The special tokens of each piece, with the span they begin in and their place there."""
        index = 0
        for piece in pieces:
            begin = 0  # of span `index` in this piece
            for special in self._find_specials(piece):
                while special.start >= begin + spans[index].length:
                    begin += spans[index].length
                    index += 1
                yield index, SpecialToken(special.token_id, special.start - begin, special.stop - begin)
            while index < len(spans) and not spans[index].is_content:
                index += 1
            index += 1

    def _cut_first(self, piece: str, role: str) -> tuple[str, str, str]:
        """The first piece in three: begin-of-sequence, what the template says of its own accord, the first header."""
        bos = self._tokenizer.bos_token
        header = self._boundary(role)[1]
        # Some models begin every turn with the token that they also call begin-of-sequence.
        n_bos = len(bos) if bos and piece.startswith(bos) and bos not in self._boundary("user")[1] else 0
        if role == "system" or not header or not piece[n_bos:].endswith(header):
            header = piece[n_bos:]
        return piece[:n_bos], piece[n_bos : len(piece) - len(header)], header

    def _is_turn(self, text: str) -> bool:
        """Whether `text` opens and closes as turns do."""
        closing, header = self._boundary("user")
        opener = self._find_specials(header)[:1]
        return bool(closing) and text.endswith(closing) and bool(opener) and self._find_specials(text)[:1] == opener

    def _find_boundary(self, role: str) -> tuple[str, str]:
        """What closes a turn before one of `role`, and what opens that one; empty if the template has no such turn."""
        before = ("user",) if role == "assistant" else ("user", "assistant")
        try:
            pieces, turns, _ = self._probe((*before, role))
        except InputError:
            return "", ""
        tail = self._tail(before)
        if tail is None or turns != sorted(turns):
            return "", ""
        cut = self._shared_length(tail, pieces[-2])
        return pieces[-2][:cut], pieces[-2][cut:]

    def _tail(self, roles: tuple[str, ...]) -> str | None:
        """What the template writes after the last turn of a dialogue; None where it can't end so."""
        try:
            pieces, turns, _ = self._probe(roles)
        except InputError:
            return None
        return pieces[-1] if turns[-1] == len(roles) - 1 else None

    def _closing_length(self, piece: str, before: tuple[str, ...], role: str) -> int:
        """How much of `piece`, which stands between the turns `before` and one of `role`, closes the turn before.

        A dialogue that ends there ends in what closes its last turn, perhaps with an end-of-sequence besides; so the
        piece and that ending share what closes the turn. If the template lets no dialogue end there, all that doesn't
        open the next turn closes this one.
        """
        key = (piece, before[-1], role)
        if key not in self._closings:
            tail = self._tail(before)
            header = self._boundary(role)[1]
            opening = len(header) if header and piece.endswith(header) else 0
            self._closings[key] = len(piece) - opening if tail is None else self._shared_length(tail, piece)
        return self._closings[key]

    def _shared_length(self, tail: str, piece: str) -> int:
        """Length of the whole tokens of `tail` that `piece` begins with: two special tokens may begin alike."""
        pairs = enumerate(zip(tail, piece, strict=False))
        shared = next((i for i, (one, other) in pairs if one != other), min(len(tail), len(piece)))
        return max((stop for stop in self._token_stops(tail) if stop <= shared), default=0)
