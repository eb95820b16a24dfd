"""Rendering a dialogue in the model's own chat template, and knowing of every token what it is.

`template` writes a dialogue and says where each character comes from, and `turns` says whose turn it belongs to; here
the text is tokenized (`marking`), and each token gets its flags. Text in a dialogue that only looks like a special token
stays text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.schema import ROLE_SHIFT, TokenType, TurnRole
from fastcache.llm.dialogue import REASONING, ROLES, Dialogue
from fastcache.llm.layouts import Layouts, plain_contents
from fastcache.llm.marking import Marking, Tokens
from fastcache.llm.provenance import plain
from fastcache.llm.template import FIXED_DATE, ChatTemplate
from fastcache.llm.turns import NOBODY, Piece, TurnFinder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FIXED_DATE", "ChatRenderer", "Rendered", "text_tokens"]

ROLE_WORDS = frozenset(
    word
    for name in ("user", "assistant", "model", "human", "bot", "ai")
    for word in (name, name.capitalize(), name.upper())
)
"""Header words of the paper's special-token set (Table 11), and what templates write for them."""

_WORD = re.compile(r"\w+")

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """A dialogue as the model sees it."""

    text: str
    token_ids: npt.NDArray[np.int32]
    token_types: npt.NDArray[np.uint8]
    turns: list[tuple[int, int]]
    """First token and last token + 1 of what each message says; equal for one that says nothing."""
    changes: tuple[str, ...] = ()
    """How the dialogue was changed so that the template takes it."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Characters, blanks aside, that the template left out, by what they are."""


