"""Inputs that an outside review found: what prepare lost, refused or misread."""

import io
import time

import pytest
from corpora import dialogue, run, write
from processes import kill, start, wait_for
from rich.console import Console

from fastcache.errors import InputError
from fastcache.pipeline.show import show_corpus


def test_a_system_column_comes_first(testdata, tmp_path):
    _, kept = run(tmp_path / "out", str(testdata / "faults/silent-loss-system-column/sharegpt_sys_col.jsonl"))
    assert len(kept) == 10
    for row in kept:
        number = row.messages[1]["content"].split()[1]
        assert row.messages[0] == {"role": "system", "content": f"You are pirate {number}."}


def test_history_comes_before_the_question(testdata, tmp_path):
    _, kept = run(tmp_path / "out", str(testdata / "faults/silent-loss-history/alpaca_history.jsonl"))
    assert len(kept) == 10
    for row in kept:
        number = row.messages[-1]["content"].rstrip(".")
        assert [m["content"] for m in row.messages] == ["Before", f"A{number}", "x", "y", f"Say {number}", f"{number}."]
        assert [m["role"] for m in row.messages] == ["user", "assistant"] * 3


def test_tools_and_their_calls_are_kept(testdata, tmp_path):
    path = str(testdata / "faults/silent-loss-tool-calls/toolcalls_with_text.jsonl")
    info, kept = run(tmp_path / "out", path)
    for row in kept:
        number = row.messages[0]["content"].split()[-1].rstrip("?")
        assert row.tools == [{"type": "function", "function": {"name": "lookup"}}]
        call = {"id": "a", "type": "function", "function": {"name": "lookup", "arguments": f'{{"n":{number}}}'}}
        assert row.messages[1] == {"role": "assistant", "content": f"Let me look up {number}.", "tool_calls": [call]}
        assert row.messages[2] == {"role": "tool", "content": f"item {number} is a stone", "tool_call_id": "a"}
    assert info["fields"][path] == {
        "kept": {"tools": 10, "messages[].tool_calls": 10, "messages[].tool_call_id": 10}, "not_kept": {},
    }  # fmt: skip


@pytest.mark.parametrize(("name", "content"), [("null_content_tool", None), ("empty_asst_tool", "")])
def test_a_turn_of_nothing_but_calls_is_kept(testdata, tmp_path, name, content):
    _, kept = run(tmp_path / "out", str(testdata / f"faults/null-content-tool-call/{name}.jsonl"))
    assert len(kept) == 10
    for row in kept:
        assert row.messages[1].get("content") == content
        assert len(row.messages[1]["tool_calls"]) == 1


def test_sharegpt_calls_are_the_assistants(testdata, tmp_path):
    _, kept = run(tmp_path / "out", str(testdata / "faults/sharegpt-function-call/sharegpt_roles.jsonl"))
    assert len(kept) == 10
    assert {tuple(m["role"] for m in row.messages) for row in kept} == {("user", "assistant", "tool", "assistant")}


@pytest.mark.parametrize(
    ("name", "n_rows"),
    [
        ("content-parts/parts.jsonl", 10), ("developer-role/developer.jsonl", 10),
        ("struct-of-lists-parquet/struct_of_lists.parquet", 50), ("arrow-file-format/feather.arrow", 50),
    ],
)  # fmt: skip
def test_other_spellings_of_a_dialogue_are_read(testdata, tmp_path, name, n_rows):
    info, kept = run(tmp_path / "out", str(testdata / "faults" / name))
    assert len(kept) == n_rows
    assert info["counts"][str(testdata / "faults" / name)]["dropped"] == {}
    roles = ["system"] * name.startswith("developer") + ["user", "assistant"]
    assert all(
        [m["role"] for m in row.messages] == roles and all(m["content"].strip() for m in row.messages) for row in kept
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [("trailing_comma", r"of 10 rows can't be read as JSON objects, the first at .*\.jsonl:1\."), ("utf16", "UTF-16")],
)
def test_a_file_that_is_wrong_as_a_whole_is_an_error(testdata, tmp_path, name, said):
    with pytest.raises(InputError, match=said):
        run(tmp_path / "out", str(testdata / f"faults/nearly-all-dropped-exit-0/{name}.jsonl"))
    assert not (tmp_path / "out/corpus.json").exists()


@pytest.mark.parametrize(
    "name", ["glaive_toolcall_en_demo.sharegpt.json", "alpaca_en_demo.alpaca.json", "llamafactory_v1_sft_demo.jsonl"]
)
def test_published_sets_lose_nothing_uncounted(testdata, tmp_path, name):
    path = str(testdata / "sft/raw_schema" / name)
    info, kept = run(tmp_path / "out", path, ngram=0)
    assert set(info["counts"][path]["dropped"]) <= {"exact duplicate"}
    found = info["fields"][path]
    if name.startswith("glaive"):
        assert found == {"kept": {"tools": len([r for r in kept if r.tools])}, "not_kept": {}}
        assert any("tool_calls" in message for row in kept for message in row.messages)
    else:
        expected = {"messages[].loss_weight": len(kept)} if name.startswith("llama") else {}
        assert found == {"kept": {}, "not_kept": expected}


def killed_before_its_page(path, out, mark):
    from fastcache.progress import Silent
    from fastcache.stages.prepare import run as module
    from fastcache.stages.prepare.config import PrepareConfig

    def stay(_out):
        mark.touch()
        time.sleep(600)

    module.write_page = stay
    module.prepare(PrepareConfig(source=(path,)), out, Silent())


def test_a_run_killed_before_its_page_writes_it_when_it_is_run_again(tmp_path):
    path = write(tmp_path / "rows.jsonl", [dialogue(f"q{i}", "a") for i in range(30)])
    process = start(killed_before_its_page, path, tmp_path / "out", tmp_path / "mark")
    wait_for((tmp_path / "mark").exists, process)
    kill(process)
    assert (tmp_path / "out/corpus.json").exists()
    assert not (tmp_path / "out/report.html").exists()
    before = (tmp_path / "out/corpus.json").read_bytes()
    run(tmp_path / "out", path)
    run(tmp_path / "whole", path)
    assert (tmp_path / "out/report.html").read_bytes() == (tmp_path / "whole/report.html").read_bytes()
    assert (tmp_path / "out/corpus.json").read_bytes() == before


def test_fields_are_on_the_page_and_on_the_screen(tmp_path):
    rows = [dialogue(f"q{i}", "a") | {"id": i, "system": "s", **{f"x{n}": 1 for n in range(20)}} for i in range(30)]
    path = write(tmp_path / "rows.jsonl", [*rows, {"none": 1}])
    info, _ = run(tmp_path / "out", path)
    assert info["fields"][path]["kept"] == {"system": 30}
    assert info["fields"][path]["not_kept"] == {"id": 30, **{f"x{n}": 30 for n in range(20)}}
    page = (tmp_path / "out/report.html").read_text()
    assert '<td class="name">system</td><td>30</td><td class="name">kept</td>' in page
    assert page.count('<td>30</td><td class="name">not kept</td>') == 21
    console = Console(file=io.StringIO(), width=80)
    show_corpus(console, tmp_path / "out", info)
    text = console.file.getvalue()
    assert "fields kept" in text
    assert "system 30" in text
    assert "id 30" in text
    assert "and 13 more" in text
