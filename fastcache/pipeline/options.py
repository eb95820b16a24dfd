"""Command-line options made from the settings dataclasses, so that each setting is written down once.

Where a value comes from, later ones winning: the default, the `--config` file (YAML or JSON), `--set key=value`, the
option itself.
"""

import dataclasses
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from fastcache.config import from_mapping
from fastcache.errors import InputError

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
        config_type = click.Path(exists=True, dir_okay=False, path_type=Path)
        function = click.option("--config", "config_file", type=config_type, help=config_help)(function)
        return field_options(cls)(function)

    return decorate


class AddressOrPath(click.Path):
    """A path, or the address of a bucket."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Leave an address as it is."""
        if isinstance(value, str) and "://" in value:
            return value
        return super().convert(value, param, ctx)


def output_options(
    function: Callable[..., Any], remote: bool = False, default: str = "named by the settings, below ./fastcache-runs"
) -> Callable[..., Any]:
    """Add `--out` and `--fresh`; with `remote`, the output may be in a bucket."""
    fresh_help = "Start over: remove what an earlier run left in the output directory."
    function = click.option("--fresh", is_flag=True, help=fresh_help)(function)
    out_help = f"Output directory.  [default: {default}]"
    kind = AddressOrPath(path_type=Path) if remote else click.Path(path_type=Path)
    return click.option("--out", type=kind, metavar="DIR", help=out_help)(function)


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; raises `InputError` for anything else."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path} is neither YAML nor JSON: {str(error).splitlines()[0]}.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} should map option names to values, found {type(values).__name__}.")
    return values


def parse_yaml(text: str, where: str) -> Any:
    """The value that `text` is as YAML; raises `InputError` where it is none."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: the value is not YAML: {str(error).splitlines()[0]}.") from error


def resolve(cls: type[T], given: dict[str, Any]) -> T:
    """The settings `cls` from what click parsed; takes its own entries out of `given`."""
    values: dict[str, Any] = {}
    if config_file := given.pop("config_file"):
        values |= {str(key).replace("-", "_"): value for key, value in read_config(config_file).items()}
    for assignment in given.pop("set_"):
        key, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"--set {assignment}: expected KEY=VALUE, for example --set seed=7.")
        values[key.strip().replace("-", "_")] = parse_yaml(text, f"--set {assignment}")
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        value = given.pop(field.name)
        if value is not None and value != ():
            values[field.name] = list(value) if isinstance(value, tuple) else value
    return from_mapping(cls, values, "options")
