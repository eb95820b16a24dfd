"""Rendering a dialogue in the model's own chat template, and knowing of every token what it is.

The template itself tells what it adds: the dialogue is rendered once as it is and once with its contents replaced by
markers. What stands between the markers is template text, what stands in their place is content. The role of a piece
of template text is told by rendering the dialogue's beginning alone. Nothing here knows any model's name.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.schema import ROLE_SHIFT, TokenType, TurnRole
from fastcache.errors import InputError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {"system": TurnRole.SYSTEM, "user": TurnRole.USER, "assistant": TurnRole.ASSISTANT, "tool": TurnRole.TOOL}
ROLE_WORDS = {"user", "assistant", "model"}
"""Header words of the paper's special-token set (Table 11); Gemma's template writes `model` for `assistant`."""

FIXED_DATE = "26 Jul 2024"
"""Templates that print today's date get this one, so that rendering is the same every day."""


@dataclass(frozen=True)
class Rendered:
    """A dialogue as the model sees it."""

    text: str
    token_ids: npt.NDArray[np.int32]
    token_types: npt.NDArray[np.uint8]
    turns: list[tuple[int, int]]
    """First token and last token + 1 of each turn's content."""


@dataclass(frozen=True)
class _Span:
    """A stretch of the rendered text."""

    start: int
    stop: int
    role: TurnRole
    is_content: bool