class ChatRenderer:
    """Renders dialogues with one tokenizer; not for several threads.

    Of a message, `role`, `content`, `reasoning_content`, `tool_calls`, `tool_call_id` and `name` are used. A template
    that prints today's date gets `FIXED_DATE`. With `default_system` false, the turn that some templates write when a
    dialogue has no system message is left out (Qwen's "You are Qwen ...", Llama's dates): only if it is a whole turn of
    its own, which begins and ends with the special tokens that other turns begin and end with. Begin-of-sequence stays.
    Dialogues with a system message, even an empty one, render the same either way. With `fold_system`, a system turn
    that the template refuses or leaves out is put at the beginning of the first user turn.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", default_system: bool = True, fold_system: bool = False
    ) -> None:
        """Raises `ModelError` for a tokenizer without chat template."""
        self._default_system = default_system
        self._template = ChatTemplate(tokenizer, fold_system)
        self._turns = TurnFinder(self._template)
        self._marking = Marking(tokenizer)
        self._layouts = Layouts()
        self._bos: str = tokenizer.bos_token or ""
        self._knows_literals = False

    def render(
        self, messages: Messages, tools: Sequence[Any] | None = None, generation_prompt: bool = False
    ) -> Rendered:
        """Token ids `[n]`, token types `[n]` and turn spans of `messages`.

        `tools` are definitions of tools for the whole dialogue. With `generation_prompt`, the text goes on to where the
        assistant's answer begins. A token of several stretches of the text belongs to the one that its first visible
        character belongs to.
        Raises `InputError` for what is no dialogue, `TemplateRefusalError` for a dialogue that the template refuses, and
        `ModelError` if the template can't be used.
        """
        if not self._knows_literals:
            self._marking.learn(self._template.literals)
            self._knows_literals = True
        contents = None if tools or generation_prompt else plain_contents(messages)
        if contents and (rendered := self._render_plain(messages, contents)):
            return rendered
        dialogue = Dialogue.of(messages, tools)
        written = self._template.apply(dialogue, generation_prompt)
        text, pieces = plain(written.text), self._turns.pieces(written)
        if contents and not written.changes:
            self._layouts.keep(dialogue.roles, contents, text, pieces)
        return self._rendered(text, pieces, dialogue.roles, written.changes, written.left_out)

    def _render_plain(self, messages: Messages, contents: list[str]) -> Rendered | None:
        """The same without a trace, for a dialogue with the layout of an earlier one; None if it has another."""
        roles = tuple(message.get("role", "") for message in messages)
        if roles not in self._layouts:
            return None
        text = self._template.plain_text(roles, contents)
        pieces = self._layouts.pieces(roles, contents, text) if text is not None else None
        return self._rendered(text, pieces, roles) if text is not None and pieces is not None else None

    def _rendered(
        self,
        text: str,
        pieces: list[Piece],
        roles: tuple[str, ...],
        changes: tuple[str, ...] = (),
        left_out: dict[str, int] | None = None,
    ) -> Rendered:
        text, pieces = self._cut(text, pieces, roles)
        tokens = self._marking.tokenize(text, pieces)
        owners = _owners(text, pieces, tokens)
        types = self._types(text, pieces, tokens, owners, roles)
        return Rendered(text, tokens.ids, types, _spans(pieces, owners, len(roles)), changes, left_out or {})

    def _cut(self, text: str, pieces: list[Piece], roles: Sequence[str]) -> tuple[str, list[Piece]]:
        """Text and pieces, begin-of-sequence a piece of its own, without a default system turn that isn't wanted."""
        n_bos = self._n_bos(text)
        if n_bos:
            pieces = [piece._replace(start=max(piece.start, n_bos)) for piece in pieces if piece.stop > n_bos]
            pieces.insert(0, Piece(0, n_bos, NOBODY, ""))
        has_system = roles[0] in ("system", "developer")
        first = next((i for i, piece in enumerate(pieces) if piece.turn is not NOBODY), len(pieces))
        lead = pieces[bool(n_bos) : first]
        if not lead or has_system or self._default_system or any(piece.field for piece in lead):
            return text, pieces
        start, stop = lead[0].start, lead[-1].stop
        if not self._is_turn(text[start:stop]):
            return text, pieces
        rest = [p._replace(start=p.start - stop + start, stop=p.stop - stop + start) for p in pieces[first:]]
        return text[:start] + text[stop:], [*pieces[: bool(n_bos)], *rest]

    def _n_bos(self, text: str) -> int:
        """Characters of the begin-of-sequence; some models begin every turn with the token they call so, too."""
        is_there = bool(self._bos) and text.startswith(self._bos) and self._bos not in self._turns.header("user")
        return len(self._bos) if is_there else 0

    def _is_turn(self, text: str) -> bool:
        """Whether `text` opens and closes as turns do."""
        closing = self._turns.closing("user")
        opener = self._marking.first_special(text)
        openers = {
            self._marking.first_special(self._turns.header(role)[self._n_bos(text) :]) for role in ("user", "system")
        }
        return bool(closing) and text.endswith(closing) and opener is not None and opener in openers

    def _types(
        self,
        text: str,
        pieces: Sequence[Piece],
        tokens: Tokens,
        owners: npt.NDArray[np.int64],
        roles: Sequence[str],
    ) -> npt.NDArray[np.uint8]:
        """Flags of each token `[n]`, with the role of the turn that it belongs to."""
        is_content = np.array([bool(piece.field) for piece in pieces], bool)[owners]
        types = np.where(is_content, int(TokenType.CONTENT), int(TokenType.TEMPLATE)).astype(np.uint8)
        is_special = tokens.is_marker | (~is_content & self._marking.is_special(tokens.ids))
        n_bos = self._n_bos(text)
        is_bos = owners == 0 if n_bos else np.zeros(len(owners), bool)
        types[is_special & ~is_bos] = TokenType.SPECIAL
        types[self._are_role_words(text, pieces, tokens, types, roles) & (types == TokenType.TEMPLATE)] = (
            TokenType.ROLE_WORD
        )
        of_pieces = np.array([_role(piece, roles) for piece in pieces], np.uint8)[owners]
        of_pieces[is_bos] = TurnRole.NONE
        if len(types):
            types[0] |= TokenType.FIRST_POSITION
        return types | (of_pieces << ROLE_SHIFT).astype(np.uint8)

    def _are_role_words(
        self,
        text: str,
        pieces: Sequence[Piece],
        tokens: Tokens,
        types: npt.NDArray[np.uint8],
        roles: Sequence[str],
    ) -> npt.NDArray[np.bool_]:
        """Mask `[n]` of the tokens of role words: words of a turn's header, or directly behind a special token."""
        words: list[tuple[int, int]] = []
        begun: set[int] = set()
        after_special = set(tokens.stops[types == TokenType.SPECIAL].tolist())
        for piece in pieces:
            if piece.turn is NOBODY or piece.field:
                begun |= set() if piece.turn is None else {piece.turn}
                continue
            role = roles[piece.turn]
            header = "" if piece.turn in begun or ROLES[role] == TurnRole.SYSTEM else self._turns.header(role)
            stop = piece.start + len(header) if text.startswith(header, piece.start) else piece.start
            begun.add(piece.turn)
            for match in _WORD.finditer(text, piece.start, piece.stop):
                is_header = match.start() < stop and match[0] in ROLE_WORDS
                if is_header or (match.start() in after_special and match[0] in self._role_words):
                    words.append(match.span())
        mask = np.zeros(len(tokens.ids), bool)
        for start, stop in words:
            for index in range(*np.searchsorted(tokens.stops, [start, stop], side="right").tolist()):
                token = text[tokens.starts[index] : tokens.stops[index]]
                mask[index] = tokens.stops[index] - len(token.lstrip()) >= start
        return mask

    @cached_property
    def _role_words(self) -> frozenset[str]:
        """Role words directly behind special tokens: the known ones, and what tells the template's headers apart."""
        found: dict[str, str] = {}
        for role in ("user", "assistant"):
            header = self._turns.header(role)
            stops = [0, *self._marking.special_stops(header)]
            matches = (_WORD.match(header, stop) for stop in stops)
            found[role] = next((match[0] for match in matches if match), "")
        learnt = set(found.values()) - {""} if found["user"] != found["assistant"] else set()
        return ROLE_WORDS | learnt


