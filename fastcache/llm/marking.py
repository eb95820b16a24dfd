"""Tokenizing a rendered dialogue, in which only the template may write special tokens.

Special tokens are those that the tokenizer calls special and, of its other added tokens, those that the template itself
writes (DeepSeek's `<｜User｜>`, Qwen's `<think>`). Where a dialogue holds the text of one, it is encoded as text.
"""

import json
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastcache.errors import InputError
from fastcache.llm.dialogue import MARK
from fastcache.llm.turns import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Tokens(NamedTuple):
    """Token ids `[n]`, the first character and last character + 1 of each, and whether each is a special token."""

    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]
    is_marker: npt.NDArray[np.bool_]


class Marking:
    """A tokenizer that tells the template's special tokens from texts that look like them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._backend: Any = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        size = max([len(tokenizer), *added, *tokenizer.all_special_ids]) + 1
        self._contents = {index: token.content for index, token in added.items()}
        self._flagged = np.zeros(size, bool)
        """Tokens that the tokenizer itself calls special."""
        self._flagged[[index for index, token in added.items() if token.special]] = True
        self._known = self._flagged.copy()
        self._named = np.zeros(size, bool)
        self._named[tokenizer.all_special_ids] = True
        self._may_mark = np.zeros(size, bool)
        """Added tokens that could be special ones of a template: no blanks, no plain words."""
        self._may_mark[[i for i, text in self._contents.items() if text.strip() and not text.isalnum()]] = True
        self._may_mark |= self._flagged
        self._with_special = lru_cache(4)(self._copy)

    def learn(self, literals: Iterable[str]) -> None:
        """The template holds these texts: added tokens in them are special ones."""
        texts = "\0".join(literals)
        written = [i for i, text in self._contents.items() if self._may_mark[i] and text in texts]
        self._known[written] = True

    def is_special(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        """Mask of the special tokens of the tokenizer and of the template."""
        return self._known[ids] | self._named[ids]

    def special_stops(self, text: str) -> list[int]:
        """Last character + 1 of each special token in `text`."""
        tokens = self._encode(self._backend, text)
        stops: list[int] = tokens.stops[self._known[tokens.ids]].tolist()
        return stops

    def first_special(self, text: str) -> tuple[int, int] | None:
        """The first special token in `text`, and where it begins."""
        tokens = self._encode(self._backend, text)
        places = np.flatnonzero(self._known[tokens.ids])
        return (int(tokens.ids[places[0]]), int(tokens.starts[places[0]])) if len(places) else None

    def plain_ids(self, text: str) -> npt.NDArray[np.int32]:
        """Token ids of a text without special tokens."""
        return self._encode(self._backend, text, special=False).ids

    def tokenize(self, text: str, pieces: Sequence[Piece]) -> Tokens:
        """The rendered text as tokens; special ones are those that the template wrote, and tags around reasoning.

        Raises `InputError` for text that is no valid Unicode.
        """
        tokens = self._encode(self._backend, text)
        places = np.flatnonzero(self._may_mark[tokens.ids])
        starts = [piece.start for piece in pieces]
        own = np.array([self._is_own(text, tokens, int(i), pieces, starts) for i in places], bool)
        known = self._known.copy()
        known[tokens.ids[places[own]]] = True
        if not (known[tokens.ids[places]] & ~own).any():
            tokens.is_marker[places[own]] = True
            return tokens
        return self._apart(text, pieces, known)

    def _is_own(self, text: str, tokens: Tokens, index: int, pieces: Sequence[Piece], starts: Sequence[int]) -> bool:
        """Whether all of an added token is of the template's own text; or a tag, unless the tokenizer calls it special."""
        start, stop = _visible(text, tokens, index)
        first, last = bisect_right(starts, start) - 1, bisect_left(starts, stop)
        fields = {piece.field for piece in pieces[first:last]}
        return fields == {""} or (fields == {MARK} and not self._flagged[tokens.ids[index]])

    def _apart(self, text: str, pieces: Sequence[Piece], known: npt.NDArray[np.bool_]) -> Tokens:
        """The same where a dialogue looks like a special token: what lies between the template's own ones is plain text."""
        backend = self._backend
        if (known & ~self._flagged).any():
            backend = self._with_special(tuple(np.flatnonzero(known & ~self._flagged).tolist()))
        parts: list[Tokens] = []
        position = 0
        for start, stop in _stretches(pieces):
            own = self._encode(self._backend, text[start:stop], start)
            for i in np.flatnonzero(known[own.ids]).tolist():
                if own.ids[i] in self._contents and self._flagged[own.ids[i]] and _is_mark(start, stop, pieces):
                    continue
                parts.append(self._encode(backend, text[position : own.starts[i]], position, special=False))
                one = slice(i, i + 1)
                parts.append(Tokens(own.ids[one], own.starts[one], own.stops[one], np.ones(1, bool)))
                position = int(own.stops[i])
        parts.append(self._encode(backend, text[position:], position, special=False))
        return Tokens(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _copy(self, special: tuple[int, ...]) -> Any:
        """The tokenizer with these added tokens called special too, so that they can be told to be text."""
        from tokenizers import Tokenizer

        description = json.loads(self._backend.to_str())
        for token in description["added_tokens"]:
            token["special"] |= token["id"] in special
        return Tokenizer.from_str(json.dumps(description))

    def _encode(self, backend: Any, text: str, offset: int = 0, special: bool = True) -> Tokens:
        """Tokens of a text that begins at character `offset`, with or without special tokens recognised in it."""
        with _special_tokens(backend, special):
            encoding = backend.encode(text, add_special_tokens=False)
            first = 0
            if offset and text and self._adds_prefix:
                behind = backend.encode("\n" + text, add_special_tokens=False)
                n_newline = sum(1 for _, stop in behind.offsets if stop <= 1)
                if behind.ids[:n_newline] == self._newline and n_newline == len(self._newline):
                    encoding, first, offset = behind, n_newline, offset - 1
        offsets = np.array(encoding.offsets[first:], np.int64).reshape(-1, 2) + offset
        ids = np.array(encoding.ids[first:], np.int32)
        return Tokens(ids, offsets[:, 0], offsets[:, 1], np.zeros(len(ids), bool))

    @property
    def _newline(self) -> list[int]:
        ids: list[int] = self._backend.encode("\n", add_special_tokens=False).ids
        return ids

    @property
    def _adds_prefix(self) -> bool:
        """Whether a text at the beginning is encoded otherwise than behind other text, as SentencePiece does it."""
        if not hasattr(self, "_prefix"):
            alone = self._backend.encode("a", add_special_tokens=False).ids
            behind = self._backend.encode("\na", add_special_tokens=False).ids
            self._prefix = [*self._newline, *alone] != behind
        return self._prefix


def _stretches(pieces: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    """The template's own texts, and tags around reasoning."""
    start: int | None = None
    for piece in pieces:
        if piece.field == "":
            start = piece.start if start is None else start
            continue
        if start is not None:
            yield start, piece.start
            start = None
        if piece.field == MARK:
            yield piece.start, piece.stop
    if start is not None:
        yield start, pieces[-1].stop


def _is_mark(start: int, stop: int, pieces: Sequence[Piece]) -> bool:
    return any(piece.start == start and piece.stop == stop and piece.field == MARK for piece in pieces)


def _visible(text: str, tokens: Tokens, index: int) -> tuple[int, int]:
    """First character and last character + 1 of a token, without the blanks around it."""
    start, stop = int(tokens.starts[index]), int(tokens.stops[index])
    token = text[start:stop]
    stripped = token.strip()
    if not stripped:
        return start, stop
    start += len(token) - len(token.lstrip())
    return start, start + len(stripped)


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
