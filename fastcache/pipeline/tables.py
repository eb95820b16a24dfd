"""Tables that are complete wherever they are printed: no figure, name or header is ever cut.

A file or a pipe gets every table as wide as it is. A terminal gets the first of these that fits:

1. the whole table;
2. the whole table with its headers broken between words;
3. the columns in several tables one below the other, each beginning with the columns that name a row;
4. a list for each row, with a line for each column.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from fastcache.pipeline.console import wrapped

GAP = 2
"""Blank cells between columns."""
LEAST_TEXT = 24
"""Cells of a column of text, at least, before the table is taken apart."""

Cell = str | Text
Group = list[tuple[int, int]]
"""Numbers of columns, and their widths."""


@dataclass(frozen=True)
class Column:
    """A column: names say what a row is about, figures are never broken, text is broken between words where it must be."""

    title: str
    """With a line break where it may well be broken."""
    kind: Literal["name", "figure", "text"] = "figure"


def figure_columns(*titles: str) -> list[Column]:
    """Columns of figures."""
    return [Column(title) for title in titles]


def name_columns(*titles: str) -> list[Column]:
    """Columns that say what a row is about."""
    return [Column(title, "name") for title in titles]


@dataclass
class FullTable:
    """A table that rich draws in the layout that fits; cells are Text, or strings that are taken as they are."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    """A cell for each column."""
    title: str = ""

    def __post_init__(self) -> None:
        self._cells = [[_text(cell) for cell in row] for row in self.rows]
        cells = [_lines_width([row[i] for row in self._cells]) for i in range(len(self.columns))]
        titles = [_lines_width([Text(column.title)]) for column in self.columns]
        self._whole = [max(widths) for widths in zip(cells, titles, strict=True)]
        words = [max(map(cell_len, column.title.split()), default=0) for column in self.columns]
        self._narrow = [max(widths) for widths in zip(cells, words, strict=True)]

    @property
    def width(self) -> int:
        """The width of the whole table, in characters."""
        return _total(self._whole)

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        """What rich asks for."""
        if self.title:
            yield Text(wrapped(self.title, options.max_width), overflow="ignore", no_wrap=True)
        if self.width <= options.max_width:
            groups: list[Group] | None = [list(enumerate(self._whole))]
        else:
            groups = _groups(self.columns, self._narrow, options.max_width)
        for number, group in enumerate(groups or ()):
            yield from ([Text()] if number else [])
            yield self._table(group)
        if groups is None:
            for number, row in enumerate(self._cells):
                yield from ([Text()] if number else [])
                yield from _record(self.columns, row, options.max_width)

    def _table(self, group: Group) -> Table:
        """Some of the columns, by their numbers, so wide."""
        table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
        # Long text begins beside its figures; short headers stand just above theirs.
        vertical: Literal["top", "bottom"] = (
            "top" if any(self.columns[i].kind == "text" for i, _ in group) else "bottom"
        )
        for i, width in group:
            title, kind = Text(self.columns[i].title), self.columns[i].kind
            justify: Literal["left", "right"] = "right" if kind == "figure" else "left"
            table.add_column(title, justify=justify, vertical=vertical, width=width, overflow="fold")
        for row in self._cells:
            table.add_row(*(row[i] for i, _ in group))
        return table


def print_table(console: Console, table: FullTable) -> None:
    """Print a table as wide as it is into a file, and in the layout that fits on a terminal."""
    _print(console, table, 0 if console.is_terminal else max(table.width, cell_len(table.title)))


def print_facts(console: Console, title: str, facts: Sequence[tuple[str, str]]) -> None:
    """Print names with their values, a line each; on a terminal, long values go on in the next line, indented."""
    label = max((cell_len(name) for name, _ in facts), default=0)
    room = console.width - label - GAP
    lines = [title]
    for name, value in facts:
        if not console.is_terminal:
            lines.append(f"{name}{' ' * (label - cell_len(name) + GAP)}{value}")
        elif room < LEAST_TEXT:
            lines += [name, *(f"  {line}" for line in wrapped(value, console.width - 2).split("\n"))]
        else:
            first, *rest = wrapped(value, room).split("\n")
            lines.append(f"{name}{' ' * (label - cell_len(name) + GAP)}{first}")
            lines += [" " * (label + GAP) + line for line in rest]
    console.print(Text("\n".join(lines)), soft_wrap=True)


def _text(cell: Cell) -> Text:
    text = cell.copy() if isinstance(cell, Text) else Text(cell)
    text.expand_tabs(8)  # as wide as it will be
    return text


def _lines_width(cells: Sequence[Text]) -> int:
    """The width of the longest line in the cells."""
    return max((cell_len(line) for cell in cells for line in cell.plain.split("\n")), default=0)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _least(column: Column, natural: int) -> int:
    """What the column needs at least."""
    if column.kind != "text":
        return natural
    return max(min(natural, LEAST_TEXT), *map(cell_len, column.title.split()))


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


def _record(columns: Sequence[Column], cells: Sequence[Text], width: int) -> Iterator[RenderableType]:
    """A line for each column of a row; or two, where title and figure don't fit into one."""
    titles = [" ".join(column.title.split()) for column in columns]
    label = max(map(cell_len, titles))
    room = width - label - GAP
    for column, title, cell in zip(columns, titles, cells, strict=True):
        longest = _lines_width([cell])
        if room >= (min(longest, LEAST_TEXT) if column.kind == "text" else longest):
            line = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
            line.add_column(width=label)
            line.add_column(width=min(longest, room), overflow="fold")
            line.add_row(Text(title), cell)
            yield line
        else:
            yield Text(wrapped(title, width))
            below = Text("  ") + cell
            below.overflow, below.no_wrap = "ignore", column.kind != "text"
            yield below


def _print(console: Console, content: RenderableType, width: int) -> None:
    """Print what needs so many cells, whatever the console says that it has."""
    before = console.width
    if width <= before:
        console.print(content, crop=False)
        return
    console.width = width
    try:
        console.print(content)
    finally:
        console.width = before