def _role(piece: Piece, roles: Sequence[str]) -> TurnRole:
    if piece.turn is NOBODY:
        return TurnRole.SYSTEM
    return TurnRole.REASONING if piece.field == REASONING else ROLES[roles[piece.turn]]


def _owners(text: str, pieces: Sequence[Piece], tokens: Tokens) -> npt.NDArray[np.int64]:
    """Piece of each token `[n]`: that of its first visible character."""
    starts = np.array([piece.start for piece in pieces], np.int64)
    # Some tokenizers leave blanks out of their offsets; they belong to the token that follows.
    begins = np.minimum(tokens.starts, np.concatenate([[0], tokens.stops[:-1]]).astype(np.int64))

    def piece_at(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.searchsorted(starts, positions, side="right") - 1

    owners = piece_at(begins)
    for index in np.flatnonzero(owners != piece_at(np.maximum(tokens.stops - 1, begins))).tolist():
        token = text[begins[index] : tokens.stops[index]]
        n_blanks = len(token) - len(token.lstrip())
        if n_blanks < len(token):
            owners[index] = piece_at(begins[index] + n_blanks)
    return owners


def _spans(pieces: Sequence[Piece], owners: npt.NDArray[np.int64], n_turns: int) -> list[tuple[int, int]]:
    """First token and last token + 1 of the texts of each turn."""
    of_pieces = [piece.turn if piece.field and piece.turn is not None else -1 for piece in pieces]
    of_turns = np.array(of_pieces, np.int64)[owners]
    spans = []
    for turn in range(n_turns):
        tokens = np.flatnonzero(of_turns == turn)
        spans.append((int(tokens[0]), int(tokens[-1]) + 1) if len(tokens) else (0, 0))
    return spans


def text_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Token ids and types of a plain document; nothing in it is taken for a special token."""
    ids = Marking(tokenizer).plain_ids(text)
    return ids, np.full(len(ids), TokenType.CONTENT, np.uint8)
