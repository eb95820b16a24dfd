"""One schema out of many: a row becomes a dialogue in the corpus's message schema, a text, or a reason why not.

Where a row has more than its dialogue, what a chat template can use joins it: a system prompt comes first, then earlier
turns; tools stand beside it. All else is noted as not kept.
"""

import re
from typing import Any

from fastcache.corpus import Message
from fastcache.stages.prepare.fields import Fields, Unusable, to_text
from fastcache.stages.prepare.spellings import (
    ALTERNATING_COLUMNS,
    ANSWER_COLUMNS,
    CALL_ANSWER_COLUMNS,
    CHAT_COLUMNS,
    CONTEXT_COLUMNS,
    HISTORY_COLUMNS,
    OTHER_ANSWER_COLUMNS,
    OTHER_CHAT_COLUMNS,
    OTHER_QUESTION_COLUMNS,
    QUESTION_COLUMNS,
    REASONING,
    SYSTEM_COLUMNS,
    TEXT_COLUMN,
    TOOL_COLUMNS,
    is_known_column,
    is_present,
)
from fastcache.stages.prepare.tool_calls import json_text, parse_json_text, to_calls, to_tools
from fastcache.stages.prepare.turns import DialogueReader, is_dialogue

_JSON_TURNS = re.compile(r"\s*\[\s*\{")


def usable(raw: dict[str, Any], column: str | None, alternating: bool, max_turn_chars: int) -> dict[str, Any]:
    """What a raw row becomes, as the corpus stores it: `messages` or `text`, the other None, and `tools` or None.

    `kept` and `not_kept` name the fields beside the dialogue itself that were, and weren't, taken over, such as `system`
    or `messages[].weight`. `column` names the column to read; without it, the known names are tried in turn: a dialogue,
    a question with its answer (also Alpaca's `instruction`, `input`, `output`), a text. Raises `Unusable`.
    """
    fields = Fields(raw)
    fields.drop_empty_json((*TOOL_COLUMNS, *CALL_ANSWER_COLUMNS, *HISTORY_COLUMNS))
    reader = DialogueReader()
    value = _dialogue_or_text(fields, column, reader)
    if isinstance(value, str):
        text = _checked_text(value, max_turn_chars)
        return {"messages": None, "text": text, "tools": None, "kept": set(), "not_kept": fields.left | fields.taken}
    messages, is_answer = value
    messages = _joined(messages, fields, reader, is_answer)
    if not any(message["role"] != "system" for message in messages):
        raise Unusable("system turns only")
    messages = [_stored(message) for message in messages]
    _check_turns(messages, alternating, max_turn_chars)
    not_kept = reader.not_kept | fields.left
    return {
        "messages": messages,
        "text": None,
        "tools": None if reader.tools is None else json_text(reader.tools),
        "kept": (reader.kept | fields.taken) - not_kept,
        "not_kept": not_kept,
    }


def to_messages(value: Any) -> list[Message]:
    """A dialogue in one schema, without empty system turns; raises `Unusable`."""
    messages = DialogueReader().read(value, "messages[]")
    if not any(message["role"] != "system" for message in messages):
        raise Unusable("system turns only")
    return messages


def known_columns(names: list[str], column: str | None) -> set[str]:
    """Those of `names` whose values `usable` may look at."""
    return {name for name in names if name == column or is_known_column(name)}


def _dialogue_or_text(fields: Fields, column: str | None, reader: DialogueReader) -> tuple[list[Message], bool] | str:
    """The text that the row is, or the messages of its dialogue and whether they are a question with its answer."""
    name = fields.find((column,) if column else CHAT_COLUMNS)
    if name is None and column:
        raise Unusable(f"no column {column}")
    _take_tools(fields, reader)
    if name is None:
        messages = _question_and_answer(fields, reader, QUESTION_COLUMNS, ANSWER_COLUMNS)
        name = fields.find([TEXT_COLUMN])
        if messages is None and name is None:
            messages = _question_and_answer(fields, reader, OTHER_QUESTION_COLUMNS, OTHER_ANSWER_COLUMNS)
            name = _other_chat_column(fields)
        if messages is not None:
            return messages, True
    if name is None:
        raise Unusable("no known column")
    value = fields.use(name)
    if isinstance(value, str) and not column and fields.has("message_id") and fields.has("role"):
        raise Unusable("one message of a tree")  # as texts, its dialogues would lie in pieces
    if isinstance(value, str) and _JSON_TURNS.match(value) and column != TEXT_COLUMN:
        value = parse_json_text(value)  # some sets hold their dialogues as JSON text
    return value if isinstance(value, str) else (reader.read(value, f"{name}[]"), False)


def _other_chat_column(fields: Fields) -> str | None:
    """A column that holds turns, of those that hold other things elsewhere."""
    for spelling in OTHER_CHAT_COLUMNS:
        value = fields.get(name := fields.find([spelling], (list, dict)))
        if _holds_turns(value) or (isinstance(value, dict) and is_dialogue(value)):
            return name
        texts = isinstance(value, list) and len(value) > 1 and all(isinstance(text, str) for text in value)
        if texts and spelling in ALTERNATING_COLUMNS:
            return name
    return None


