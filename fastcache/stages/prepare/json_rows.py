"""JSON of data sets: parsed quickly, and an object that has a key twice is noticed, since one of its values would be lost."""

import json
from typing import Any

import orjson


class Refused(ValueError):  # noqa: N818 - a verdict on one row, not an error of the program
    """JSON text that is no row; the message is the reason counted in the ledger."""


class _Repeated:
    """Stands in for an object that has a key twice."""


def _pairs(pairs: list[tuple[str, Any]]) -> Any:
    value = dict(pairs)
    return value if len(value) == len(pairs) else _Repeated()


def _n_texts(value: Any) -> int:
    """Keys of objects, and texts, in a value."""
    n_texts, children = (len(value), value.values()) if value.__class__ is dict else (0, value)
    for child in children:
        kind = child.__class__
        if kind is str:
            n_texts += 1
        elif kind is dict or kind is list:
            n_texts += _n_texts(child)
    return n_texts


def _may_repeat(text: bytes, value: Any) -> bool:
    """Whether an object in `value`, which `text` says, may have had a key twice: then it has fewer texts than are written.

    Every text stands between two quotes, and those in a text have a backslash before them.
    """
    n_quotes = text.count(b'"')
    if b"\\" in text:
        if b'\\\\"' in text:  # the backslash before this quote may itself be one that is meant
            return True
        n_quotes -= text.count(b'\\"')
    return n_quotes != 2 * _n_texts(value)


def parse(text: bytes) -> tuple[Any, bool]:
    """The value of a JSON text, and whether it may hold objects that have a key twice; raises `Refused`.

    Python's parser has the last word: it takes NaN, and lone surrogates where nobody looks.
    """
    try:
        try:
            value = orjson.loads(text)
            if value.__class__ not in (dict, list) or not _may_repeat(text, value):
                return value, False
        except ValueError:
            pass
        return json.loads(text, object_pairs_hook=_pairs), True
    except RecursionError as error:
        raise Refused("nested too deeply") from error
    except ValueError as error:
        raise Refused("not JSON") from error


def _holds_repeated(value: Any) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, _Repeated) or any(_holds_repeated(child) for child in children)


def to_row(value: Any, may_repeat: bool) -> dict[str, Any]:
    """A parsed value as a row; raises `Refused` if it is no object, or one in which an object has a key twice."""
    try:
        if may_repeat and _holds_repeated(value):
            raise Refused("a key twice in an object")
    except RecursionError as error:
        raise Refused("nested too deeply") from error
    if value.__class__ is not dict:
        raise Refused("not an object")
    row: dict[str, Any] = value
    return row
