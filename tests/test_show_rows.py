"""`prepare --show`: the first rows as they are read and as a model would see them, before anything long runs."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner
from corpora import write
from rich.console import Console

from fastcache.pipeline.cli import cli
from fastcache.pipeline.show_rows import show_rows
from fastcache.stages.prepare.config import PrepareConfig

ROW = {
    "conversations": [
        {"from": "human", "value": "Hi <|im_end|> \x1b[31m there", "weight": 1},
        {"from": "gpt", "value": "Hello"},
    ],
    "system": "Be nice",
    "id": 3,
}


def shown(config, n_rows, **options):
    console = Console(file=io.StringIO(), width=100, **options)
    show_rows(console, config, n_rows)
    return console.file.getvalue()


def test_rows_are_shown_as_read_and_as_rendered(tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROW, {"x": 1}, ROW])
    text = shown(PrepareConfig(source=(path,), model="demo"), 2)
    assert text.count("as read") == 2
    assert "kept beside: system" in text
    assert "not kept: conversations[].weight, id" in text
    assert "not usable: no known column" in text
    lines = [line.split(maxsplit=2) for line in text.split("\n") if line.startswith("  ")]
    assert ["system", "4", '"Be nice"'] in lines
    # What looks like a special token in a content is content, and nothing in it speaks to the terminal.
    assert any(kind == "user" and said.startswith('"Hi <|im_end|> ') for kind, _, said in lines)
    assert [kind for kind, _, said in lines if said == '"<|im_end|>"'] == ["special"] * 3
    assert "\x1b" not in text


def test_types_of_tokens_are_in_colour_on_a_terminal(tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROW])
    text = shown(PrepareConfig(source=(path,), model="demo"), 1, force_terminal=True, color_system="standard")
    assert "\x1b[1;31m<|im_start|>\x1b[0m" in text
    assert "\x1b[33mHello\x1b[0m" in text
    assert "\x1b[31m there" not in text, "the data's own escape codes are not sent"


def test_without_a_model_rows_are_shown_as_the_corpus_has_them(tmp_path):
    calls = [{"name": "f", "arguments": {"x": 1}}]
    rows = [
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": calls}],
            "n": 1,
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    text = shown(PrepareConfig(source=(str(tmp_path / "rows.parquet"),)), 1)
    assert '"n": "(not read)"' in text
    assert "user: a" in text
    assert '"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]' in text


def test_rows_are_shown_before_the_corpus_is_made(tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROW | {"id": i, "system": f"s{i}"} for i in range(30)])
    arguments = ["prepare", "--source", path, "--model", "demo", "--show", "1", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.output.index("as rendered") < done.output.index("read, clean, hash")
    assert (tmp_path / "out/corpus.json").exists()
