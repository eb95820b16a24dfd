"""One schema out of many: a row becomes a dialogue `[{"role", "content"}, ...]`, a text, or a reason why not."""

from typing import Any

CHAT_COLUMNS = ("messages", "conversations", "conversation")
TEXT_COLUMN = "text"
ROLES = {
    "system": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip


class Unusable(Exception):  # noqa: N818 - a verdict on one row, not an error of the program
    """Why a row can't be used; the message is the reason counted in the ledger."""


def detect_column(row: dict[str, Any]) -> str | None:
    """The column that holds the dialogue or the text, by its name."""
    return next((name for name in (*CHAT_COLUMNS, TEXT_COLUMN) if row.get(name) is not None), None)


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
