"""The quick way through prepare, by blocks and columns, against the plain way: a row at a time, by Python's own parser."""

import json
import pickle

import pytest
from corpora import dialogue, run, write
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcache.corpus import present
from fastcache.errors import InputError
from fastcache.stages.prepare import reading
from fastcache.stages.prepare.blocks import Lines, Malformed
from fastcache.stages.prepare.columns import CleanRows, Columns
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.fields import Unusable
from fastcache.stages.prepare.reading import read_source
from fastcache.stages.prepare.schema import usable
from fastcache.stages.prepare.sources import Source

texts = st.sampled_from(["", " ", "\u2003", "hi", " hi ", "h\u00fc", "\x00", "\ud800", "[{", "\U0001f600"]) | st.text(
    max_size=5
)
odd = st.none() | st.integers(-2, 2) | st.binary(max_size=2) | st.lists(st.integers(), max_size=1)
roles = st.sampled_from(["user", "assistant", "system", "tool", "gpt", "human", " User ", "wizard", ""])
call = {"id": "1", "function": {"name": "f", "arguments": {"x": 1}}, "index": 0}
turns = (
    st.fixed_dictionaries({"role": roles | odd, "content": texts | odd})
    | st.fixed_dictionaries(
        {"role": st.sampled_from(["assistant", "tool", "user"])},
        optional={
            "content": texts | st.just([{"type": "text", "text": "x"}]),
            "tool_calls": st.sampled_from([[call], [], "x", json.dumps([call])]),
            "reasoning_content": texts,
            "tool_call_id": texts,
            "name": texts,
            "weight": odd,
            "tools": st.sampled_from([[{"name": "f"}], "x"]),
        },
    )
    | st.fixed_dictionaries({"from": roles, "value": texts})
    | st.dictionaries(st.sampled_from(["role", "from", "content", "value", "weight"]), roles | texts | odd)
    | odd
    | texts
)
good_turns = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": texts})
values = st.lists(good_turns, max_size=4) | st.lists(turns, max_size=3) | texts | odd
columns_known = [
    "messages",
    "conversations",
    "text",
    "prompt",
    "response",
    "x",
    "Messages",
    "system",
    "tools",
    "history",
]
rows = st.dictionaries(st.sampled_from(columns_known), values)


def cleaned_plainly(row, column, alternating, max_turn_chars):
    try:
        found = {"reason": None, **usable(row, column, alternating, max_turn_chars)}
        return found | {"kept": sorted(found["kept"]), "not_kept": sorted(found["not_kept"])}
    except Unusable as verdict:
        nothing = {"messages": None, "text": None, "tools": None, "kept": [], "not_kept": []}
        return {"reason": str(verdict), **nothing}


def as_plain(row):
    """A staged row as `cleaned_plainly` has it."""
    kept, not_kept = json.loads(row["fields"])
    messages = None if row["messages"] is None else [present(message) for message in row["messages"]]
    same = {name: row[name] for name in ("reason", "text", "tools")}
    return {**same, "messages": messages, "kept": kept, "not_kept": not_kept}


@settings(max_examples=500, deadline=None)
@given(
    rows=st.lists(rows, min_size=1, max_size=8), column=st.sampled_from([None, None, "x", "text"]),
    alternating=st.booleans(), max_turn_chars=st.sampled_from([0, 0, 3]),
)  # fmt: skip
def test_rows_become_the_same_by_columns_and_one_by_one(rows, column, alternating, max_turn_chars):
    columns = Columns()
    config = PrepareConfig(alternating=alternating, max_turn_chars=max_turn_chars)
    columns.add(rows[:3], "a", 5, column, config)
    columns.add(rows[3:], "b", 0, column, config)
    table = CleanRows(columns).table()
    table.validate(full=True)
    found = table.to_pylist()
    assert [row["source"] for row in found] == ["a"] * len(rows[:3]) + ["b"] * len(rows[3:])
    assert [row["source_row"] for row in found] == [*range(5, 5 + len(rows[:3])), *range(len(rows[3:]))]
    plain = [cleaned_plainly(row, column, alternating, max_turn_chars) for row in rows]
    assert [as_plain(row) for row in found] == plain
    said = [json.dumps([one["messages"], one["text"], one["tools"]]) for one in plain]
    wholes = [(row["whole"], one) for row, one in zip(found, said, strict=True) if not row["reason"]]
    assert len({whole for whole, _ in wholes}) == len({one for _, one in wholes}) == len(set(wholes))


