"""However a data set spells a dialogue, it becomes the same messages, and what isn't kept of a row is counted."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import run, write
from dialogues import CALL, SPELLINGS, said
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcache.stages.prepare.fields import Unusable
from fastcache.stages.prepare.schema import usable
from fastcache.stages.prepare.spellings import is_present

DEEP = json.loads("[" * 90 + "]" * 90)


def read(row, column=None):
    """Messages with parsed calls, tools, kept and not kept fields of a row."""
    found = usable(row, column, False, 0)
    messages = [
        m | {"tool_calls": json.loads(m["tool_calls"])} if "tool_calls" in m else m for m in found["messages"] or ()
    ]
    return messages, json.loads(found["tools"] or "null"), found["kept"], found["not_kept"]


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_the_same_messages(name):
    row, expected = SPELLINGS[name]
    assert read(row)[0] == expected


@pytest.mark.parametrize(
    "role", ["developer", "Human", "prompter", "AI", "chatbot", "ipython", "tool_response", "function-response"]
)
def test_spellings_of_roles_are_known(role):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]}
    assert read(row)[0][1]["role"] in ("system", "user", "assistant", "tool")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "a"}]},
            "not text",
        ),
        ({"role": "tool", "content": [{"type": "image", "source": "x"}]}, "not text"),
        ({"role": "user", "content": [{"type": "hologram", "text": "a"}]}, "unknown content part"),
        ({"role": "tool", "content": None, "tool_call_id": "1"}, "tool turn without content"),
        ({"role": "assistant", "content": None}, "turn without content"),
        ({"role": "assistant", "content": "", "tool_calls": []}, "empty turn"),
        ({"role": "assistant", "content": None, "tool_calls": [{"nothing": 1}]}, "unreadable tool call"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}, "not a finite number"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": "\ud800"}}]}, "invalid Unicode"),
        ({"role": "assistant", "content": "a", "reasoning_content": "\udfff"}, "invalid Unicode"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": DEEP}]}, "nested too deeply"),
    ],
)
def test_what_cannot_be_kept_has_a_reason_of_its_own(message, reason):
    with pytest.raises(Unusable) as raised:
        read({"messages": [*said("a"), message]})
    assert str(raised.value) == reason


def test_a_flat_table_of_a_tree_is_not_taken_for_texts():
    with pytest.raises(Unusable, match="one message of a tree"):
        read({"message_id": "1", "parent_id": None, "text": "a", "role": "prompter", "lang": "en"})


def test_turns_of_texts_only_are_no_dialogue_in_columns_that_mostly_hold_others():
    assert read({"context": ["p", "p"], "question": "a", "answer": "b"}) == (said("a", "b"), None, set(), {"context"})
    with pytest.raises(Unusable, match="no known column"):
        read({"turns": ["first question", "second question"]})


names = st.sampled_from(
    [
        "role",
        "content",
        "from",
        "value",
        "text",
        "tool_calls",
        "toolCalls",
        "tool_call_id",
        "name",
        "reasoning",
        "reasoning_content",
        "weight",
        "id",
        "tools",
        "tool_responses",
        "function_call",
        "Weight",
        "image",
    ]
)
entries = (
    st.none()
    | st.booleans()
    | st.sampled_from(["", "a", "user", "assistant", "[]", [], {}, 0, 1.5, ["a"], [CALL], {"name": "f"}])
)
turns = st.tuples(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "tool", "system", "human"]),
            "content": st.sampled_from(["a", "b", None]),
        }
    ),
    st.dictionaries(names, entries, max_size=3),
).map(lambda pair: pair[1] | pair[0])
columns = st.sampled_from(
    [
        "system",
        "system_prompt",
        "history",
        "tools",
        "functions",
        "instruction",
        "input",
        "prompt",
        "response",
        "text",
        "id",
        "source",
        "conversation",
        "rejected",
        "chosen",
        "reasoning",
        "answers",
    ]
)
values = entries | st.lists(turns, max_size=2) | st.just([["q", "a"]])
JSON_OF_NOTHING = ("[]", "{}", "null")


@settings(max_examples=400, deadline=None)
@given(dialogue=st.lists(turns, min_size=1, max_size=3), beside=st.dictionaries(columns, values, max_size=4))
def test_every_field_of_a_dialogue_is_kept_or_counted(dialogue, beside):
    """Fields in = fields kept + fields counted; a field that is both in different turns counts as one that is not kept."""
    row = {**beside, "messages": dialogue}
    try:
        messages, tools, kept, not_kept = read(row)
    except Unusable:
        return
    assert not kept & not_kept
    holds = {name for name, value in beside.items() if is_present(value)}
    assert holds - {n for n in holds if beside[n] in JSON_OF_NOTHING} <= {
        name for name in kept | not_kept if "[]" not in name
    }
    assert {name for name in kept | not_kept if "[]" not in name} <= holds
    of_turns = {
        f"messages[].{name}"
        for turn in dialogue
        for name, value in turn.items()
        if name not in ("role", "content") and is_present(value) and value not in JSON_OF_NOTHING
    }
    if all(turn["content"] for turn in dialogue):
        assert of_turns <= kept | not_kept
    # What is said to be kept stands in the result.
    if "system" in kept:
        assert any(beside["system"] in m["content"] for m in messages if m["role"] == "system")
    if "tools" in kept or "functions" in kept:
        assert tools
    if any(name.endswith((".tool_calls", ".toolCalls", ".function_call")) for name in kept):
        assert any("tool_calls" in message for message in messages)


def test_arrow_types_and_nulls_of_other_rows_change_nothing(tmp_path):
    calls = [
        [{"function": {"name": "f", "arguments": {"x": 1}}}],
        [{"function": {"name": "g", "arguments": {"y": "z"}}}],
    ]
    rows = [
        {
            "messages": [*said(f"a{i}"), {"role": "assistant", "content": None, "tool_calls": c}],
            "weight": i or None,
            "note": "",
        }
        for i, c in enumerate(calls)
    ]
    plain = pa.Table.from_pylist(rows)
    column = plain["messages"].combine_chunks()
    tables = {
        "struct": plain,
        "large": plain.cast(
            pa.schema(
                [
                    ("messages", pa.large_list(column.type.value_type)),
                    ("weight", pa.float64()),
                    ("note", pa.large_string()),
                ]
            )
        ),
    }
    words = pa.array(["a", "b", "a"])
    tables["dictionary"] = pa.table(
        {"prompt": words.dictionary_encode(), "response": pa.array(["b", "c", "b"], pa.large_string())}
    )
    tables["map"] = pa.table(
        {
            "messages": pa.array(
                [[list(turn.items()) for turn in said("a", "b")]], pa.list_(pa.map_(pa.string(), pa.string()))
            )
        }
    )
    for name, table in tables.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    with pa.ipc.new_stream(
        str(tmp_path / "view.arrow"), pa.schema([("text", pa.string_view()), ("x", pa.string_view())])
    ) as file:
        file.write_table(pa.table({"text": pa.array(["t"], pa.string_view()), "x": pa.array([None], pa.string_view())}))
    written = write(tmp_path / "rows.jsonl", rows)
    info, kept = run(tmp_path / "out", written)
    assert info["fields"][written]["not_kept"] == {"weight": 1}
    assert [
        row.messages[1]["tool_calls"][0]["function"]["arguments"] for row in sorted(kept, key=lambda r: str(r.messages))
    ] == [{"x": 1}, {"y": "z"}]
    for name in ("struct", "large"):
        path = str(tmp_path / f"{name}.parquet")
        other, others = run(tmp_path / name, path)
        assert sorted(str(row.messages) for row in others) == sorted(str(row.messages) for row in kept)
        assert list(other["fields"].values()) == list(info["fields"].values())
    assert len(run(tmp_path / "o1", str(tmp_path / "dictionary.parquet"))[1]) == 2
    assert run(tmp_path / "o2", str(tmp_path / "map.parquet"))[1][0].messages == said("a", "b")
    assert run(tmp_path / "o3", str(tmp_path / "view.arrow"))[1][0].text == "t"


def test_dialogues_that_differ_in_their_calls_alone_are_no_duplicates(tmp_path):
    def calling(x):
        return {
            "messages": [
                *said("a"),
                {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": x}]},
            ]
        }

    path = write(tmp_path / "rows.jsonl", [calling({"x": 1}), calling({"x": 2}), calling({"x": 1})])
    info, kept = run(tmp_path / "out", path)
    assert info["counts"][path]["dropped"] == {"exact duplicate": 1}
    assert len(kept) == 2


def test_a_set_with_a_field_of_its_own_for_each_row_has_few_names(tmp_path):
    rows = [{"messages": said(f"a{i}", "b"), f"field {i}": 1, "\ud800" * 200: 1} for i in range(600)]
    path = write(tmp_path / "rows.jsonl", rows)
    info, _ = run(tmp_path / "out", path)
    counts = info["fields"][path]["not_kept"]
    assert len(counts) <= 501
    assert sum(counts.values()) == 1200
    assert counts["?" * 80] == 600


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_table_of_messages_becomes_the_best_path_of_each_tree(tmp_path, suffix):
    def message(name, parent, role, text, **others):
        return {
            "message_id": name,
            "parent_id": parent,
            "role": role,
            "text": text,
            "rank": None,
            "lang": "en",
            **others,
        }

    rows = [
        message("c", "b", "prompter", "third"), message("a", None, "prompter", "first"),
        message("x", "a", "assistant", "worse", rank=1), message("b", "a", "assistant", "second", rank=0),
        message("d", None, "prompter", "alone"), message("o", "nowhere", "assistant", "orphan"),
        message("p", "q", "assistant", "circle"), message("q", "p", "prompter", "circle"),
    ]  # fmt: skip
    path = str(tmp_path / f"rows.{suffix}")
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(tmp_path / "rows.jsonl", rows)
    info, kept = run(tmp_path / "out", path)
    assert sorted([row.messages for row in kept], key=len) == [said("alone"), said("first", "second", "third")]
    assert info["counts"][path] == {"rows": 5, "kept": 2, "dropped": {"reply to a message that isn't there": 3}}
    assert info["fields"][path]["not_kept"]["replies off the best path"] == 1
    assert info["fields"][path]["not_kept"]["messages[].lang"] == 2
