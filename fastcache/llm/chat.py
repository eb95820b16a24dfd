"""Rendering a dialogue in the model's own chat template, and knowing of every token what it is.

`layouts` knows what the template writes around contents; here a rendered dialogue is cut into template text and
contents with it and tokenized, and each token gets its flags.
Text in contents that only looks like a special token stays text.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcache.cache_format.schema import ROLE_SHIFT, TokenType
from fastcache.errors import InputError
from fastcache.llm.layouts import FIXED_DATE, ROLES, ChatTemplate, Layout, Span, SpecialToken

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FIXED_DATE", "ChatRenderer", "Rendered", "text_tokens"]

ROLE_WORDS = {"user", "assistant", "model"}
"""Header words of the paper's special-token set (Table 11); Gemma's template writes `model` for `assistant`."""


Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Rendered:
    """A dialogue as the model sees it."""

    text: str
    token_ids: npt.NDArray[np.int32]
    token_types: npt.NDArray[np.uint8]
    turns: list[tuple[int, int]]
    """First token and last token + 1 of each message's content; equal for an empty one."""


class _Tokens(NamedTuple):
    """Token ids `[n]`, and the first character and last character + 1 of each."""

    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]


class _Aligned(NamedTuple):
    """A rendered dialogue cut into spans."""

    text: str
    spans: tuple[Span, ...]
    starts: npt.NDArray[np.int64]
    """First character of each span `[n_spans]`."""
    turns: dict[int, int]
    """Message -> span of its content."""
    specials: list[SpecialToken]
    """Special tokens of the template's text, in order."""


