"""What is printed is all there: on terminals of every width, in files, with figures of every size."""

import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from fastcache.pipeline import console as screen
from fastcache.pipeline.tables import Column, FullTable, figure_columns, name_columns, print_facts, print_table

WIDTHS = (40, 80, 120)


def terminal(width):
    return Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None, legacy_windows=False)


def a_file(width=80):
    return Console(file=io.StringIO(), force_terminal=False, width=width)


def printed(console):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


words = st.text("abcdefghij", min_size=1, max_size=12)
numbers = st.one_of(
    st.integers(0, 10**12).map("{:,}".format),
    st.floats(1e-5, 1e9).map("{:,.4f}".format),
    st.just("-"),
    st.just("12.3 %"),
)


@st.composite
def tables(draw):
    n_figures, n_rows = draw(st.integers(1, 14)), draw(st.integers(1, 9))
    titles = st.lists(st.lists(words, min_size=1, max_size=4).map(" ".join), min_size=n_figures, max_size=n_figures)
    columns = [
        *name_columns(*draw(st.lists(words, min_size=1, max_size=3))),
        *figure_columns(*draw(titles)),
    ]
    return columns, [[draw(words if column.kind == "name" else numbers) for column in columns] for _ in range(n_rows)]


@settings(deadline=None, max_examples=60)
@given(tables(), st.sampled_from(WIDTHS))
def test_every_cell_and_every_word_of_a_header_stands_whole_on_a_terminal(table, width):
    columns, rows = table
    console = terminal(width)
    print_table(console, FullTable(columns, rows))
    shown = printed(console)
    tokens = re.split(r"\s+", shown)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= width
    for word in [word for column in columns for word in column.title.split()] + [
        word for row in rows for cell in row for word in cell.split()
    ]:
        assert word in tokens


@settings(deadline=None, max_examples=30)
@given(tables())
def test_a_file_gets_one_table_with_a_line_for_each_row(table):
    columns, rows = table
    console = a_file()
    print_table(console, FullTable(columns, rows))
    lines = printed(console).splitlines()
    for row, line in zip(rows, lines[-len(rows) :], strict=True):
        assert line.split() == " ".join(row).split()


@pytest.mark.parametrize("width", WIDTHS)
def test_each_part_of_a_table_says_which_row_is_which(width):
    columns = [*name_columns("tokens"), *figure_columns(*(f"column{i}" for i in range(12)))]
    console = terminal(width)
    print_table(console, FullTable(columns, [["content", *["1,234,567"] * 12], ["special", *["89,997.12"] * 12]]))
    lines = [line.split() for line in printed(console).splitlines() if line.strip()]
    assert all(line[0] in ("tokens", "content", "special") for line in lines)
    assert sum(line.count("89,997.12") for line in lines) == 12


@pytest.mark.parametrize("width", WIDTHS)
def test_text_is_broken_between_words_and_keeps_its_style(width):
    console = terminal(width)
    context = Text("the quick brown fox jumps over the lazy dog and away")
    print_table(console, FullTable([*figure_columns("latent"), Column("context", "text")], [["7", context]]))
    assert printed(console).split() == ["latent", "context", "7", *context.plain.split()]


@pytest.mark.parametrize("width", [20, *WIDTHS])
def test_facts_are_whole(width):
    console = terminal(width)
    facts = [("settings", "learning_rate 0.0002, seed 42, cache /a/b"), ("parity resid_post.18", "1.0e-05")]
    print_facts(console, "SAE x", facts)
    assert sorted(printed(console).split()) == sorted(f"SAE x {' '.join(' '.join(fact) for fact in facts)}".split())


@given(st.text("ab \n", max_size=200), st.integers(5, 60))
def test_wrapped_text_has_the_same_words_and_no_longer_lines(text, width):
    lines = screen.wrapped(text, width).split("\n")
    assert " ".join(lines).split() == text.split()
    assert all(len(line) <= width or " " not in line.strip() for line in lines)


def test_a_message_in_a_file_is_one_line():
    console = a_file()
    screen.RichProgress(console).say("word " * 60)
    assert printed(console).count("\n") == 1
