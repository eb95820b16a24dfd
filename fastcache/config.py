"""Settings are plain frozen dataclasses; `option` adds the help text that the command line shows.

A settings class is built from a mapping (a config file, `--set`, the command line) by `from_mapping`, which checks
names and types and says which name was meant. Those derived from `Settings` check themselves when they are built in Python.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from fastcache.errors import InputError

T = TypeVar("T")


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    at_most: float | None = None,
) -> Any:
    """A dataclass field with a help text, perhaps with choices or a range; without `default` it is required."""
    metadata = {"help": help, "choices": choices, "range": (at_least, at_most)}
    return dataclasses.field(default=default, metadata=metadata)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """' Did you mean ...?' for the nearest known name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _without_separators(text: str) -> str:
    """'40,960,000' and '40_960_000' without separators; raises `ValueError` for other commas, such as in '0,5'."""
    if "," in text and not re.fullmatch(r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text.strip()):
        raise ValueError(text)
    if "," in text and text.strip().startswith("0"):
        raise ValueError(text)
    return text.replace(",", "").replace("_", "")


def _check_range(name: str, value: Any, at_least: float | None, at_most: float | None) -> None:
    for one in value if isinstance(value, tuple) else (value,):
        if not isinstance(one, (int, float)) or isinstance(one, bool):
            continue
        too_small = at_least is not None and not one >= at_least
        if too_small or (at_most is not None and not one <= at_most) or not math.isfinite(one):
            limits = [f"at least {at_least:g}"] if at_least is not None else []
            limits += [f"at most {at_most:g}"] if at_most is not None else []
            raise InputError(f"{name} = {one}: expected {' and '.join(limits) or 'a finite number'}.")


def _convert(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, which is a scalar type, `X | None` or `tuple[X, ...]`; raises `InputError` otherwise."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        inner = [part for part in typing.get_args(kind) if part is not type(None)]
        return None if value is None else _convert(name, value, inner[0])
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(_convert(name, item, typing.get_args(kind)[0]) for item in items)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        try:
            if kind is bool:
                return {"true": True, "false": False}[str(value).lower()]
            if kind in (int, float):
                return kind(_without_separators(value) if isinstance(value, str) else value)
        except (ValueError, KeyError):
            pass
    raise InputError(f"{name} = {value!r}: expected {getattr(kind, '__name__', kind)}, found {type(value).__name__}.")


def from_mapping(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build the settings `cls` from `values`; raises `InputError` for unknown names, wrong types, missing values."""
    return cls(**_resolved(cls, values, where))


class Settings:
    """Base of settings dataclasses that are checked wherever they are built, in Python too."""

    def __post_init__(self) -> None:
        """Raise `InputError` for a value of another type, out of range, or not among the choices."""
        cls = type(self)
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name, expected in _resolved(cls, values, cls.__name__).items():
            value = tuple(values[name]) if isinstance(values[name], list) else values[name]
            if value != expected:  # a text that the command line would have taken as a number
                kinds = f"expected {type(expected).__name__}, found {type(value).__name__}"
                raise InputError(f"{cls.__name__}: {name} = {value!r}: {kinds}.")


def _resolved(cls: type[Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    resolved: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in fields:
            raise InputError(f"{where}: there is no option {key!r}.{nearest(name, fields)}")
        resolved[name] = _convert(f"{where}: {name}", value, hints[name])
        _check_range(f"{where}: {name}", resolved[name], *fields[name].metadata.get("range", (None, None)))
        choices = fields[name].metadata.get("choices")
        if choices and resolved[name] is not None and resolved[name] not in choices:
            raise InputError(f"{where}: {name} = {value!r} is not one of {', '.join(choices)}.")
    for name, field in fields.items():
        if name not in resolved and field.default is dataclasses.MISSING:
            raise InputError(f"{where}: --{name.replace('_', '-')} is needed.")
    return resolved


def as_dict(settings: Any) -> dict[str, Any]:
    """The settings as JSON-ready values (tuples become lists)."""
    pairs = dataclasses.asdict(settings).items()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Each leaf in which two nested mappings differ, as 'name: old -> new'."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    return [] if old == new else [f"{prefix}: {old!r} -> {new!r}"]
