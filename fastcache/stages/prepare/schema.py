"""One schema out of many: a row becomes a dialogue `[{"role", "content"}, ...]`, a text, or a reason why not."""

import json
from typing import Any

CHAT_COLUMNS = ("messages", "conversations", "conversation")
TEXT_COLUMN = "text"
ANSWER_COLUMNS = ("response", "output", "completion", "answer")
QUESTION_COLUMNS = ("prompt", "instruction", "question")
OTHER_COLUMNS = (TEXT_COLUMN, "input", "system")
ROLES = {
    "system": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip


def known_columns(names: list[str], column: str | None) -> list[str]:
    """Those of `names` that `usable` may look at, or if there is none the first, so that rows can still be counted."""
    wanted = {column} if column else {*CHAT_COLUMNS, *QUESTION_COLUMNS, *ANSWER_COLUMNS, *OTHER_COLUMNS}
    return [name for name in names if name in wanted] or names[:1]


class Unusable(Exception):  # noqa: N818 - a verdict on one row, not an error of the program
    """Why a row can't be used; the message is the reason counted in the ledger."""


def usable(raw: dict[str, Any], column: str | None, alternating: bool, max_turn_chars: int) -> dict[str, Any]:
    """`{"messages", "text"}`, one of them None, of a raw row; raises `Unusable`.

    `column` names the column to read; without it, the known names are tried in turn: a dialogue, a question with its
    answer (also Alpaca's `instruction`, `input`, `output`), a text.
    """
    value = raw.get(column) if column else next((raw[n] for n in CHAT_COLUMNS if raw.get(n) is not None), None)
    if value is None and not column:
        value = _question_and_answer(raw)
    if value is None and not column:
        value = raw.get(TEXT_COLUMN)
    if value is None:
        raise Unusable("no known column" if not column else f"no column {column}")
    if isinstance(value, str) and value.lstrip().startswith("[{") and column != TEXT_COLUMN:
        value = _parsed(value)  # some sets hold their dialogues as JSON text
    if isinstance(value, str):
        return {"messages": None, "text": _checked_text(value, max_turn_chars)}
    messages = to_messages(value)
    _check_turns(messages, alternating, max_turn_chars)
    return {"messages": messages, "text": None}


def _question_and_answer(raw: dict[str, Any]) -> list[dict[str, Any]] | None:
    question = next((raw[name] for name in QUESTION_COLUMNS if isinstance(raw.get(name), str)), None)
    answer = next((raw[name] for name in ANSWER_COLUMNS if isinstance(raw.get(name), str)), None)
    if question is None or answer is None:
        return None
    context = raw.get("input")
    if isinstance(context, str) and context.strip():
        question = f"{question}\n\n{context}"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    system = raw.get("system")
    return [{"role": "system", "content": system}, *turns] if isinstance(system, str) else turns


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable("not JSON") from error


def _checked_text(value: str, max_chars: int) -> str:
    text = to_text(value)
    if not text.strip():
        raise Unusable("empty text")
    if max_chars and len(text) > max_chars:
        raise Unusable("over-long turn")
    return text


def _check_turns(messages: list[dict[str, str]], alternating: bool, max_turn_chars: int) -> None:
    if max_turn_chars and any(len(message["content"]) > max_turn_chars for message in messages):
        raise Unusable("over-long turn")
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if alternating and roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise Unusable("turns don't alternate")


def to_messages(value: Any) -> list[dict[str, str]]:
    """A dialogue in one schema, without empty system turns; raises `Unusable`."""
    if not isinstance(value, list) or not value:
        raise Unusable("no turns")
    messages = [_turn(turn) for turn in value]
    messages = [message for message in messages if message["role"] != "system" or message["content"].strip()]
    if any(not message["content"].strip() for message in messages):
        raise Unusable("empty turn")
    if not any(message["role"] != "system" for message in messages):
        raise Unusable("system turns only")
    return messages


def _turn(turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise Unusable("turn is not an object")
    role, content = (turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))
    if not isinstance(role, str) or not role.strip():
        raise Unusable("turn without role")
    if not isinstance(content, str):
        raise Unusable("turn without content")
    if role.strip().lower() not in ROLES:
        raise Unusable("unknown role")
    return {"role": ROLES[role.strip().lower()], "content": to_text(content)}


def to_text(value: Any) -> str:
    """A text that can be stored as UTF-8; raises `Unusable`."""
    if not isinstance(value, str):
        raise Unusable("no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Unusable("invalid Unicode") from error
    return value
