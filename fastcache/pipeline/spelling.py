"""Options in messages, as the command that prints them spells them.

Stages are run by several commands, and their messages name settings by the options of the stage's own command: `--lr` is an
option of `train`, which `sweep` takes by `--set lr=...`. Here such a name becomes what can be typed. What stands between
backquotes or behind `fastcache` is a command of its own, and stays as it is.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import click

from fastcache.errors import FastcacheError
from fastcache.stages.evaluate.config import EvaluateConfig
from fastcache.stages.extract.config import ExtractConfig
from fastcache.stages.train.config import TrainConfig

RENAMED: Mapping[tuple[str, str], str] = {
    ("extract", "--source"): "--corpus",  # which prepares a data set on the way
    ("evaluate", "--backend"): "--model-backend",
    ("prepare", "--tokens"): "--max-rows",
}
ANYWHERE = ("--help", "--version")

_OTHERS = re.compile(r"`[^`]*`|fastcache [a-z][^.;,)\n]*")
_OPTION = re.compile(r"(?<![\w/-])--[a-z][a-z0-9-]*")


def spelled(text: str, context: click.Context | None = None) -> str:
    """`text` with the options that the running command takes; it is left as it is where no command runs."""
    context = context or click.get_current_context(silent=True)
    if context is None or context.parent is None:
        return text
    command = context.command_path.partition(" ")[2]
    own = _options_of(context.command)
    pieces, end = [], 0
    for other in _OTHERS.finditer(text):
        pieces += [_spell(text[end : other.start()], command, own), other[0]]
        end = other.end()
    return "".join([*pieces, _spell(text[end:], command, own)])


def _spell(text: str, command: str, own: frozenset[str]) -> str:
    return _OPTION.sub(lambda found: found[0] if found[0] in own else _elsewhere(found[0], command), text)


def _elsewhere(option: str, command: str) -> str:
    """What can be typed for an option that the command doesn't have."""
    if renamed := RENAMED.get((command, option)):
        return renamed
    name = option[2:].replace("-", "_")
    if command == "sweep":  # of a cache, or of a study
        for section, names in _SETTINGS.items():
            if name in names:
                return f"--set {section}{name}"
    owners = _owners().get(option)
    return f"{option} of `fastcache {owners[0]}`" if owners else option


_SETTINGS = {
    "": frozenset(field.name for field in dataclasses.fields(TrainConfig)),
    "extract.": frozenset(field.name for field in dataclasses.fields(ExtractConfig)),
    "evaluate.": frozenset(field.name for field in dataclasses.fields(EvaluateConfig)),
}


def _options_of(command: click.Command) -> frozenset[str]:
    options = [param for param in command.params if isinstance(param, click.Option)]
    return frozenset(name for option in options for name in (*option.opts, *option.secondary_opts)) | {*ANYWHERE}


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command with its name, such as `interpret judge`, in the order in which they are used."""
    from fastcache.pipeline.cli import cli

    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        if command is not None:
            yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", below) for inner, below in command.commands.items())


@cache
def _owners() -> dict[str, list[str]]:
    """The commands that have an option."""
    owners: dict[str, list[str]] = {}
    for name, command in commands():
        for option in _options_of(command):
            owners.setdefault(option, []).append(name)
    return owners


@contextmanager
def spelling_errors(context: click.Context) -> Iterator[None]:
    """Have errors of the command name the options that it takes."""
    try:
        yield
    except FastcacheError as error:
        if context.parent is not None and not getattr(error, "is_spelled", False):
            error.args = (spelled(str(error), context),)
            error.is_spelled = True  # type: ignore[attr-defined]  # commands have commands below them
        raise
