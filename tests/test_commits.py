"""Commits to disk: in which order every command writes, flushes, renames and logs; see `recorder.py` for the rules."""

import ast
import errno
import os
import re
from pathlib import Path

import pytest
import synthetic
from commands import COMMANDS
from conftest import tree_bytes
from disk_changes import Changes
from recorder import Recorder

import fastcache
from fastcache.cache_format.manifest import Manifest
from fastcache.cache_format.storage import LocalStorage
from fastcache.cache_format.writer import CacheWriter, PartSink
from fastcache.errors import InputError, SpaceError
from fastcache.files import append_to_log, atomic_file, keep_earlier, new_folder, write_bytes_atomic, write_named_file
from fastcache.rundir import output_directory

PACKAGE = Path(fastcache.__file__).parent


@pytest.mark.parametrize("name", [name for name in COMMANDS if "workers" not in name])
def test_what_a_command_writes_is_durable_before_anything_says_so(name, undisturbed):
    recorder = undisturbed(name).recorder
    assert recorder.faults == []
    assert any(kind == "rename" for kind, _ in recorder.changes)


def test_a_part_of_a_worker_is_durable_before_its_line_is_written(tmp_path):
    manifest = Manifest({"hook_points": [synthetic.HOOK], "d_in": 8, "dtype": "bfloat16"})
    with Recorder(tmp_path) as recorder, CacheWriter(tmp_path, manifest) as writer:
        with PartSink(LocalStorage(tmp_path), manifest) as sink:
            (instance,) = synthetic.instances_of(((5,),), 0)
            part = sink.part(0, [instance])
            part.append({synthetic.HOOK: synthetic.rows_of(0, 5, 8)})
            record = part.commit({"stored": 1, "truncated": [], "skipped": {}})
        writer.log_part(record)
    assert recorder.faults == []
    kinds = [change for change in recorder.changes if change[1] in ("parts", "parts/00000000", "parts.jsonl", ".")]
    assert kinds[-6:] == [
        ("rename", "parts/00000000"), ("flush", "parts"),
        ("open", "parts.jsonl"), ("write", "parts.jsonl"), ("flush", "parts.jsonl"), ("flush", "."),
    ]  # fmt: skip


def test_a_start_from_fresh_removes_first_what_says_that_all_is_there(tmp_path):
    out = tmp_path / "out"
    with output_directory(out, "prepare", {"n": 1}, ("done.json", "*.rows")):
        for name in ("a.rows", "b.rows", "done.json"):
            (out / name).write_text("")
    changes = []
    with (
        Changes(out, lambda kind, path, _: changes.append((kind, Path(path).name))),
        output_directory(out, "prepare", {"n": 2}, ("done.json", "*.rows"), fresh=True),
    ):
        pass
    changes = changes[changes.index(("remove", "done.json")) :]
    assert changes[:2] == [("remove", "done.json"), ("flush", "out")]
    assert sorted(changes[2:4]) == [("remove", "a.rows"), ("remove", "b.rows")]
    assert changes[4:6] == [("flush", "out"), ("open", ".run.json.tmp")]


# The writing functions themselves


def fail_at(monkeypatch, name, number=errno.ENOSPC):
    def fails(*_arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, fails)


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_log_that_can_not_grow_keeps_what_it_had(failing, tmp_path, monkeypatch):
    log = tmp_path / "log"
    append_to_log(log, b"first\n")
    whole_write = os.write

    def half(descriptor, data):
        if len(data) > 3:
            return whole_write(descriptor, data[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if failing == "write":
        monkeypatch.setattr(os, "write", half)
    else:
        fail_at(monkeypatch, "fsync")
    with pytest.raises(SpaceError, match=r"log could not be written: the disk is full \(No space left on device\)"):
        append_to_log(log, b"second\n")
    monkeypatch.undo()
    assert log.read_bytes() == b"first\n"
    append_to_log(log, b"third\n")
    append_to_log(log, b"2\n", size=6)
    assert log.read_bytes() == b"first\n2\n"


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_file_that_can_not_be_written_leaves_the_old_one(failing, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_bytes_atomic(path, b"old")
    fail_at(monkeypatch, failing)
    with pytest.raises(SpaceError, match="file could not be written"):
        write_bytes_atomic(path, b"new")
    monkeypatch.undo()
    assert tree_bytes(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_folder_that_can_not_be_written_leaves_nothing(failing, tmp_path, monkeypatch):
    fail_at(monkeypatch, failing)
    with pytest.raises(SpaceError, match="folder could not be written"), new_folder(tmp_path / "folder") as folder:
        (folder / "file").write_text("new")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_another_file_is_told_as_what_it_is(tmp_path):
    missing = tmp_path / "elsewhere/input"
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "file") as temporary:
        temporary.write_bytes(missing.read_bytes())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [write_named_file, keep_earlier])
def test_a_file_of_another_kind_is_never_replaced(write, tmp_path):
    path, table = tmp_path / "tool", b"token_id,token\n1,a\n"
    path.write_bytes(b"\x7fELF binary")
    with pytest.raises(InputError, match="tool is there already and is not a file of this kind"):
        write(path, table)
    with pytest.raises(InputError, match="not a file of this kind"):
        write(tmp_path, table)
    assert tree_bytes(tmp_path) == {"tool": b"\x7fELF binary"}
    path.write_bytes(b"")
    write(path, table)


def test_an_earlier_table_is_kept_beside_the_new_one(tmp_path):
    path = tmp_path / "found.csv"
    path.write_bytes(b"token_id,token\n1,a\n")
    kept = keep_earlier(path, b"token_id,token\n2,b\n")
    assert kept.read_bytes() == path.read_bytes() == b"token_id,token\n1,a\n"
    assert keep_earlier(path, path.read_bytes()) is None


# That there is nothing else

WRITERS = {
    "write_bytes", "write_text", "tofile", "touch", "rename", "renames", "mkdir", "makedirs", "fsync", "fdatasync",
    "truncate", "ftruncate", "symlink_to", "hardlink_to", "save_file", "savez", "shutil.move", "shutil.copy", "shutil.copyfile",
    "shutil.copytree", "shutil.copy2",
}  # fmt: skip
KNOWN = {
    ("cache_format/storage.py", "mkdir"),  # a workspace, which `publish_folder` makes durable
    ("stages/train/checkpoint.py", "save_file"),  # into a `new_folder`
    ("llm/vllm_backend/arena.py", "ftruncate"),  # shared memory
    ("llm/vllm_backend/arena.py", "os.open"),
    ("pipeline/output.py", "open"),  # standard output and standard error
    ("pipeline/output.py", "os.open"),
}


def writes(call):
    """The name by which a call writes to a disk, if it does."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if ast.unparse(call.func) == "os.open":
        return "os.open" if re.search("O_(WRONLY|RDWR|CREAT|APPEND)", ast.unparse(call)) else None
    if ast.unparse(call.func).startswith("shutil."):
        name = f"shutil.{name}"
    if name == "open":
        modes = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
        texts = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
        return "open" if any(set("wax+") & set(text) and len(text) < 4 for text in texts) else None
    if name == "replace":  # of a path: that of a text has two arguments, that of a data class has names
        is_path = isinstance(call.func, ast.Attribute) and len(call.args) == 1 and not call.keywords
        return name if is_path and ast.unparse(call.func) != "self._log.replace" else None
    return name if name in WRITERS and isinstance(call.func, ast.Attribute | ast.Name) else None


def test_nothing_else_writes_to_a_disk():
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        if path == PACKAGE / "files.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and (name := writes(node)):
                found.add((str(path.relative_to(PACKAGE)), name))
    assert found == KNOWN