json_lines = st.sampled_from(
    [
        b'{"a": NaN}', b'{"a": "\\ud800"}', b'\xef\xbb\xbf{"a": 1}', b'{"a": "\xff"}', b'{"a": 1e999}', b"[1]", b"1",
        b'{"a": 1} {"a": 2}', b'{"a": 1, "a": 2}', b"{", b"", b" ", b"\r", b"\t ", b"\x0c", b'{"a": "\x01"}', b"null",
        b'{"a": {"b": 1, "b": 1}}', b'{"a\\\\": 1, "a": "\\":"}', b'{"a": "\\\\":1}', b'{"a" : [{"a":1},{"a":2}]}',
        b'{"a": 123456789012345678901234567890}', b' {"a": 1}\r', b'{"a": -0.0}', b"[" * 2000, b"\x00", b'{"a": 01}',
    ]
)  # fmt: skip


def unique(pairs):
    if len(dict(pairs)) < len(pairs):
        raise KeyError
    return dict(pairs)


def shown(rows):
    """Text that is equal for equal rows, also with NaN; numbers as floats: no row's fate hangs on how large one is."""
    return [
        repr(row if isinstance(row, Malformed) else {k: float(v) if isinstance(v, int) else v for k, v in row.items()})
        for row in rows
    ]


@settings(max_examples=300, deadline=None)
@given(
    lines=st.lists(json_lines | st.binary(max_size=6).map(lambda line: line.replace(b"\n", b"")), max_size=12),
    end=st.sampled_from([b"", b"\n", b"\n\n"]), block=st.integers(1, 60), n_head=st.integers(1, 5),
)  # fmt: skip
def test_blocks_of_lines_hold_the_rows_that_python_reads(lines, end, block, n_head, tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    lines = [b'{"first": "line"}', *lines]  # by which a file is known for what it is
    path.write_bytes(b"\n".join(lines) + end)
    expected = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=unique)
            except RecursionError:
                row = Malformed("nested too deeply", f"{path}:{number}")
            except KeyError:
                row = Malformed("a key twice in an object", f"{path}:{number}")
            except ValueError:
                row = Malformed("not JSON", f"{path}:{number}")
            malformed = Malformed("not an object", f"{path}:{number}")
            expected.append(row if isinstance(row, dict | Malformed) else malformed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "BLOCK_BYTES", block)
        blocks = list(read_source(Source("x", str(path)), "train", None))
    sent = [pickle.loads(pickle.dumps(one)) for one in blocks]
    found = [list(one.rows()) for one in blocks]
    assert [shown(one.rows()) for one in sent] == [shown(rows) for rows in found]
    assert shown(row for rows in found for row in rows) == shown(expected)
    assert [one.n_rows for one in blocks] == [len(rows) for rows in found]
    whole = Lines.of(path.read_bytes().split(b"\n"), str(path), 1, 0)
    if n_head <= whole.n_rows:
        for head in (whole.head(n_head), pickle.loads(pickle.dumps(whole.head(n_head)))):
            assert shown(head.rows()) == shown(expected[:n_head])


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("max_rows", [1, 7, 20, 99])
def test_no_more_rows_are_read_than_asked_for(tmp_path, monkeypatch, suffix, max_rows):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 300)
    rows = [dialogue(f"q{i}", "a") for i in range(20)]
    paths = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for path in paths:
        write(path, rows) if suffix == "jsonl" else path.write_text(json.dumps(rows))
    info, kept = run(tmp_path / "out", *map(str, paths), max_rows=max_rows, exact=False)
    assert [counts["rows"] for counts in info["counts"].values()] == [min(max_rows, 20)] * 2
    assert sorted(int(row.messages[0]["content"][1:]) for row in kept) == sorted([*range(min(max_rows, 20))] * 2)


def test_strict_names_the_line_or_the_row(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK_BYTES", 300)
    rows = [dialogue(f"q{i}", "a") for i in range(20)]
    path = write(tmp_path / "rows.jsonl", [*rows, {"other": 1}])
    with pytest.raises(InputError, match=r"rows\.jsonl, row 20: no known column"):
        run(tmp_path / "out", path, strict=True)
    (tmp_path / "rows.jsonl").write_bytes(b"\n\n" + (tmp_path / "rows.jsonl").read_bytes().replace(b'{"other"', b"{"))
    with pytest.raises(InputError, match=r"rows\.jsonl:23: not JSON"):
        run(tmp_path / "out", path, strict=True)
