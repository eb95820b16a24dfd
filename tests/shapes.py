"""Dialogues of many shapes, and a tokenizer that knows the special tokens of published chat templates."""

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer

from fastcache.assets import DEMO

MARKS = re.compile(
    r"<\|[^|<>\s{}']+\|?>|<[a-z_]+\|>|<｜[^｜]+｜>|\[/?[A-Z_]+\]|\[gMASK\]|<sop>|<(?:start|end)_of_turn>|<SPECIAL_\d+>"
    r"|\]~!?b\[|\]~b\]|\[e~\[|</?think>|</?tool_call>|</?tool_response>"
)
"""What published templates have as special tokens."""
NOT_SPECIAL = re.compile(r"<｜|think>|tool_")
"""Those of them that tokenizers have as added tokens which aren't special."""


def call(arguments: Any, number: str = "callnum01") -> dict[str, Any]:
    return {"id": number, "type": "function", "function": {"name": "look_up", "arguments": arguments}}


def turn(role: str, content: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"role": role, **({} if content is None else {"content": content}), **fields}


def thought(reasoning: str, answer: str) -> dict[str, Any]:
    return turn("assistant", f"<think>\n{reasoning}\n</think>\n\n{answer}")


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks up a town.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "The town."}}},
        },
    }
]
EXCHANGE = [turn("user", "Which owl?"), turn("assistant", "The grey one.")]
ASKED = turn("user", "How warm is it?")
ANSWER = [turn("tool", "3 degrees", tool_call_id="callnum01", name="look_up"), turn("assistant", "It has 3.")]
CALLED = [ASKED, turn("assistant", "", tool_calls=[call({"town": "Oslo", "n": 3})]), *ANSWER]

SHAPES: dict[str, list[dict[str, Any]]] = {
    "prompt": [turn("user", "Which owl?")],
    "plain": EXCHANGE,
    "many turns": [*EXCHANGE, turn("user", "Why?"), turn("assistant", "So.")],
    "ends with user": [*EXCHANGE, turn("user", "Why?")],
    "system": [turn("system", "Be kind."), *EXCHANGE],
    "long system": [turn("system", "Be kind."), *EXCHANGE, turn("user", "Why?"), turn("assistant", "So.")],
    "empty system": [turn("system", ""), *EXCHANGE],
    "developer": [turn("developer", "Be brief."), *EXCHANGE],
    "blanks": [turn("user", "  owl \n\n"), turn("assistant", "\n grey\n")],
    "empty contents": [turn("user", ""), turn("assistant", "")],
    "jinja": [turn("user", "{{ messages }} {% x %}"), turn("assistant", "{# a #}")],
    "thought": [ASKED, thought("let me see", "Cold.")],
    "thoughts": [ASKED, thought("let me see", "Cold."), turn("user", "Why?"), thought("it is winter", "So.")],
    "half a thought": [ASKED, turn("assistant", "let me see\n</think>\nCold.")],
    "open thought": [ASKED, turn("assistant", "<think>let me see")],
    "reasoning field": [
        ASKED,
        turn("assistant", "Cold.", reasoning_content="let me see"),
        turn("user", "Why?"),
        turn("assistant", "So.", reasoning_content="it is winter"),
    ],
    "reasoning alone": [ASKED, turn("assistant", reasoning_content="let me see")],
    "call": CALLED,
    "call without content": [ASKED, turn("assistant", tool_calls=[call({"town": "Oslo"})]), *ANSWER],
    "call with text": [ASKED, turn("assistant", "", tool_calls=[call('{"town": "Oslo"}')]), *ANSWER],
    "call and content": [ASKED, turn("assistant", "I look.", tool_calls=[call({"town": "Oslo"})]), *ANSWER],
    "call and reasoning": [
        ASKED,
        turn("assistant", "", tool_calls=[call({"town": "Oslo"})], reasoning_content="let me see"),
        ANSWER[0],
        turn("assistant", "It has 3.", reasoning_content="so it is cold"),
    ],
    "two calls": [
        ASKED,
        turn("assistant", "", tool_calls=[call({"town": "Oslo"}), call({"town": "Rome"}, "callnum02")]),
        turn("tool", "3", tool_call_id="callnum01"),
        turn("tool", "20", tool_call_id="callnum02"),
        turn("assistant", "3 and 20."),
    ],
}


def templates(testdata: Path) -> dict[str, str]:
    """The published templates, by name."""
    return {path.stem: path.read_text() for path in sorted((testdata / "templates").glob("*.jinja"))}


def tokenizer_for(template: str) -> Any:
    """The demo's tokenizer with a template and its special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    marks = sorted(set(MARKS.findall(template)))
    tokenizer.add_special_tokens({"bos_token": "<bos>"} if "bos_token" in template else {})
    tokenizer.add_special_tokens({"additional_special_tokens": [m for m in marks if not NOT_SPECIAL.search(m)]})
    tokenizer.add_tokens(
        [AddedToken(mark, special=False, normalized=False) for mark in marks if NOT_SPECIAL.search(mark)]
    )
    tokenizer.chat_template = template
    return tokenizer
