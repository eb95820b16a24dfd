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


def _n_keys(value: Any) -> int:
    """Keys in all the objects of a value."""
    n_keys, children = (len(value), value.values()) if value.__class__ is dict else (0, value)
    for child in children:
        if child.__class__ is dict or child.__class__ is list:
            n_keys += _n_keys(child)
    return n_keys


def _may_repeat(text: bytes, value: Any) -> bool:
    """Whether an object in `value`, which `text` says, may have had a key twice.

    A quote that ends a text stands before a colon only after a key; inside of a text a backslash stands before it.
    """
    n_named = text.count(b'":') - text.count(b'\\":')
    return b'\\\\":' in text or n_named != _n_keys(value)


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
