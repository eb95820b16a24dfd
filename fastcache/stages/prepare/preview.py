"""The first rows of every source as they are read, as the corpus would have them, and as a model would see them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from fastcache.corpus import CorpusRow
from fastcache.errors import InputError
from fastcache.llm.chat import ChatRenderer, Rendered
from fastcache.llm.loading import ModelSource, load_tokenizer, require_chat_template
from fastcache.stages.prepare.blocks import Block, Malformed, Row, Table
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.fields import Unusable
from fastcache.stages.prepare.reading import read_source
from fastcache.stages.prepare.schema import known_columns, usable
from fastcache.stages.prepare.sources import RECIPES, find_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


NOT_READ = "(not read)"


@dataclass(frozen=True)
class Preview:
    """A row, and what becomes of it."""

    place: str
    raw: Row | None
    """None for one that can't be read."""
    row: CorpusRow | None
    """None for one that can't be used."""
    kept: list[str]
    """Fields beside the dialogue that the corpus keeps."""
    not_kept: list[str]
    rendered: Rendered | None
    problem: str
    """Why it can't be used, or why the chat template refuses it; or nothing."""


def preview(config: PrepareConfig, n_rows: int) -> tuple[Iterator[Preview], "PreTrainedTokenizerBase | None"]:
    """The first `n_rows` of each source, and the tokenizer of `config.model`, if that is given, which renders dialogues.

    Raises `InputError` for sources that can't be read, `ModelError` for a model that has no chat template.
    """
    tokenizer, renderer = None, None
    if config.model:
        source = ModelSource(config.model)
        tokenizer = load_tokenizer(source)
        require_chat_template(tokenizer, source)
        renderer = ChatRenderer(tokenizer)
    return _previews(config, n_rows, renderer), tokenizer


def _previews(config: PrepareConfig, n_rows: int, renderer: ChatRenderer | None) -> Iterator[Preview]:
    for name in (*(RECIPES[config.recipe] if config.recipe else ()), *config.source):
        source = find_source(name)
        column = config.column or source.column
        blocks = read_source(source, config.split_name, column)
        rows = (row for block in blocks for row in _readable(block, column))
        for number, raw in enumerate(islice(rows, n_rows)):
            place = raw.place if isinstance(raw, Malformed) else f"{name}, row {number}"
            yield _preview(raw, place, number, column, config, renderer)


def _readable(block: Block, column: str | None) -> Iterator[Row | Malformed]:
    """The rows of a block; columns of tables that weren't read are said to be there."""
    for row in block.rows():
        if isinstance(block, Table) and isinstance(row, dict):
            known = known_columns(list(row), column)
            yield {name: value if name in known or value is None else NOT_READ for name, value in row.items()}
        else:
            yield row


def _preview(
    raw: Row | Malformed,
    place: str,
    number: int,
    column: str | None,
    config: PrepareConfig,
    renderer: ChatRenderer | None,
) -> Preview:
    if isinstance(raw, Malformed):
        return Preview(place, None, None, [], [], None, raw.reason)
    try:
        found = usable(raw, column, config.alternating, config.max_turn_chars)
    except Unusable as verdict:
        return Preview(place, raw, None, [], [], None, str(verdict))
    row = _as_row(found, number, place)
    rendered, problem = None, ""
    if renderer and row.messages is not None:
        try:
            rendered = renderer.render(row.messages, row.tools)
        except InputError as error:
            problem = str(error)
    return Preview(place, raw, row, sorted(found["kept"]), sorted(found["not_kept"]), rendered, problem)


def _as_row(found: dict[str, Any], number: int, source: str) -> CorpusRow:
    """What `usable` returns, as a corpus would give it."""
    messages = found["messages"] and [
        message | {"tool_calls": json.loads(message["tool_calls"])} if "tool_calls" in message else message
        for message in found["messages"]
    ]
    tools = None if found["tools"] is None else json.loads(found["tools"])
    return CorpusRow(number, source, messages, found["text"], tools)
