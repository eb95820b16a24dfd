"""What prepare reads: every container and schema, every bad row with its reason."""

import gzip
import json
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import dialogue, run, write
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcache.errors import InputError
from fastcache.stages.prepare.fields import Unusable
from fastcache.stages.prepare.schema import to_messages, usable
from fastcache.stages.prepare.sources import Source, estimate_rows

odd_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.text(max_size=8)
    | st.sampled_from(["user", "assistant", "\x00", " "]),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "messages", "text", "prompt"]), children, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(values=st.lists(odd_json | st.binary(max_size=20), min_size=1, max_size=6))
def test_any_rows_are_kept_or_counted(values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    lines = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]
    lines = [line.replace(b"\n", b"") for line in lines]
    (folder / "rows.jsonl").write_bytes(b"\n".join([json.dumps(dialogue("good", "one")).encode(), *lines]))
    try:
        info, kept = run(folder / "out", str(folder / "rows.jsonl"))
    except InputError as error:
        assert "two corpora" in str(error)  # noqa: PT017 - the only way in which good rows may be refused
        return
    counts = info["counts"][str(folder / "rows.jsonl")]
    assert counts["rows"] == 1 + sum(bool(line.strip()) for line in lines)
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["rows"]
    assert counts["kept"] == len(kept) >= 1


BAD_LINES = {
    b"{not json": "not JSON",
    b"[1]": "not an object",
    b'{"other": 1}': "no known column",
    b'{"messages": []}': "no turns",
    b'{"messages": [1]}': "turn is not an object",
    b'{"messages": [{"role": "user"}]}': "turn without content",
    b'{"messages": [{"content": "x"}]}': "turn without role",
    b'{"messages": [{"role": "wizard", "content": "x"}]}': "unknown role",
    b'{"messages": [{"role": "", "content": "x"}]}': "turn without role",
    b'{"messages": [{"role": "user", "content": " "}]}': "empty turn",
    b'{"messages": [{"role": "system", "content": "x"}]}': "system turns only",
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}': "invalid Unicode",
    b'{"text": "  "}': "empty text",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items())
def test_bad_rows_are_counted_with_their_reason(line, reason, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(dialogue("good", "one")).encode() + b"\n" + line + b"\n")
    info, kept = run(tmp_path / "out", str(path))
    assert info["counts"][str(path)] == {"rows": 2, "kept": 1, "dropped": {reason: 1}}
    assert kept[0].messages == dialogue("good", "one")["messages"]


@pytest.mark.parametrize("line", BAD_LINES)
def test_strict_stops_at_a_bad_row(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(dialogue("good", "one")).encode() + b"\n" + line + b"\n")
    with pytest.raises(InputError, match=r"strict"):
        run(tmp_path / "out", str(path), strict=True)


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_gz_is_an_error_that_names_the_place(tmp_path, damage):
    rng = random.Random(0)
    rows = [dialogue(f"{rng.random()} {rng.random()}", str(rng.random())) for _ in range(2000)]
    data = bytearray(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    if damage == "flipped":
        data[len(data) // 2] ^= 255
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    with pytest.raises(InputError, match=r"rows\.jsonl\.gz breaks off or is damaged after line"):
        run(tmp_path / "out", str(path))


def test_the_same_rows_in_any_container_give_the_same_dialogues(tmp_path):
    rows = [dialogue(f"q{i}", f"a{i}") for i in range(30)]
    table = pa.Table.from_pylist(rows)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text))
    with pa.output_stream(str(tmp_path / "c.jsonl.zst"), compression="zstd") as file:
        file.write(text)
    (tmp_path / "d.json").write_text(json.dumps(rows))
    pq.write_table(table, tmp_path / "e.parquet")
    with pa.ipc.new_stream(str(tmp_path / "f.arrow"), table.schema) as file:
        file.write_table(table)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/g.jsonl").write_bytes(text)
    found = []
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.json", "e.parquet", "f.arrow", "folder"):
        found.append([row.messages for row in run(tmp_path / f"out-{name}", str(tmp_path / name))[1]])
    assert all(one == found[0] for one in found)
    assert len(found[0]) == 30


