"""`sae.json`: what an SAE is, and where its activations came from. Everything that reads one goes through `read_info`.

It needs no torch: `inspect` and `report` read it too.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from fastcache.cache_format.schema import layer_of
from fastcache.errors import FormatError, InputError, quoted
from fastcache.files import read_json

INFO_FILE = "sae.json"
FORMAT, FORMAT_VERSION = "fastcache-sae", "2.0"
LARGEST = 2**31 - 1
OPTIONS: dict[str, tuple[str, ...]] = {
    "standard": (),
    "jumprelu": (),
    "topk": ("k",),
    "batchtopk": ("k",),
    "gated": (),
    "matryoshka": ("k", "widths"),
}
"""What each architecture is built from besides its shape."""
ALWAYS = ("format", "format_version", "architecture", "d_in", "d_sae", "options")
"""What an SAE can't be loaded without."""

_VERSION = re.compile(r"2\.[0-9]{1,4}")
Check = Callable[[Any], bool]
Rule = tuple[str, Check]
"""What is expected, in words, and whether a value is that."""


def _is(kind: type | tuple[type, ...]) -> Check:
    return lambda value: isinstance(value, kind) and not isinstance(value, bool)


def _number(at_least: int, at_most: int = 2**63 - 1) -> Rule:
    def check(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and at_least <= value <= at_most

    return f"a whole number from {at_least} to {at_most:,}", check


def _is_hook_point(value: Any) -> bool:
    try:
        return isinstance(value, str) and layer_of(value) >= 0
    except InputError:
        return False


def _is_flat(value: Any) -> bool:
    """Whether these are settings: scalars, and lists of them."""
    if not isinstance(value, dict):
        return False
    return all(not isinstance(item, (dict, list)) for each in value.values() for item in _items(each))


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


TEXT: Rule = ("text", _is(str))
OBJECT: Rule = ("an object", _is(dict))
LENGTH: Rule = ("a number or null", lambda value: value is None or _number(1)[1](value))
RULES: dict[str, Rule] = {
    "format": (f"'{FORMAT}'", lambda value: value == FORMAT),
    "format_version": ("version 2.x", lambda value: isinstance(value, str) and _VERSION.fullmatch(value) is not None),
    "architecture": (f"one of {', '.join(OPTIONS)}", lambda value: isinstance(value, str) and value in OPTIONS),
    "d_in": _number(1, LARGEST),
    "d_sae": _number(1, LARGEST),
    "options": OBJECT,
    "hook_point": ("resid_post.<layer>", _is_hook_point),
    "cache_fingerprint": TEXT,
    "model": OBJECT,
    "model.name": TEXT,
    "tokenizer": OBJECT,
    "method": OBJECT,
    "method.name": TEXT,
    "method.max_length": LENGTH,
    "method.block_size": LENGTH,
    "corpus": OBJECT,
    "corpus.fingerprint": TEXT,
    "training": ("an object of settings", _is_flat),
    "training.steps": _number(0),
    "training.tokens": _number(0),
    "training.batch_size": _number(1),
    "training.activation_scale": ("a number", _is((int, float))),
    "tokens": OBJECT,
    "skipped_units": ("a list", _is(list)),
}
"""Values by dotted name; a missing name is an error only when it is used."""


def read_info(folder: Path, require: Collection[str] = ()) -> dict[str, Any]:
    """The `sae.json` in `folder`, whose values are of their types; those of the dotted names `require` are there.

    Raises `FormatError` for anything else.
    """
    path = folder / INFO_FILE
    info = read_json(path)
    for name, (expected, check) in RULES.items():
        is_there, value = _look_up(info, name)
        if is_there and not check(value):
            raise FormatError(f"{path}: {name} should be {expected}, found {quoted(value)}. {_ADVICE}")
        if not is_there and name in require:
            raise FormatError(f"{path} lacks {name}, which should be {expected}. {_ADVICE}")
    if {"architecture", "options"} <= info.keys():
        _check_options(info, path)
    return info


_ADVICE = "The file is damaged, or not of this version of fastcache: copy the SAE again, or train it again."


def _look_up(info: Mapping[str, Any], dotted: str) -> tuple[bool, Any]:
    outer, _, inner = dotted.partition(".")
    if not inner:
        return outer in info, info.get(outer)
    value = info.get(outer)
    return (inner in value, value.get(inner)) if isinstance(value, dict) else (False, None)


def _check_options(info: Mapping[str, Any], path: Path) -> None:
    wanted = OPTIONS[info["architecture"]]
    if set(info["options"]) != set(wanted):
        expected = f"should be {' and '.join(wanted)}" if wanted else "should be empty"
        raise FormatError(
            f"{path}: the options of {info['architecture']} {expected}, found {quoted(info['options'])}. {_ADVICE}"
        )