def _holds_turns(value: Any) -> bool:
    """Whether a value is a list of objects, or of pairs."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict | list | tuple) for turn in value)


def _side(fields: Fields, spellings: tuple[str, ...]) -> str | None:
    """The column with one side of a question with its answer: a text or messages."""
    named = [name for spelling in spellings if (name := fields.find([spelling], (str, list))) is not None]
    sides = [name for name in named if isinstance(fields.get(name), str) or _holds_turns(fields.get(name))]
    return next((name for name in sides if is_present(fields.get(name))), sides[0] if sides else None)


def _question_and_answer(
    fields: Fields, reader: DialogueReader, questions: tuple[str, ...], answers: tuple[str, ...]
) -> list[Message] | None:
    """A question with its answer, or None. Each is a text or a list of messages; the answer may be a tool call."""
    question, answer = _side(fields, questions), _side(fields, answers)
    asked, said = fields.get(question), fields.get(answer)
    if question is None:
        return None
    if said is None:
        return _question_and_calls(fields, reader, question) if isinstance(asked, str) else None
    fields.use(answer)
    after = [_answer(said, fields, reader)] if isinstance(said, str) else reader.read(said, f"{answer}[]")
    if isinstance(asked, list):
        before = reader.read(fields.use(question), f"{question}[]")
        return after if after[: len(before)] == before else before + after
    if after[0]["role"] != "assistant":  # the answer is the whole dialogue
        return after
    return [_question(fields, question), *after]


def _question_and_calls(fields: Fields, reader: DialogueReader, question: str) -> list[Message] | None:
    """A question that tool calls answer, or None."""
    message: Message = {"role": "assistant"}
    _take_calls(fields, reader, message)
    return [_question(fields, question), message] if "tool_calls" in message else None


def _answer(said: str, fields: Fields, reader: DialogueReader) -> Message:
    """An answer with the reasoning and the tool calls that have columns of their own; raises `Unusable` for an empty one."""
    message: Message = {"role": "assistant", "content": said}
    if reasoning := fields.take_first(REASONING, str):
        message["reasoning_content"] = reasoning
    _take_calls(fields, reader, message)
    if not said.strip() and len(message) == 2:
        raise Unusable("empty turn")
    return message


def _question(fields: Fields, question: str) -> Message:
    """A question with the text that belongs to it."""
    texts = [str(fields.use(question))]
    for spelling in CONTEXT_COLUMNS:
        name = fields.find([spelling], str)
        if (fields.get(name) or "").strip():
            texts.append(fields.use(name))
    content = "\n\n".join(texts)
    if not content.strip():
        raise Unusable("empty turn")
    return {"role": "user", "content": content}


def _take_calls(fields: Fields, reader: DialogueReader, message: Message) -> None:
    name = fields.find(CALL_ANSWER_COLUMNS)
    if not is_present(fields.get(name)):
        return
    try:
        message["tool_calls"] = to_calls(fields.get(name), f"{name}[]", reader.not_kept)
    except Unusable:
        return
    fields.take(name)


def _take_tools(fields: Fields, reader: DialogueReader) -> None:
    name = fields.find(TOOL_COLUMNS)
    if not is_present(fields.get(name)):
        return
    try:
        reader.tools = to_tools(fields.get(name))
    except Unusable:
        return
    fields.take(name)


def _joined(messages: list[Message], fields: Fields, reader: DialogueReader, is_answer: bool) -> list[Message]:
    """The dialogue with its system prompt first and its earlier turns before it, from other columns of the row.

    Beside a dialogue, but not beside a question with its answer (`is_answer`), an instruction is a system prompt.
    """
    contents = {message.get("content") for message in messages}
    for spelling in (*OTHER_QUESTION_COLUMNS, *OTHER_ANSWER_COLUMNS):
        name = fields.find([spelling], str)
        if fields.get(name) and fields.get(name) in contents:
            fields.take(name)  # a copy of one of its turns
    n_system = next((turn for turn, message in enumerate(messages) if message["role"] != "system"), len(messages))
    own, rest = messages[:n_system], messages[n_system:]
    history = _history(fields, reader)
    if rest[: len(history)] != history:
        rest = history + rest
    name = fields.find(SYSTEM_COLUMNS, str)
    if name is None and not own and not is_answer:
        name = fields.find(["instruction"], str)
    system = fields.take(name) or ""
    if system.strip() and not any(system.strip() in message["content"] for message in own):
        own = [{"role": "system", "content": system}, *own]
    return own + rest


def _history(fields: Fields, reader: DialogueReader) -> list[Message]:
    """Earlier turns from a column of their own; none if they can't be read, which is counted."""
    for spelling in HISTORY_COLUMNS:
        name = fields.find([spelling], (list, dict, str))
        value = fields.get(name)
        if isinstance(value, str) and not value.lstrip().startswith("["):
            continue
        if not is_present(value) or (spelling == "context" and not _holds_turns(value)):
            continue
        earlier = DialogueReader()
        try:
            messages = earlier.read(parse_json_text(value) if isinstance(value, str) else value, f"{name}[]")
        except Unusable:
            continue
        fields.take(name)
        reader.kept |= earlier.kept
        reader.not_kept |= earlier.not_kept
        reader.tools = reader.tools or earlier.tools
        return messages
    return []


def _stored(message: Message) -> Message:
    """A message as the corpus stores it, with tool calls as JSON text; raises `Unusable`."""
    return {name: json_text(value) if name == "tool_calls" else to_text(value) for name, value in message.items()}


def _checked_text(value: str, max_chars: int) -> str:
    text = to_text(value)
    if not text.strip():
        raise Unusable("empty text")
    if max_chars and len(text) > max_chars:
        raise Unusable("over-long turn")
    return text


def _check_turns(messages: list[Message], alternating: bool, max_turn_chars: int) -> None:
    if max_turn_chars and any(len(text) > max_turn_chars for message in messages for text in message.values()):
        raise Unusable("over-long turn")
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if alternating and roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise Unusable("turns don't alternate")
