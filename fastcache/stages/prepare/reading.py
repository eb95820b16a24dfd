"""Rows from files and from the hub by blocks, which are cut without looking into the rows: a worker takes them apart.

Where blocks end depends on the input alone.
"""

import logging
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from fastcache.errors import InputError
from fastcache.files import check_depth
from fastcache.stages.prepare.blocks import Block, Lines, Malformed, Parsed, Row, Table
from fastcache.stages.prepare.formats import Format, find_format, open_file, open_mapped
from fastcache.stages.prepare.json_rows import Refused, parse, to_row
from fastcache.stages.prepare.schema import known_columns
from fastcache.stages.prepare.sources import SUFFIXES, Source, files_below, inner_suffix, no_hub
from fastcache.stages.prepare.tables import pruned
from fastcache.stages.prepare.tree_tables import dialogues_of_table, is_message_of_tree

BLOCK_BYTES = 1 << 18
BLOCK_ROWS = 1024


def read_source(source: Source, split: str, column: str | None) -> Iterator[Block]:
    """The rows of a source, in order; `column` is the one to read. Raises `InputError` if it can't be read.

    Of a table of OpenAssistant's messages, the rows are its trees.
    """
    path = Path(source.place)
    if path.is_dir():
        return _read_folder(path, source.name, column)
    if path.is_file():
        return _assembled(_read_file(path, column), str(path), column)
    return _assembled(_by_blocks(_read_hub(source, split)), source.name, column)


def _assembled(blocks: Iterator[Block], path: str, column: str | None) -> Iterator[Block]:
    """The blocks, or dialogues in their stead where they are of a table of messages."""
    first = next((block for block in blocks if block.n_rows), None)  # blank lines alone are no rows
    if first is None:
        return
    blocks = chain([first], blocks)
    if column is None and is_message_of_tree(next(first.head(1).rows())):
        yield from _by_blocks(dialogues_of_table((row for block in blocks for row in block.rows()), path), path)
    else:
        yield from blocks


def _read_folder(folder: Path, name: str, column: str | None) -> Iterator[Block]:
    paths = files_below(folder)
    if not paths:
        raise InputError(f"--source {name}: the folder {folder} holds no {', '.join(SUFFIXES)} file.")
    for path in paths:
        yield from _assembled(_read_file(path, column), str(path), column)


def _read_file(path: Path, column: str | None) -> Iterator[Block]:
    found = find_format(path)
    if found.kind == "jsonl":
        return _read_jsonl(path, found.compression)
    if found.kind == "json":
        return _read_json(path, found.compression)
    if found.kind == "parquet":
        return _read_parquet(path, found.compression, column)
    return _read_arrow(path, found, column)


def _read_jsonl(path: Path, compression: str | None) -> Iterator[Block]:
    n_lines = offset = 0
    try:
        with open_file(path, compression) as file:
            tail: list[bytes] = []  # of a line that goes on
            while data := file.read(BLOCK_BYTES):
                lines = data.split(b"\n")
                tail.append(lines[0])
                if len(lines) > 1:
                    lines[0] = b"".join(tail)
                    tail = [lines.pop()]
                    block = Lines.of(lines, str(path), n_lines + 1, None if compression else offset)
                    yield block
                    n_lines += len(lines)
                    offset += block.n_bytes
            if (line := b"".join(tail)).strip():
                yield Lines.of([line], str(path), n_lines + 1, None if compression else offset)
    except OSError as error:
        raise InputError(
            f"{path} breaks off or is damaged after line {n_lines} ({error}). Fetch it again, or unpack what can be saved."
        ) from error


def _read_json(path: Path, compression: str | None) -> Iterator[Block]:
    """The rows of an array; of a file that isn't named so, and is none after all, the lines."""
    try:
        with open_file(path, compression) as file:
            values, may_repeat = parse(file.read())
    except (Refused, OSError) as error:
        if isinstance(error, Refused) and inner_suffix(path) != ".json":
            return _read_jsonl(path, compression)
        raise InputError(f"{path} is {error}: expected an array of rows, or one row a line.") from error
    if not isinstance(values, list):
        raise InputError(f"{path} should hold a JSON array of rows, found {type(values).__name__}.")
    return _by_blocks(
        (_row_of(value, may_repeat, f"{path}[{number}]") for number, value in enumerate(values)), str(path)
    )


def _row_of(value: Any, may_repeat: bool, place: str) -> Row | Malformed:
    try:
        row = to_row(value, may_repeat)
        check_depth(row)  # so that it can be sent to another process
    except Refused as refusal:
        return Malformed(str(refusal), place)
    except ValueError:
        return Malformed("nested too deeply", place)
    return row


def _read_parquet(path: Path, compression: str | None, column: str | None) -> Iterator[Block]:
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(open_mapped(path, compression))
        _check_names(path, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=BLOCK_ROWS, columns=_leaves(file, column)):
            yield Table.of(pruned(batch, column), str(path))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file: {error}.") from error


def _leaves(file: Any, column: str | None) -> list[str]:
    """Columns to read: of one that no dialogue is made of, a single leaf tells whether it holds something."""
    names = file.schema_arrow.names
    known = known_columns(names, column)
    leaves: dict[str, str] = {}
    for number in range(len(file.schema)):
        path = file.schema.column(number).path
        leaves.setdefault(path.partition(".")[0], path)
    return [name if name in known or "." in name else leaves.get(name, name) for name in names]


def _read_arrow(path: Path, found: Format, column: str | None) -> Iterator[Block]:
    """An Arrow stream, such as `datasets` keeps a data set in, or an Arrow file, such as Feather."""
    try:
        if found.kind == "arrow file":
            with pa.ipc.open_file(open_mapped(path, found.compression)) as file:
                _check_names(path, file.schema.names)
                for number in range(file.num_record_batches):
                    yield from _tables(file.get_batch(number), path, column)
        else:
            with open_file(path, found.compression) as file, pa.ipc.open_stream(file) as batches:
                _check_names(path, batches.schema.names)
                for batch in batches:
                    yield from _tables(batch, path, column)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable {found.kind.capitalize()}: {error}.") from error


def _tables(batch: pa.RecordBatch, path: Path, column: str | None) -> Iterator[Table]:
    for start in range(0, batch.num_rows, BLOCK_ROWS):
        yield Table.of(pruned(batch.slice(start, BLOCK_ROWS), column), str(path))


def _check_names(path: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InputError(f"{path} has several columns of one name: {', '.join(twice)}. Rename them first.")


def _read_hub(source: Source, split: str) -> Iterator[Row]:
    from datasets import load_dataset

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are not the user's business
    try:
        yield from load_dataset(source.place, source.config, split=split, streaming=True, revision=source.revision)
    except Exception as error:  # datasets raises many kinds, from many libraries
        raise no_hub(source, error) from error


def _text_size(value: Any) -> int:
    """About the bytes of text in a row."""
    if isinstance(value, str):
        return len(value)
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(_text_size, children))


def _by_blocks(rows: Iterable[Row | Malformed], path: str = "") -> Iterator[Block]:
    block: list[Row | Malformed] = []
    size = 0
    for row in rows:
        block.append(row)
        size += _text_size(row)
        if len(block) >= BLOCK_ROWS or size >= BLOCK_BYTES:
            yield Parsed(len(block), size, path, block)
            block, size = [], 0
    if block:
        yield Parsed(len(block), size, path, block)
