"""The format of a file follows from its contents; a file that is not what it says is an error; hostile rows are counted."""

import gzip
import json

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from corpora import dialogue, run, write

from fastcache.corpus import Corpus
from fastcache.errors import InputError
from fastcache.progress import Silent
from fastcache.stages.prepare.config import PrepareConfig
from fastcache.stages.prepare.formats import find_format
from fastcache.stages.prepare.reading import read_source
from fastcache.stages.prepare.run import prepare
from fastcache.stages.prepare.sources import Source

ROWS = [dialogue(f"q{i}", f"a{i}") for i in range(30)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def contents(path):
    return [row for block in read_source(Source("x", str(path)), "train", None) for row in block.rows()]


def written(folder, kind):
    path, table = folder / f"rows.{kind}", pa.Table.from_pylist(ROWS)
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "feather":
        feather.write_feather(table, path, compression="lz4")
    elif kind == "stream":
        with pa.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table)
    else:
        path.write_bytes(
            {"lines": TEXT, "array": json.dumps(ROWS).encode(), "pretty": json.dumps(ROWS, indent=1).encode()}[kind]
        )
    return path


@pytest.mark.parametrize("named", ["jsonl", "json", "parquet", "arrow", "jsonl.gz"])
def test_the_name_of_a_file_does_not_matter(tmp_path, named):
    for kind in ("lines", "array", "pretty", "parquet", "feather", "stream"):
        if kind in ("array", "pretty") and named in ("parquet", "arrow"):
            continue  # a text file may begin with a bracket for other reasons
        path = written(tmp_path, kind).rename(tmp_path / f"{kind}.{named}")
        assert contents(path) == ROWS, kind


def test_packed_files_are_read_whatever_they_are_called_and_hold(tmp_path):
    for kind in ("lines", "array", "parquet", "feather", "stream"):
        path = written(tmp_path, kind)
        path.write_bytes(gzip.compress(path.read_bytes()))
        assert contents(path.rename(tmp_path / f"{kind}.jsonl")) == ROWS


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16le", "utf-16be", "utf-32"])
def test_text_that_is_no_utf_8_is_named_with_what_converts_it(tmp_path, encoding):
    (tmp_path / "rows.jsonl").write_bytes(TEXT.decode().encode(encoding))
    with pytest.raises(InputError, match=f"iconv -f {encoding.upper()} -t UTF-8"):
        run(tmp_path / "out", str(tmp_path / "rows.jsonl"))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    for name, text in (("a.jsonl", TEXT), ("b.jsonl", json.dumps(ROWS, indent=1).encode())):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text)
        assert contents(tmp_path / name) == ROWS


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"PK\x03\x04....", "zip archive"), (b"BZh91AY", "bzip2"), (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (b"SQLite format 3\0", "SQLite"),
        (b'{"a": 1}\n'[:5] + b"\n" + b"x\n" * 20, "isn't what it says"), (b"[\n" + b'{"a": 1},\n' * 20, "isn't what it says"),
        (b"PAR1" + b"x" * 100, "not a readable Parquet"), (b"ARROW1\0\0" + b"x" * 100, "not a readable Arrow file"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_a_data_set_is_an_error(tmp_path, data, said):
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(InputError, match=said):
        run(tmp_path / "out", write(tmp_path / "good.jsonl", ROWS), str(tmp_path / "rows.jsonl"))


def test_such_a_file_can_be_mended_and_prepared_in_the_same_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TEXT.replace(b"\n", b",\n"))
    with pytest.raises(InputError, match=r"30 of 30 rows can't be read .* rows\.jsonl:1|rows\.jsonl:1\."):
        run(tmp_path / "out", str(path))
    path.write_bytes(TEXT)
    assert len(run(tmp_path / "out", str(path))[1]) == 30


def test_one_file_of_a_folder_that_is_wrong_as_a_whole_is_named(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "a.jsonl", ROWS)
    (folder / "b.jsonl").write_bytes(TEXT.replace(b"\n", b",\n"))
    with pytest.raises(InputError, match=r"b\.jsonl isn't what it says"):
        run(tmp_path / "out", str(folder))


class Said(Silent):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def said_by(config, out):
    said = Said()
    prepare(config, out, said)
    return said.lines


def test_a_file_with_some_bad_lines_is_kept_and_the_first_of_each_reason_reported(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TEXT + b'\n{"messages": 1,}\n[1]\n{"a": 1, "a": 2}\n' + b'{"x": 1}\n' * 2)
    said = said_by(PrepareConfig(source=(str(path),)), tmp_path / "out")
    info = Corpus(tmp_path / "out").info
    assert info["counts"][str(path)]["dropped"] == {
        "not JSON": 1, "not an object": 1, "a key twice in an object": 1, "no known column": 2
    }  # fmt: skip
    assert info["first_unusable"][str(path)] == {
        "not JSON": f"{path}:32", "not an object": f"{path}:33", "a key twice in an object": f"{path}:34",
        "no known column": f"{path}:35",
    }  # fmt: skip
    assert f"Not usable: 2 rows of {path} (no known column), the first at {path}:35" in said


DEEP = b"[" * 5000 + b"]" * 5000


def calling(arguments):
    return b'{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": %b}]}]}' % arguments


def test_a_source_of_which_nearly_nothing_can_be_used_is_reported(tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ROWS[:2], *[{"chats": row["messages"]} for row in ROWS]])
    said = said_by(PrepareConfig(source=(path,)), tmp_path / "out")
    assert f"Not usable: 30 rows of {path} (no known column), the first at {path}:3" in said
    assert any(line.startswith(f"Nearly all rows of {path} can't be used: 30 of 32.") for line in said)


