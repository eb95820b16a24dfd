"""Settings are plain frozen dataclasses; `option` adds the help text that the command line shows.

A settings class is built from a mapping (a config file, `--set`, the command line) by `from_mapping`, which checks
names and types and says which name was meant. Those derived from `Settings` check themselves when they are built in Python.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from fastcache.errors import InputError, quoted

T = TypeVar("T")

LARGEST_INT = 2**63 - 1
LARGEST_FLOAT = 1e30
"""Ranges of the options that don't give one: what 64-bit integers hold, and what can be squared in float32."""


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
    """'40,960,000' without commas; raises `ValueError` for other commas, such as in '0,5'. Python itself reads 40_960_000."""
    if "," in text and not re.fullmatch(r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text.strip()):
        raise ValueError(text)
    if "," in text and text.strip().startswith("0"):
        raise ValueError(text)
    return text.replace(",", "")


def scalar_kind(kind: Any) -> Any:
    """The scalar type of a field's type: int for `int`, `int | None` and `tuple[int, ...]`."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    return typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind


def limits_of(field: "dataclasses.Field[Any]", kind: Any) -> tuple[float, float] | None:
    """The smallest and the largest value of a numeric option whose type is `kind`; None for one that is no number."""
    if scalar_kind(kind) not in (int, float):
        return None
    largest = LARGEST_INT if scalar_kind(kind) is int else LARGEST_FLOAT
    at_least, at_most = field.metadata.get("range", (None, None))
    return (-largest if at_least is None else at_least), (largest if at_most is None else at_most)


def _check_range(name: str, value: Any, limits: tuple[float, float]) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if not limits[0] <= number <= limits[1]:  # NaN is neither
            at_least, at_most = map(_shown_limit, limits)
            raise InputError(f"{name} = {quoted(number)}: expected a number from {at_least} to {at_most}.")


def parse_number(name: str, value: Any, at_least: float, at_most: float) -> Any:
    """The number that `value` is, an int where `at_least` is one, 40,960,000 and 40_960_000 among them.

    Raises `InputError`, which calls it `name`, for anything else and for a number out of range.
    """
    number = _convert(name, value, type(at_least))
    _check_range(name, number, (at_least, at_most))
    return number


def _shown_limit(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def _convert(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, which is a scalar type, `X | None` or `tuple[X, ...]`; raises `InputError` otherwise."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        inner = [part for part in typing.get_args(kind) if part is not type(None)]
        return None if value is None else _convert(name, value, inner[0])
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, (list, tuple)) else (value,)
        return tuple(_convert(name, item, typing.get_args(kind)[0]) for item in items)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return _checked_text(name, value) if kind is str else value
    if isinstance(value, (str, int)) and not isinstance(value, bool):
        try:
            if kind is bool:
                return {"true": True, "false": False}[str(value).lower()]
            if kind in (int, float):
                return kind(_without_separators(value) if isinstance(value, str) else value)
        except (ValueError, KeyError, OverflowError):
            pass
    expected = getattr(kind, "__name__", kind)
    raise InputError(f"{name} = {quoted(value)}: expected {expected}, found {type(value).__name__}.")


def _checked_text(name: str, text: str) -> str:
    """`text`, unless no file name and no UTF-8 file can hold it; then raises `InputError`."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{name} = {quoted(text)}: expected text in UTF-8 without NUL characters.")
    return text


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
        name = key.replace("-", "_") if isinstance(key, str) else ""
        if name not in fields:
            raise InputError(f"{where}: there is no option {quoted(key)}.{nearest(name, fields)}")
        if name in resolved:
            raise InputError(f"{where}: {name} stands twice, with - and with _. Leave one of them out.")
        resolved[name] = _convert(f"{where}: {name}", value, hints[name])
        limits = limits_of(fields[name], hints[name])
        if limits and resolved[name] is not None:
            _check_range(f"{where}: {name}", resolved[name], limits)
        choices = fields[name].metadata.get("choices")
        if choices and resolved[name] is not None and resolved[name] not in choices:
            raise InputError(f"{where}: {name} = {quoted(value)} is not one of {', '.join(choices)}.")
    for name, field in fields.items():
        if name not in resolved and field.default is dataclasses.MISSING:
            raise InputError(f"{where}: --{name.replace('_', '-')} is needed.")
    return resolved


def as_dict(settings: Any) -> dict[str, Any]:
    """The settings as JSON-ready values (tuples become lists)."""
    pairs = dataclasses.asdict(settings).items()
    return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs}


INPUTS = ("source", "recipe", "model", "corpus", "cache", "sae", "latents")
"""Settings that say what an output is made from."""


def other_settings(place: object, found: list[str]) -> str:
    """The message for an output that was begun with other settings, `found` by `differences`.

    Starting over is offered only where the output is made from the same: it removes what is there.
    """
    text = (
        f"{place} was begun with other settings ({'; '.join(found)}). Repeat the settings it was begun with, or choose "
    )
    if any(line.partition(":")[0].partition(".")[0] in INPUTS for line in found):
        return text + "another --out: it holds what was made from something else."
    return text + "another --out. --fresh would remove what is there and start over."


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Each leaf in which two nested mappings differ, as 'name: old -> new'."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        return found
    return [] if old == new else [f"{prefix}: {quoted(old)} -> {quoted(new)}"]
