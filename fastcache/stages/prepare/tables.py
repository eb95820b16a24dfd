"""Batches of Arrow rows: what nobody reads of them is left out, what is read becomes plain Python."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fastcache.stages.prepare.schema import known_columns
from fastcache.stages.prepare.spellings import CHAT_COLUMNS, OTHER_CHAT_COLUMNS, TURN_FIELDS, plain_name, plain_names

_CHAT_NAMES = plain_names(*CHAT_COLUMNS, *OTHER_CHAT_COLUMNS)


def _presence(column: pa.Array) -> pa.Array:
    """True where a column holds something, null elsewhere."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        holds = pc.greater(pc.binary_length(column), 0)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        holds = pc.greater(pc.list_value_length(column), 0)
    else:
        holds = column.is_valid()
    return pc.if_else(pc.fill_null(holds, False), pa.scalar(True), pa.scalar(None, pa.bool_()))


def pruned(batch: pa.RecordBatch, column: str | None) -> pa.RecordBatch:
    """The batch in which columns that no dialogue is made of say only whether they hold something."""
    known = known_columns(batch.schema.names, column)
    columns = [
        values if name in known else _presence(values)
        for name, values in zip(batch.schema.names, batch.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _holds_objects(name: str, kind: pa.DataType) -> bool:
    """Whether a column may hold objects below its turns, or maps, which `_plain` is for."""
    text = str(kind)
    if "map<" in text or plain_name(name) not in _CHAT_NAMES:
        return "map<" in text or "struct<" in text
    while not pa.types.is_struct(kind) and getattr(kind, "value_type", None) is not None:
        kind = kind.value_type
    if not pa.types.is_struct(kind):
        return False
    turn = [kind.field(number) for number in range(kind.num_fields)]
    return any("struct<" in str(field.type) for field in turn if plain_name(field.name) in TURN_FIELDS)


def _plain(value: Any) -> Any:
    """Objects without the fields that are null: in Arrow all rows have the fields that any row has. Maps become objects."""
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list) and value and all(isinstance(entry, tuple) for entry in value):
        return {str(name): _plain(entry) for name, entry in value if entry is not None}
    return [_plain(entry) for entry in value] if isinstance(value, list) else value


def python_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows of a batch."""
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        values = column.to_pylist()
        columns.append([_plain(value) for value in values] if _holds_objects(name, column.type) else values)
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]