HOSTILE = {
    "deep": (b'{"messages": ' + DEEP + b"}", "nested too deeply"),
    "deep beside": (b'{"messages": [{"role": "user", "content": "x"}], "y": ' + DEEP + b"}", "nested too deeply"),
    "deep objects": (b'{"a":' * 900 + b"1" + b"}" * 900, "no known column"),
    "surrogate": (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "invalid Unicode"),
    "zeros": (b"\0" * 100, "not JSON"),
    "key twice": (b'{"messages": [{"role": "user", "content": "x", "content": "y"}]}', "a key twice in an object"),
    "NaN": (calling(b'{"x": NaN}'), "not a finite number"),
    "huge number": (calling(b"[1e999]"), "not a finite number"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_row_is_counted_with_its_reason(tmp_path, name):
    line, reason = HOSTILE[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(TEXT + line + b"\n")
    info, kept = run(tmp_path / "out", str(path))
    assert info["counts"][str(path)] == {"rows": 31, "kept": 30, "dropped": {reason: 1}}
    assert len(kept) == 30


def test_hostile_rows_of_an_array_are_counted_too(tmp_path):
    lines = [line for name, (line, _) in HOSTILE.items() if DEEP not in line and name != "zeros"]
    (tmp_path / "rows.json").write_bytes(b"[" + TEXT.replace(b"\n", b",") + b",".join(lines) + b"]")
    info, _ = run(tmp_path / "out", str(tmp_path / "rows.json"))
    assert info["counts"][str(tmp_path / "rows.json")]["dropped"] == {
        "nested too deeply": 1,  # what lies so deep can't be sent to another process
        "invalid Unicode": 1, "a key twice in an object": 1, "not a finite number": 2,
    }  # fmt: skip


def test_a_zero_character_and_a_very_long_line_are_text_as_any_other(tmp_path):
    rows = [*ROWS, dialogue("a\0b", "c"), dialogue("x" * 3_000_000, "y")]
    _, kept = run(tmp_path / "out", write(tmp_path / "rows.jsonl", rows))
    lengths = sorted(len(row.messages[0]["content"]) for row in kept)
    assert lengths[-1] == 3_000_000
    assert any(row.messages[0]["content"] == "a\0b" for row in kept)


def test_columns_of_one_name_are_an_error_that_names_them(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="several columns of one name: text"):
        run(tmp_path / "out", str(tmp_path / "rows.parquet"))


def test_columns_that_nobody_reads_are_counted_without_being_read(tmp_path):
    rows = [
        row
        | {
            "scores": [{"a": i, "b": "x" * 100}] if i % 2 else [],
            "label": "" if i % 3 else "l",
            "dotted.name": i or None,
        }
        for i, row in enumerate(ROWS)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines = write(tmp_path / "rows.jsonl", rows)
    expected = {"scores": 15, "label": 10, "dotted.name": 29}
    for path in (str(tmp_path / "rows.parquet"), lines):
        assert run(tmp_path / f"out-{path[-5:]}", path)[0]["fields"][path]["not_kept"] == expected


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (b'{"a": 1}', "jsonl"), (b"  \n[1]\n[2]\n", "jsonl"), (b'[{"a": 1}]', "json"), (b'[\n{"a": 1}\n]', "json"),
        (b'[{"role": "user"}]\n[{"role": "user"}]\n', "jsonl"), (b"[1]", "jsonl"), (b"", "jsonl"),
    ],
)  # fmt: skip
def test_json_lines_and_arrays_are_told_apart(tmp_path, text, kind):
    (tmp_path / "rows.jsonl").write_bytes(text)
    assert find_format(tmp_path / "rows.jsonl").kind == kind