class ChatRenderer:
    """Renders dialogues with one tokenizer.

    Of a message, role and content are used. A template that prints today's date gets `FIXED_DATE`. With
    `default_system` false, the turn that some templates write when a dialogue has no system message is left out
    (Qwen's "You are Qwen ...", Llama's dates): only if it is a whole turn of its own, which begins and ends with the
    special tokens that other turns begin and end with. Begin-of-sequence stays. Dialogues with a system message, even
    an empty one, render the same either way.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", default_system: bool = True) -> None:
        """Raises `ModelError` for a tokenizer without chat template."""
        self._backend = tokenizer.backend_tokenizer
        added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._recognised = np.zeros(max([len(tokenizer), *added, *tokenizer.all_special_ids]) + 1, bool)
        self._recognised[list(added)] = True
        self._special = self._recognised.copy()
        self._special[tokenizer.all_special_ids] = True
        self._template = ChatTemplate(tokenizer, self._find_specials, self._token_stops, default_system)

    def render(self, messages: Messages) -> Rendered:
        """Token ids `[n]`, token types `[n]` and turn spans of `messages`.

        A token of template text and content both belongs to the one that its first visible character belongs to.
        Raises `InputError` for a dialogue that the template refuses, or writes in a way that can't be aligned with its
        contents; `ModelError` if the template is no valid template.
        """
        aligned = self._align(messages)
        tokens = self._tokenize(aligned)
        owners = _owners(aligned, tokens)
        first = np.searchsorted(owners, np.arange(len(aligned.spans) + 1)).tolist()
        bounds = {turn: (first[span], first[span + 1]) for turn, span in aligned.turns.items()}
        turns = [bounds.get(turn, (0, 0)) for turn in range(len(messages))]
        return Rendered(aligned.text, tokens.ids, self._types(aligned, tokens, owners), turns)

    def _align(self, messages: Messages) -> _Aligned:
        """The rendered dialogue in spans: it must equal its layout filled with its contents."""
        roles, contents = _checked(messages)
        text = self._template.apply(roles, contents)
        reason = ""
        for written in _readings(roles, contents):
            try:
                layout = self._template.layout(tuple(roles[turn] for turn in written))
            except InputError as error:
                reason = reason or str(error)
                continue
            aligned = _fill(layout, written, contents)
            if text == layout.kept + layout.left_out + aligned.text[len(layout.kept) :]:
                return aligned
        raise InputError(
            reason
            or "The chat template writes this dialogue otherwise than others with the same roles; it seems to "
            "change contents in a way fastcache doesn't know."
        )

    def _encode(self, text: str, offset: int = 0, special: bool = True) -> _Tokens:
        """Tokens of a text that begins at character `offset`, with or without special tokens recognised in it."""
        with _special_tokens(self._backend, special):
            encoding = self._backend.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2) + offset
        return _Tokens(np.array(encoding.ids, np.int32), offsets[:, 0], offsets[:, 1])

    def _find_specials(self, text: str) -> list[SpecialToken]:
        """The special tokens in `text`."""
        tokens = self._encode(text)
        found = np.flatnonzero(self._recognised[tokens.ids])
        return [SpecialToken(int(tokens.ids[i]), int(tokens.starts[i]), int(tokens.stops[i])) for i in found]

    def _token_stops(self, text: str) -> list[int]:
        """Last character + 1 of each token of `text`."""
        stops: list[int] = self._encode(text).stops.tolist()
        return stops

    def _tokenize(self, aligned: _Aligned) -> _Tokens:
        """The rendered text as tokens, special ones in the template's text only."""
        tokens = self._encode(aligned.text)
        found = np.flatnonzero(self._recognised[tokens.ids])
        expected = np.array(aligned.specials, np.int64).reshape(-1, 3)
        if (
            len(found) == len(expected)
            and (tokens.ids[found] == expected[:, 0]).all()
            and (tokens.starts[found] <= expected[:, 1]).all()
            and (expected[:, 1] < tokens.stops[found]).all()
        ):
            return tokens
        # A content looks like a special token: encode what lies between the template's own ones as plain text.
        pieces: list[_Tokens] = []
        position = 0
        for special in aligned.specials:
            pieces.append(self._encode(aligned.text[position : special.start], position, special=False))
            one = np.array(special, np.int64)[:, None]
            pieces.append(_Tokens(one[0].astype(np.int32), one[1], one[2]))
            position = special.stop
        pieces.append(self._encode(aligned.text[position:], position, special=False))
        return _Tokens(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))

    def _types(self, aligned: _Aligned, tokens: _Tokens, owners: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Flags of each token `[n]`, with the role of the turn that it belongs to."""
        content = np.array([span.is_content for span in aligned.spans])[owners]
        header = np.array([span.is_header for span in aligned.spans])[owners]
        roles = np.array([span.role for span in aligned.spans], np.uint8)[owners]
        types = np.where(content, int(TokenType.CONTENT), int(TokenType.TEMPLATE)).astype(np.uint8)
        # Span 0 is begin-of-sequence.
        types[~content & (owners > 0) & self._special[tokens.ids]] = TokenType.SPECIAL
        for index in np.flatnonzero(header).tolist():
            if aligned.text[tokens.starts[index] : tokens.stops[index]] in ROLE_WORDS:
                types[index] = TokenType.ROLE_WORD
        if len(types):
            types[0] |= TokenType.FIRST_POSITION
        return types | (roles << ROLE_SHIFT).astype(np.uint8)


def _checked(messages: Messages) -> tuple[tuple[str, ...], list[str]]:
    """Roles and contents; raises `InputError` for what is no dialogue."""
    if not messages:
        raise InputError("A dialogue needs at least one message, got none.")
    for turn, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise InputError(
                f"Turn {turn} needs one of the roles {', '.join(ROLES)} and a text as content, "
                f"got role {role!r} and content {str(content)[:40]!r}."
            )
    return tuple(message["role"] for message in messages), [message["content"] for message in messages]


def _readings(roles: Sequence[str], contents: Sequence[str]) -> Iterator[list[int]]:
    """The turns that the template may have written: all; or, if contents are empty, all but the empty ones of a role.

    Some templates write no system turn for an empty system message.
    """
    empty = sorted({role for role, content in zip(roles, contents, strict=True) if not content})
    for dropped in (set(some) for n in range(len(empty) + 1) for some in combinations(empty, n)):
        yield [turn for turn, role in enumerate(roles) if contents[turn] or role not in dropped]


def _fill(layout: Layout, written: Sequence[int], contents: Sequence[str]) -> _Aligned:
    """The layout with the contents of the turns `written`."""
    messages = [written[turn] for turn in layout.turns]
    kept = [way(contents[message]) for way, message in zip(layout.ways, messages, strict=True)]
    parts = [layout.pieces[0]]
    for content, piece in zip(kept, layout.pieces[1:], strict=True):
        parts += [content, piece]
    following = iter(kept)
    lengths = [len(next(following)) if span.is_content else span.length for span in layout.spans]
    starts = [0, *accumulate(lengths[:-1])]
    content_spans = (index for index, span in enumerate(layout.spans) if span.is_content)
    specials = [
        SpecialToken(special.token_id, starts[span] + special.start, starts[span] + special.stop)
        for span, special in layout.specials
    ]
    turns = dict(zip(messages, content_spans, strict=True))
    return _Aligned("".join(parts), layout.spans, np.array(starts, np.int64), turns, specials)


def _owners(aligned: _Aligned, tokens: _Tokens) -> npt.NDArray[np.int64]:
    """Span of each token `[n]`: that of its first visible character."""
    # Some tokenizers leave blanks out of their offsets; they belong to the token that follows.
    begins = np.minimum(tokens.starts, np.concatenate([[0], tokens.stops[:-1]]).astype(np.int64))

    def span_at(positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.searchsorted(aligned.starts, positions, side="right") - 1

    owners = span_at(begins)
    for index in np.flatnonzero(owners != span_at(np.maximum(tokens.stops - 1, begins))).tolist():
        text = aligned.text[begins[index] : tokens.stops[index]]
        n_blanks = len(text) - len(text.lstrip())
        if n_blanks < len(text):
            owners[index] = span_at(begins[index] + n_blanks)
    return owners


@contextmanager
def _special_tokens(backend: Any, recognised: bool) -> Iterator[None]:
    """Special tokens are recognised in encoded text, or not; `InputError` for text that is no valid Unicode."""
    backend.encode_special_tokens = not recognised
    try:
        yield
    except TypeError as error:  # what the tokenizers library raises for lone surrogates
        raise InputError(
            "The text holds a lone surrogate, so it is no valid Unicode and can't be tokenized."
        ) from error
    finally:
        backend.encode_special_tokens = False


def text_tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Token ids and types of a plain document; nothing in it is taken for a special token."""
    backend = tokenizer.backend_tokenizer
    with _special_tokens(backend, False):
        ids = np.array(backend.encode(text, add_special_tokens=False).ids, np.int32)
    return ids, np.full(len(ids), TokenType.CONTENT, np.uint8)
