"""How data sets spell the parts of a dialogue: names of columns, of the fields of turns, and of roles.

Names are compared by `plain_name`, without regard to case and separators: `systemPrompt` is `system_prompt`.
"""

import re
from functools import lru_cache
from typing import Any

CHAT_COLUMNS = ("messages", "conversations", "conversation")
"""Columns that hold a dialogue and nothing else, in the order in which they are tried."""

OTHER_CHAT_COLUMNS = ("dialogue", "dialog", "data", "chat", "turns", "items", "chosen", "prompt")
"""Columns that hold a dialogue in some sets and other things elsewhere: tried last, if they hold a list of turns."""

ALTERNATING_COLUMNS = ("dialogue", "dialog", "data")
"""Those that hold the texts of two speakers in turn in some sets: UltraChat's, DailyDialog's."""

TEXT_COLUMN = "text"
QUESTION_COLUMNS = ("prompt", "instruction", "question")
ANSWER_COLUMNS = ("response", "output", "completion", "answer")
OTHER_QUESTION_COLUMNS = (*QUESTION_COLUMNS, "query", "inputs", "input")
OTHER_ANSWER_COLUMNS = (*ANSWER_COLUMNS, "chosen", "targets")
"""Those that are tried where there is no text either."""

CALL_ANSWER_COLUMNS = ("answers", "tool_calls", "function_call")
"""Answers that are tool calls; `answers` is how xLAM's function-calling set spells them."""

CONTEXT_COLUMNS = ("input", "context")
"""Text that belongs to a question: Alpaca's and Dolly's."""

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message", "system_instruction", "system_instructions")
HISTORY_COLUMNS = ("history", "chat_history", "conversation_history", "dialogue_history", "dialog_history", "context")
TOOL_COLUMNS = ("tools", "functions", "available_tools", "available_functions", "tool_definitions")
REASONING = (
    "reasoning_content", "reasoning", "thinking", "thinking_content", "thought", "thoughts", "chain_of_thought", "cot",
    "complex_cot",
)  # fmt: skip

ROLE_FIELDS = ("role", "from", "speaker", "author")
CONTENT_FIELDS = ("content", "value", "text", "message", "parts")
CALL_FIELDS = ("tool_calls", "tool_call", "function_call", "function_calls")
RESPONSE_FIELDS = ("tool_responses", "tool_response", "tool_results", "tool_result", "function_response")
CALL_ID_FIELDS = ("tool_call_id", "tool_use_id", "call_id")
NAME_FIELDS = ("name", "tool_name", "function_name")

ROLES = {
    "system": "system", "developer": "system", "sys": "system",
    "user": "user", "human": "user", "prompter": "user", "usr": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant",
    "chatbot": "assistant", "chatgpt": "assistant", "llm": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "tool_response": "tool", "function_response": "tool",
    "tool_result": "tool", "tool_results": "tool", "function_result": "tool", "tool_output": "tool",
    "function_output": "tool", "ipython": "tool",
}  # fmt: skip
CALL_ROLES = ("function_call", "tool_call", "function_calls", "tool_calls")
"""ShareGPT's turns that are calls: the assistant's."""

USER_FIELDS, ASSISTANT_FIELDS = (
    ("user", "human", "prompt", "question", "instruction", "query"),
    ("assistant", "gpt", "bot", "ai", "model", "response", "answer", "output"),
)
"""Fields of turns that hold a question and its answer together, without roles."""

TREE_FIELDS = ("message_id", "parent_id", "text", "role")
TREE_ORDER = ("rank", "deleted", "emojis")
"""Columns of OpenAssistant's table of single messages."""


@lru_cache(maxsize=8192)
def plain_name(name: str) -> str:
    """A name in lower case without separators."""
    return re.sub(r"[\s_-]+", "", str(name)).lower()


def plain_names(*names: str) -> frozenset[str]:
    """Several of them."""
    return frozenset(map(plain_name, names))


_ROLES = {plain_name(name): role for name, role in ROLES.items()}
_CALL_ROLES = plain_names(*CALL_ROLES)
COMPANIONS = plain_names(
    *SYSTEM_COLUMNS, *HISTORY_COLUMNS, *TOOL_COLUMNS, *OTHER_QUESTION_COLUMNS, *OTHER_ANSWER_COLUMNS
)
"""Columns that may belong to the dialogue of another column."""

TURN_FIELDS = plain_names(
    *ROLE_FIELDS, *CONTENT_FIELDS, *REASONING, *CALL_FIELDS, *RESPONSE_FIELDS, *CALL_ID_FIELDS, *NAME_FIELDS,
    *TOOL_COLUMNS,
)  # fmt: skip
"""Fields of a turn that are kept."""

_COLUMNS = COMPANIONS | plain_names(
    *CHAT_COLUMNS, *OTHER_CHAT_COLUMNS, *CONTEXT_COLUMNS, *REASONING, *CALL_ANSWER_COLUMNS, TEXT_COLUMN, *TREE_FIELDS,
    *TREE_ORDER,
)  # fmt: skip


_NOTHING: tuple[Any, ...] = ("", [], {})


def known_role(spelling: str) -> str | None:
    """The corpus's role that a data set spells so, or None."""
    return ROLES.get(spelling) or _ROLES.get(plain_name(spelling.strip()))


def is_call_role(spelling: str) -> bool:
    """Whether turns of this role are tool calls."""
    return plain_name(spelling.strip()) in _CALL_ROLES


def is_known_column(name: str) -> bool:
    """Whether a column of this name may become part of a dialogue or text."""
    return plain_name(name) in _COLUMNS


def is_present(value: Any) -> bool:
    """Whether there is anything in a field: null, and empty texts, lists and objects, are nothing."""
    return bool(value) or (value is not None and value not in _NOTHING)