class ChatRenderer:
    """Renders dialogues with one tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._special = {index for index, token in added.items() if token.special} | set(tokenizer.all_special_ids)
        self._bos = tokenizer.bos_token_id
        self._special_flag = np.zeros(max([len(tokenizer), *self._special]) + 1, bool)
        self._special_flag[[index for index in self._special if index != self._bos]] = True
        self._header_starts: dict[tuple[str, str, str], int] = {}

    def render(self, messages: Sequence[dict[str, str]]) -> Rendered:
        """Token ids `[n]`, token types `[n]` and turn spans of `messages`.

        Raises `InputError` if the template refuses the dialogue, `ModelError` if its output can't be aligned with it.
        """
        text = self._apply(messages)
        spans = self._spans(text, messages)
        token_ids, starts = self._tokenize(text, spans)
        types, owners = self._types(text, spans, token_ids, starts)
        turns = []
        for index in (i for i, span in enumerate(spans) if span.is_content):
            inside = np.flatnonzero(owners == index)
            turns.append((int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0))
        return Rendered(text, token_ids, types, turns)

    def _apply(self, messages: Sequence[dict[str, str]]) -> str:
        import jinja2

        try:
            return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, date_string=FIXED_DATE))
        except jinja2.TemplateError as error:
            raise InputError(f"The model's chat template refuses this dialogue: {error}") from error

    def _spans(self, text: str, messages: Sequence[dict[str, str]]) -> list[_Span]:
        """The rendered text cut into template pieces and contents, in order, covering all of it."""
        markers = [f"\ue000{i}\ue001" for i in range(len(messages))]
        marked = self._apply([{**m, "content": marker} for m, marker in zip(messages, markers, strict=True)])
        spans: list[_Span] = []
        position = 0
        for index, (message, marker) in enumerate(zip(messages, markers, strict=True)):
            piece, found, marked = marked.partition(marker)
            start = position + len(piece)
            candidates = [c for c in (message["content"], message["content"].strip()) if text.startswith(c, start)]
            if not found or text[position:start] != piece or not candidates:
                raise ModelError(
                    f"Turn {index} ({message['role']}) can't be found in the text that the chat template made of it. "
                    "The template changes contents in a way fastcache doesn't know; please report it with the template."
                )
            spans += self._template_spans(piece, position, messages, index)
            # A stripped content is a prefix of itself with blanks: take the longer one that the template kept.
            content = (
                candidates[0] if self._continues(text, start, candidates[0], marked, markers, index) else candidates[-1]
            )
            spans.append(_Span(start, start + len(content), ROLES[message["role"]], True))
            position = start + len(content)
        if text[position:] != marked:
            raise ModelError("The end of the text that the chat template made can't be aligned with the dialogue.")
        spans += self._template_spans(marked, position, messages, len(messages))
        return [span for span in spans if span.stop > span.start or span.is_content]

    @staticmethod
    def _continues(text: str, start: int, content: str, marked: str, markers: list[str], index: int) -> bool:
        """Whether the template's next piece follows `content` at `start`."""
        following = marked.partition(markers[index + 1])[0] if index + 1 < len(markers) else marked
        return text.startswith(following, start + len(content))

    def _template_spans(self, piece: str, start: int, messages: Sequence[dict[str, str]], index: int) -> list[_Span]:
        """Template text before turn `index`: the end of the turn before it, then this turn's header."""
        before = ROLES[messages[index - 1]["role"]] if index else TurnRole.NONE
        if index == len(messages):
            return [_Span(start, start + len(piece), before, False)]
        after = ROLES[messages[index]["role"]]
        if not index:
            # A default system turn, a date line or the like may stand before the first header.
            split = self._leading_length(piece, messages[0]["role"])
            lead = TurnRole.SYSTEM if after != TurnRole.SYSTEM else after
            return [_Span(start, start + split, lead, False), _Span(start + split, start + len(piece), after, False)]
        split = self._header_start(piece, messages, index)
        return [_Span(start, start + split, before, False), _Span(start + split, start + len(piece), after, False)]

    def _header_start(self, piece: str, messages: Sequence[dict[str, str]], index: int) -> int:
        """Where in `piece` the header of turn `index` begins, learnt once for each kind of piece."""
        key = (piece, messages[index - 1]["role"], messages[index]["role"])
        if key not in self._header_starts:
            split = 0
            marked = [{**m, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages[:index])]
            try:
                ending = self._apply(marked).rpartition(marked[-1]["content"])[2]
            except InputError:  # the template wants whole exchanges
                ending = ""
            if piece.startswith(ending):
                split = len(ending)
            self._header_starts[key] = split
        return self._header_starts[key]

    def _leading_length(self, piece: str, role: str) -> int:
        """Length of what the template writes before the first header: the last special token but for its header."""
        positions = [piece.rfind(self._tokenizer.decode([index])) for index in self._special]
        opener = max(positions, default=-1)
        header = piece[opener:] if opener >= 0 else piece
        names = (role, "model") if role == "assistant" else (role,)
        if opener > 0 and not any(name in header for name in names):
            # Llama closes its header with a special token of its own: go back to the one that opens it.
            opener = max(
                (p for p in (piece.rfind(self._tokenizer.decode([i]), 0, opener) for i in self._special)), default=0
            )
        return max(opener, 0)

    def _tokenize(self, text: str, spans: list[_Span]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Token ids and the first character of each; special tokens are recognised in template text only."""
        ids, starts = self._encode(text, 0, special=True)
        content_starts = [span.start for span in spans if span.is_content]
        content = {span.start: span for span in spans if span.is_content}

        def in_content(position: int) -> bool:
            index = bisect_right(content_starts, position) - 1
            return index >= 0 and position < content[content_starts[index]].stop

        is_special = [token in self._special for token in ids]
        if not any(flag and in_content(start) for flag, start in zip(is_special, starts, strict=True)):
            return np.array(ids, np.int32), np.array(starts, np.int64)
        # Text that only looks like a special token: encode what lies between the real ones as plain text.
        plain_ids: list[int] = []
        plain_starts: list[int] = []
        position = 0
        for token, start, flag in zip(ids, starts, is_special, strict=True):
            if not flag or in_content(start):
                continue
            more_ids, more_starts = self._encode(text[position:start], position, special=False)
            plain_ids += [*more_ids, token]
            plain_starts += [*more_starts, start]
            position = start + len(self._tokenizer.decode([token]))
        more_ids, more_starts = self._encode(text[position:], position, special=False)
        return np.array(plain_ids + more_ids, np.int32), np.array(plain_starts + more_starts, np.int64)

    def _encode(self, text: str, offset: int, special: bool) -> tuple[list[int], list[int]]:
        if not text:
            return [], []
        backend = self._tokenizer.backend_tokenizer
        backend.encode_special_tokens = not special
        try:
            encoding: Any = backend.encode(text, add_special_tokens=False)
        finally:
            backend.encode_special_tokens = False
        return encoding.ids, [offset + start for start, _ in encoding.offsets]

    def _types(
        self, text: str, spans: list[_Span], token_ids: npt.NDArray[np.int32], starts: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
        """Flags of each token, and the span it begins in."""
        owners = np.searchsorted([span.start for span in spans], starts, side="right") - 1
        content = np.array([span.is_content for span in spans])[owners]
        roles = np.array([span.role for span in spans], np.uint8)[owners]
        types = np.where(content, int(TokenType.CONTENT), int(TokenType.TEMPLATE)).astype(np.uint8)
        types[~content & self._special_flag[token_ids]] = TokenType.SPECIAL
        types[self._role_words(text, spans, starts, owners, content)] = TokenType.ROLE_WORD
        if len(types):
            types[0] |= TokenType.FIRST_POSITION
        return types | (roles << ROLE_SHIFT).astype(np.uint8), owners

    @staticmethod
    def _role_words(
        text: str,
        spans: list[_Span],
        starts: npt.NDArray[np.int64],
        owners: npt.NDArray[np.int64],
        content: npt.NDArray[np.bool_],
    ) -> list[int]:
        """Tokens that are a role word standing alone in the header of a turn."""
        found = []
        stops = [*starts[1:].tolist(), len(text)]
        for index in np.flatnonzero(~content).tolist():
            header_of_turn = owners[index] + 1 < len(spans) and spans[owners[index] + 1].is_content
            if header_of_turn and text[starts[index] : stops[index]] in ROLE_WORDS:
                found.append(index)
        return found


def text_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Token ids and types of a plain document; nothing in it is taken for a special token."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    try:
        ids = np.array(backend.encode(text, add_special_tokens=False).ids, np.int32)
    finally:
        backend.encode_special_tokens = False
    return ids, np.full(len(ids), TokenType.CONTENT, np.uint8)
