"""Command-line options made from the settings dataclasses, so that each setting is written down once.

Where a value comes from, later ones winning: the default, the `--config` file (YAML or JSON), `--set key=value`, the
option itself.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from fastcache.config import from_mapping
from fastcache.errors import FormatError, InputError, quoted
from fastcache.files import parse_json
from fastcache.strict_yaml import parse_yaml
from fastcache.text_files import read_text_file

MAX_CONFIG_BYTES = 2**20

T = TypeVar("T")
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _click_option(field: "dataclasses.Field[Any]", kind: Any) -> Decorator:
    flag = "--" + field.name.replace("_", "-")
    optional = typing.get_origin(kind) in (types.UnionType, typing.Union)
    base = next(part for part in typing.get_args(kind) if part is not type(None)) if optional else kind
    multiple = typing.get_origin(base) is tuple
    base = typing.get_args(base)[0] if multiple else base
    help_text = field.metadata["help"]
    if field.default is dataclasses.MISSING:
        help_text += "  [needed]"
    elif field.default not in (None, ()) and not isinstance(field.default, bool):
        shown = _shown(field.default)
        help_text += f"  [default: {shown}]"
    choices = field.metadata["choices"]
    if base is bool:
        names = f"{flag}/--no-{flag[2:]}" if field.default is not False else flag
        return click.option(names, is_flag=True, default=None, help=help_text)
    # Numbers are taken as text, so that 40_960_000 and 40,960,000 are understood and errors are ours.
    shown_type = click.Choice(choices) if choices else click.STRING
    metavar = None if choices else {int: "N", float: "X"}.get(base, "TEXT")
    return click.option(flag, multiple=multiple, type=shown_type, metavar=metavar, default=None, help=help_text)


def _shown(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(map(_shown, default))
    if isinstance(default, (int, float)):
        return f"{default:,}" if isinstance(default, int) and default >= 10_000 else f"{default:g}"
    return str(default)


def field_options(cls: type[Any]) -> Decorator:
    """Add an option for each field of the settings `cls`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(cls)
        for field in reversed(dataclasses.fields(cls)):
            function = _click_option(field, hints[field.name])(function)
        return function

    return decorate


def settings_options(cls: type[Any]) -> Decorator:
    """Add an option for each field of the settings `cls`, and `--config` and `--set`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        set_help = "Set an option by name. Repeatable."
        function = click.option("--set", "set_", multiple=True, metavar="KEY=VALUE", help=set_help)(function)
        config_help = "Read options from a YAML or JSON file."
        function = click.option("--config", "config_file", metavar="FILE", help=config_help)(function)
        return field_options(cls)(function)

    return decorate


class LocalPath(click.Path):
    """A path of this machine: an address would otherwise become a folder called `s3:`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse an address and an empty name."""
        if isinstance(value, str) and "://" in value:
            self.fail(f"{quoted(value)} is an address. Only caches can be in a bucket; give a local path.", param, ctx)
        if value == "":
            self.fail("It is empty; give a path.", param, ctx)
        return super().convert(value, param, ctx)


class AddressOrPath(click.Path):
    """A path, or the address of a bucket."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Leave an address as it is."""
        if isinstance(value, str) and value.startswith("memory://"):
            self.fail(f"{quoted(value)} ends with the process: what is written there is lost.", param, ctx)
        if isinstance(value, str) and "://" in value:
            return value
        if value == "":
            self.fail("It is empty; give a path.", param, ctx)
        return super().convert(value, param, ctx)


def output_options(
    function: Callable[..., Any], remote: bool = False, default: str = "named by the settings, below ./fastcache-runs"
) -> Callable[..., Any]:
    """Add `--out` and `--fresh`; with `remote`, the output may be in a bucket."""
    fresh_help = "Start over: remove what an earlier run left in the output directory."
    function = click.option("--fresh", is_flag=True, help=fresh_help)(function)
    out_help = f"Output directory.  [default: {default}]"
    kind = AddressOrPath(path_type=Path) if remote else LocalPath(path_type=Path)
    return click.option("--out", type=kind, metavar="DIR", help=out_help)(function)


def read_config(path: Path, what: str = "--config") -> dict[str, Any]:
    """The mapping in a YAML or JSON file, which messages call `what`; raises `InputError` for anything else."""
    text = read_text_file(path, what, MAX_CONFIG_BYTES)
    try:
        values = parse_json(text, str(path)) if path.suffix.lower() == ".json" else parse_yaml(text, str(path))
    except FormatError as error:
        raise InputError(str(error)) from error
    if not isinstance(values, dict):
        raise InputError(f"{path} should map option names to values, found {type(values).__name__}.")
    return values


def with_underscores(values: dict[str, Any], where: str) -> dict[str, Any]:
    """A mapping with _ for - in its keys; raises `InputError` where two keys become one."""
    changed: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in changed:
            raise InputError(f"{where}: {quoted(name)} stands twice, with - and with _. Leave one of them out.")
        changed[name] = value
    return changed


def assignment(text: str, option: str) -> tuple[str, str]:
    """The name, with underscores, and the text of KEY=VALUE; raises `InputError` for anything else."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{option} {quoted(text)}: expected KEY=VALUE, for example {option} seed=7.")
    return key.strip().replace("-", "_"), value


def assignments(texts: Iterable[str], option: str) -> dict[str, str]:
    """Those of an option that can be repeated, by name; raises `InputError` for a name that is given twice."""
    values: dict[str, str] = {}
    for text in texts:
        key, value = assignment(text, option)
        if key in values:
            raise InputError(f"{option} {key} is given twice. Leave one of them out.")
        values[key] = value
    return values


def resolve(cls: type[T], given: dict[str, Any]) -> T:
    """The settings `cls` from what click parsed; takes its own entries out of `given`."""
    values: dict[str, Any] = {}
    if config_file := given.pop("config_file"):
        values |= with_underscores(read_config(Path(config_file)), config_file)
    for key, text in assignments(given.pop("set_"), "--set").items():
        values[key] = parse_yaml(text, f"--set {key}")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        value = given.pop(field.name)
        if value is not None and value != ():
            values[field.name] = list(value) if isinstance(value, tuple) else value
    return from_mapping(cls, values, "options")
