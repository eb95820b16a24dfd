"""One dialogue in the spellings of many data sets."""

import json

CALL = {"name": "f", "arguments": {"x": 1}}
STORED_CALL = {"type": "function", "function": CALL}


def said(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


SPELLINGS = {
    "UltraChat": ({"id": "1", "data": ["a", "b", "c", "d"]}, said("a", "b", "c", "d")),
    "LIMA": ({"conversations": ["a", "b"], "source": "x"}, said("a", "b")),
    "pairs": ({"conversation": [["a", "b"], ["c", "d"]]}, said("a", "b", "c", "d")),
    "roles in pairs": ({"messages": [["user", "a"], ["assistant", "b"]]}, said("a", "b")),
    "BELLE": ({"conversation": [{"human": "a", "assistant": "b"}]}, said("a", "b")),
    "Dolly": ({"instruction": "a", "context": "x", "response": "b", "category": "q"}, said("a\n\nx", "b")),
    "OpenOrca": (
        {"system_prompt": "s", "question": "a", "response": "b"},
        [{"role": "system", "content": "s"}, *said("a", "b")],
    ),
    "TRL": ({"prompt": said("a"), "completion": said("", "b")[1:]}, said("a", "b")),
    "TRL, plain": ({"prompt": "a", "completion": "b"}, said("a", "b")),
    "TRL, half of it plain": ({"prompt": "a", "completion": said("", "b")[1:]}, said("a", "b")),
    "preferences": ({"prompt": said("a"), "chosen": said("", "b")[1:], "rejected": said("", "c")[1:]}, said("a", "b")),
    "preferences with the prompt in them": ({"chosen": said("a", "b"), "rejected": said("a", "c")}, said("a", "b")),
    "Gemini": (
        {"messages": [{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}]},
        said("a", "b"),
    ),
    "capitals": (
        {"Messages": [{"Role": "User", "Content": "a"}, {"Role": "Chat-Bot", "Content": "b"}]},
        said("a", "b"),
    ),
    "columns": ({"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}}, said("a", "b")),
    "Arrow's maps": (
        {"messages": [[("role", "user"), ("content", "a")], [("role", "assistant"), ("content", "b")]]},
        said("a", "b"),
    ),
    "JSON text": (
        {"conversations": json.dumps([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])},
        said("a", "b"),
    ),
    "instruction as system": (
        {"instruction": "s", "messages": said("a", "b")},
        [{"role": "system", "content": "s"}, *said("a", "b")],
    ),
    "history": (
        {
            "instruction": "c",
            "output": "d",
            "history": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        },
        said("a", "b", "c", "d"),
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
                {"role": "assistant", "content": {"type": "output_text", "text": "c"}},
            ]
        },
        said("ab", "c"),
    ),
    "calls": (
        {"messages": [*said("a"), {"role": "assistant", "content": None, "function_call": {**CALL}}]},
        [*said("a"), {"role": "assistant", "tool_calls": [STORED_CALL]}],
    ),
    "ShareGPT's calls": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(CALL)}]},
        [*said("a"), {"role": "assistant", "tool_calls": [STORED_CALL]}],
    ),
    "xLAM": (
        {"query": "a", "answers": json.dumps([CALL])},
        [*said("a"), {"role": "assistant", "tool_calls": [STORED_CALL]}],
    ),
    "Anthropic's calls": (
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"x": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r"}]},
            ]
        },
        [
            {"role": "assistant", "tool_calls": [{"id": "1", **STORED_CALL}]},
            {"role": "tool", "tool_call_id": "1", "content": "r"},
        ],
    ),
    "results in the calling turn": (
        {
            "messages": [
                *said("a"),
                {"role": "assistant", "tool_calls": [CALL], "tool_responses": [{"name": "f", "response": {"y": 2}}]},
            ]
        },
        [
            *said("a"),
            {"role": "assistant", "tool_calls": [STORED_CALL]},
            {"role": "tool", "name": "f", "content": '{"y": 2}'},
        ],
    ),
    "reasoning": (
        {"messages": [*said("a"), {"role": "assistant", "content": "b", "thinking": "r"}]},
        [*said("a"), {"role": "assistant", "content": "b", "reasoning_content": "r"}],
    ),
    "reasoning parts": (
        {
            "messages": [
                *said("a"),
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "r"}, {"type": "text", "text": "b"}],
                },
            ]
        },
        [*said("a"), {"role": "assistant", "content": "b", "reasoning_content": "r"}],
    ),
    "reasoning beside": (
        {"question": "a", "reasoning": "r", "answer": "b"},
        [*said("a"), {"role": "assistant", "content": "b", "reasoning_content": "r"}],
    ),
    "OpenAssistant": (
        {
            "message_tree_id": "t",
            "prompt": {
                "role": "prompter",
                "text": "a",
                "replies": [
                    {"role": "assistant", "text": "x", "rank": 1, "replies": []},
                    {
                        "role": "assistant",
                        "text": "b",
                        "rank": 0,
                        "replies": [
                            {"role": "prompter", "text": "y", "emojis": {"+1": 1}, "replies": []},
                            {"role": "prompter", "text": "c", "emojis": {"+1": 3, "-1": 1}, "replies": []},
                        ],
                    },
                ],
            },
        },
        said("a", "b", "c"),
    ),
}