@pytest.mark.parametrize("name", ["wildchat", "infinity-instruct", "tulu-3", "orca-agentinstruct", "lmsys-chat"])
def test_a_local_copy_of_a_known_set_uses_its_column(tmp_path, name):
    column = {"wildchat": "conversation", "lmsys-chat": "conversation", "infinity-instruct": "conversations"}.get(
        name, "messages"
    )
    rows = [{column: dialogue("q", "a")["messages"], "text": "not this"}]
    info, kept = run(tmp_path / "out", f"{name}={write(tmp_path / 'rows.jsonl', rows)}")
    assert kept[0].messages == dialogue("q", "a")["messages"]
    assert list(info["counts"]) == [name]


def test_schemas_of_other_names_become_one():
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "system", "value": ""}]
    assert to_messages(sharegpt) == dialogue("a", "b")["messages"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "response": "b"}, ["a", "b"]),
        ({"instruction": "a", "input": "", "output": "b"}, ["a", "b"]),
        ({"instruction": "a", "input": "x", "output": "b"}, ["a\n\nx", "b"]),
        ({"messages": json.dumps(dialogue("a", "b")["messages"])}, ["a", "b"]),
    ],
)
def test_questions_with_answers_become_dialogues(row, expected):
    messages = usable(row, None, False, 0)["messages"]
    assert [message["content"] for message in messages] == expected


def test_turns_that_do_not_alternate_are_dropped_on_request(tmp_path):
    rows = [dialogue("a", "b"), {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert len(run(tmp_path / "a", path)[1]) == 2
    info, _ = run(tmp_path / "b", path, alternating=True)
    assert info["counts"][path]["dropped"] == {"turns don't alternate": 1}


def test_over_long_turns_are_dropped_on_request(tmp_path):
    path = write(tmp_path / "rows.jsonl", [dialogue("a", "b"), dialogue("a" * 10_000_000, "b")])
    assert len(run(tmp_path / "a", path)[1]) == 2
    info, _ = run(tmp_path / "b", path, max_turn_chars=1000)
    assert info["counts"][path]["dropped"] == {"over-long turn": 1}


def test_a_dialogue_with_an_empty_answer_is_unusable():
    with pytest.raises(Unusable, match="empty turn"):
        to_messages(dialogue("a", "")["messages"])


def test_rows_with_the_same_id_are_all_read(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"id": 7, **dialogue(f"q{i}", "a")} for i in range(3)])
    assert len(run(tmp_path / "out", path)[1]) == 3


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_the_number_of_rows_is_estimated(tmp_path, suffix):
    rng = random.Random(0)
    rows = [dialogue(" ".join(str(rng.random()) for _ in range(100)), "a") for _ in range(5000)]  # 9 MB
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        kind = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
        with pa.output_stream(str(path), compression=kind) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    assert estimate_rows(Source("x", str(path))) == pytest.approx(5000, rel=0.15)


def test_a_set_on_the_hub_that_cannot_be_had_says_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"accept its terms at https://huggingface\.co/datasets/lmsys/lmsys-chat-1m"):
        run(tmp_path / "out", "lmsys-chat")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        run(tmp_path / "out", str(tmp_path / "none.jsonl"))


FIXTURES = [
    "infinity_instruct_7m",
    "lmsys_chat_1m",
    "orca_agentinstruct_1m_v1_cleaned",
    "tulu_3_sft_mixture",
    "wildchat_1m_full",
]


@pytest.mark.parametrize("name", FIXTURES)
def test_the_five_sft_sets_are_read_and_their_counts_add_up(testdata, name, tmp_path):
    path = str(testdata / f"sft/fixtures/{name}.parquet")
    info, kept = run(tmp_path / "out", path)
    counts = info["counts"][path]
    assert counts["rows"] == 300
    assert counts["kept"] + sum(counts["dropped"].values()) == counts["rows"]
    assert counts["kept"] == len(kept) > 100
