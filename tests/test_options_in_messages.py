"""Whatever option a message names can be typed: it is one of the command that prints it, or of a command that is named too."""

import ast
import re
from pathlib import Path

import click
import pytest

import fastcache
from fastcache.pipeline.cli import cli, main
from fastcache.pipeline.spelling import commands, spelled

ROOT = Path(fastcache.__file__).parent
OPTION = re.compile(r"(?<![\w/-])--[a-z][a-z0-9-]*")
OTHER = re.compile(r"`?fastcache ((?:interpret (?:judge|scores)|steer find|[a-z]+)\b)([^`.;,)\n]*)")
PREFIX = "--no-"
"""The prefix of a switch's second name, which the code assembles."""


def options_of(command):
    names = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    return {name for name in names if name.startswith("--")} | {"--help", "--version"}


OPTIONS = {name: options_of(command) for name, command in commands()}


def texts(node):
    """Strings in the code, with `f` strings as they read."""
    for each in ast.walk(node):
        if isinstance(each, ast.Constant) and isinstance(each.value, str):
            yield each.value
        if isinstance(each, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in each.values)


MESSAGES = sorted(
    {text for path in ROOT.rglob("*.py") for text in texts(ast.parse(path.read_text())) if OPTION.search(text)}
)


def context_of(name):
    root = click.Context(cli, info_name="fastcache")
    command, parent = None, root
    for word in name.split():
        command = (command or cli).get_command(parent, word)
        parent = click.Context(command, info_name=word, parent=parent)
    return parent


def test_there_are_messages_with_options():
    assert len(MESSAGES) > 150


def test_every_option_in_the_code_is_one_of_some_command():
    known = set().union(*OPTIONS.values())
    assert {option for text in MESSAGES for option in OPTION.findall(text)} - {PREFIX} <= known


def test_a_command_that_a_message_names_has_the_options_that_stand_behind_it():
    for text in MESSAGES:
        for name, rest in OTHER.findall(text):
            if name in OPTIONS:
                assert set(OPTION.findall(rest)) - {PREFIX} <= OPTIONS[name], text


@pytest.mark.parametrize("name", OPTIONS)
def test_every_message_names_options_that_the_running_command_takes(name):
    context = context_of(name)
    for text in MESSAGES:
        shown = re.sub(r"--[a-z0-9-]+ of `fastcache [a-z ]+`|`[^`]*`", "", spelled(text, context))
        shown = OTHER.sub("", shown)
        assert set(OPTION.findall(shown)) - {PREFIX} <= OPTIONS[name], (text, shown)


@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("train", "Try a lower --lr.", "Try a lower --lr."),
        ("sweep", "Try a lower --lr.", "Try a lower --set lr."),
        ("sweep", "Lower --pack-tokens.", "Lower --set extract.pack_tokens."),
        ("extract", "--source x: no file of this name.", "--corpus x: no file of this name."),
        (
            "evaluate",
            "Make one with `fastcache extract --split eval`.",
            "Make one with `fastcache extract --split eval`.",
        ),
        ("demo", "--force begins all the same.", "--force of `fastcache extract` begins all the same."),
        ("verify", "fastcache prepare --source x --fresh", "fastcache prepare --source x --fresh"),
    ],
)
def test_how_options_of_others_are_written(name, text, shown):
    assert spelled(text, context_of(name)) == shown


def test_extract_without_a_network_names_its_own_option(tiny_qwen, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_given: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(SystemExit) as left:
        main(["extract", "--model", str(tiny_qwen), "--layer", "1", "--corpus", "no/such-set"])
    said = " ".join(capsys.readouterr().err.split())
    assert left.value.code == 2
    assert "--corpus no/such-set: no file of this name" in said
    assert "for a local copy, say --corpus PATH." in said
    assert "--source" not in said
