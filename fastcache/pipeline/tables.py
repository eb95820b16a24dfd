"""Tables that are complete wherever they are printed: no figure, name or header is ever cut.

A file or a pipe gets every table as wide as it is. A terminal gets the first of these that fits:

1. the whole table, its headers broken between words;
2. the columns in several tables one below the other, each beginning with the columns that name a row;
3. a list for each row, with a line for each column.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastcache.pipeline.console import print_text

GAP = 2
"""Blank cells between columns."""
LEAST_TEXT = 24
"""Cells of a column of text, at least, before the table is taken apart."""

Cell = str | Text


@dataclass(frozen=True)
class Column:
    """A column: names say what a row is about, figures are never broken, text is broken between words where it must be."""

    title: str
    kind: Literal["name", "figure", "text"] = "figure"


def figure_columns(*titles: str) -> list[Column]:
    """Columns of figures."""
    return [Column(title) for title in titles]


def name_columns(*titles: str) -> list[Column]:
    """Columns that say what a row is about."""
    return [Column(title, "name") for title in titles]


def print_table(console: Console, columns: Sequence[Column], rows: Sequence[Sequence[Cell]], title: str = "") -> None:
    """Print rows of a cell for each column; cells are Text, or strings that are taken as they are."""
    if title:
        print_text(console, title)
    cells = [[_text(cell) for cell in row] for row in rows]
    natural = [_width(column, [row[i] for row in cells]) for i, column in enumerate(columns)]
    if not console.is_terminal:
        _print_columns(console, columns, cells, list(enumerate(natural)))
        return
    groups = _groups(columns, natural, console.width)
    if groups is None:
        _print_records(console, columns, cells)
        return
    for number, group in enumerate(groups):
        if number:
            console.print()
        _print_columns(console, columns, cells, group)


def print_facts(console: Console, title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Print names with their values, a line each; on a terminal, long values go on in the next line, indented."""
    print_text(console, title)
    label = max((cell_len(name) for name, _ in facts), default=0)
    room = console.width - label - GAP
    if console.is_terminal and room < LEAST_TEXT:
        for name, value in facts:
            print_text(console, f"{name}\n  {value}")
        return
    widest = max((cell_len(value) for _, value in facts), default=0)
    table = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
    table.add_column(width=label)
    width = min(room, widest) if console.is_terminal else widest
    table.add_column(width=width, overflow="fold")
    for name, value in facts:
        table.add_row(Text(name), Text(value))
    _print(console, table, label + GAP + width)


def _text(cell: Cell) -> Text:
    text = cell.copy() if isinstance(cell, Text) else Text(cell)
    text.expand_tabs(8)  # as wide as it will be
    return text


def _width(column: Column, cells: Sequence[Text]) -> int:
    """Of the longest line of the cells, and of the longest word of the title."""
    lines = [line for cell in cells for line in cell.plain.split("\n")]
    return max(map(cell_len, [*lines, *column.title.split()]), default=0)


def _least(column: Column, natural: int) -> int:
    """What the column needs at least."""
    if column.kind != "text":
        return natural
    return max(min(natural, LEAST_TEXT), *map(cell_len, column.title.split()))


Group = list[tuple[int, int]]
"""Numbers of columns, and their widths."""


def _groups(columns: Sequence[Column], natural: Sequence[int], width: int) -> list[Group] | None:
    """The columns in as few groups as fit into `width`, the names in each; None where a single one doesn't fit."""
    names = [(i, natural[i]) for i, column in enumerate(columns) if column.kind == "name"]
    taken = sum(n + GAP for _, n in names)
    groups: list[Group] = []
    room = -1
    for i, column in enumerate(columns):
        if column.kind == "name":
            continue
        least = _least(column, natural[i])
        if least > room:
            room = width - taken
            if least > room:
                return None
            groups.append(list(names))
        groups[-1].append((i, least))
        room -= least + GAP
    return [_widened(columns, natural, group, width) for group in groups or [names]]


def _widened(columns: Sequence[Column], natural: Sequence[int], group: Group, width: int) -> Group:
    """The group with what is left of the width given to its columns of text."""
    left = width - sum(n for _, n in group) - GAP * (len(group) - 1)
    result: Group = []
    for i, n in sorted(group):  # in the order of the columns
        more = min(left, natural[i] - n) if columns[i].kind == "text" else 0
        result.append((i, n + more))
        left -= more
    return result


def _print_columns(
    console: Console, columns: Sequence[Column], cells: Sequence[Sequence[Text]], group: Sequence[tuple[int, int]]
) -> None:
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    # Long text begins beside its figures; short headers stand just above theirs.
    vertical: Literal["top", "bottom"] = "top" if any(columns[i].kind == "text" for i, _ in group) else "bottom"
    for i, width in group:
        justify: Literal["left", "right"] = "right" if columns[i].kind == "figure" else "left"
        table.add_column(Text(columns[i].title), justify=justify, vertical=vertical, width=width, overflow="fold")
    for row in cells:
        table.add_row(*(row[i] for i, _ in group))
    _print(console, table, sum(width + GAP for _, width in group))


def _print_records(console: Console, columns: Sequence[Column], cells: Sequence[Sequence[Text]]) -> None:
    label = max(cell_len(column.title) for column in columns)
    for number, row in enumerate(cells):
        if number:
            console.print()
        for column, cell in zip(columns, row, strict=True):
            longest = max(map(cell_len, cell.plain.split("\n")))
            beside = label + GAP + longest <= console.width or column.kind == "text"
            if beside and console.width - label - GAP >= min(longest, LEAST_TEXT):
                line = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
                line.add_column(width=label)
                line.add_column(width=min(longest, console.width - label - GAP), overflow="fold")
                line.add_row(Text(column.title), cell)
                console.print(line)
            else:
                print_text(console, column.title)
                console.print(Text("  ") + cell, soft_wrap=True)


def _print(console: Console, table: Table, width: int) -> None:
    """Print a table that needs so many cells, whatever the console says that it has."""
    before = console.width
    if width <= before:
        console.print(table)
        return
    console.width = width
    try:
        console.print(table)
    finally:
        console.width = before
