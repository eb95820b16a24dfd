"""Dialogues in any spelling become lists of messages, and what can't be kept of them is noted by field."""

from typing import Any

from fastcache.corpus import Message
from fastcache.stages.prepare.fields import Fields, Unusable
from fastcache.stages.prepare.parts import read_parts, read_results, result_text
from fastcache.stages.prepare.spellings import (
    ASSISTANT_FIELDS,
    CALL_FIELDS,
    CALL_ID_FIELDS,
    CONTENT_FIELDS,
    NAME_FIELDS,
    REASONING,
    RESPONSE_FIELDS,
    ROLE_FIELDS,
    TOOL_COLUMNS,
    USER_FIELDS,
    is_call_role,
    is_present,
    known_role,
    plain_name,
    plain_names,
)
from fastcache.stages.prepare.tool_calls import to_calls, to_tools
from fastcache.stages.prepare.trees import best_path

_ROLE_NAMES, _CONTENT_NAMES = plain_names(*ROLE_FIELDS), plain_names(*CONTENT_FIELDS)


def is_dialogue(value: dict[str, Any]) -> bool:
    """Whether an object is a dialogue: a tree of replies, turns in columns, or a single turn."""
    return isinstance(value.get("replies"), list) or bool(plain_names(*value) & _ROLE_NAMES)


class DialogueReader:
    """Reads dialogues and remembers which fields of turns were kept and which were not, and the tools that turns list."""

    def __init__(self) -> None:
        self.kept: set[str] = set()
        self.not_kept: set[str] = set()
        self.tools: list[dict[str, Any]] | None = None
        """Those of the dialogue; what is set before reading goes before what turns list."""

    def read(self, value: Any, where: str) -> list[Message]:
        """The messages of a dialogue that is spelled in any known way; raises `Unusable`.

        `where` names the dialogue in the fields that are noted.
        """
        turns = self._turns_of(value, where)
        return [message for turn in turns for message in self._read_turn(turn, where)]

    def _turns_of(self, value: Any, where: str) -> list[dict[str, Any]]:
        """The turns of a dialogue as objects with a role each."""
        if isinstance(value, dict):
            value = self._turns_of_object(value, where)
        if not isinstance(value, list | tuple) or not value:
            raise Unusable("no turns")
        if all(isinstance(turn, str) for turn in value):  # UltraChat's and LIMA's
            return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(value)]
        if all(_is_pair(turn) for turn in value):
            if all(known_role(role) for role, _ in value):
                return [{"role": role, "content": text} for role, text in value]
            names = ("user", "assistant")
            return [{"role": r, "content": text} for pair in value for r, text in zip(names, pair, strict=True)]
        return [turn for item in value for turn in _roles_given(item)]

    def _turns_of_object(self, value: dict[str, Any], where: str) -> list[Any]:
        if isinstance(value.get("replies"), list):
            return best_path(value, where, self.not_kept)
        present = {name: column for name, column in value.items() if is_present(column)}
        named = [name for name in present if plain_name(name) in _ROLE_NAMES | _CONTENT_NAMES]
        if not named:
            raise Unusable("no turns")
        columns = {name: column for name, column in present.items() if isinstance(column, list)}
        if not any(plain_name(name) in _ROLE_NAMES for name in columns):
            return [value]
        if len({len(column) for column in columns.values()}) > 1:
            raise Unusable("columns of turns differ in length")
        self.not_kept.update(f"{where}.{name}" for name in present.keys() - columns.keys())
        return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]

    def _read_turn(self, values: dict[str, Any], where: str) -> list[Message]:
        turn = Fields(values, f"{where}.")
        turn.drop_empty_json((*TOOL_COLUMNS, *CALL_FIELDS, *RESPONSE_FIELDS))
        spelling = turn.use(turn.find(ROLE_FIELDS))
        if isinstance(spelling, dict):
            spelling = spelling.get("role")
        if not isinstance(spelling, str) or not spelling.strip():
            raise Unusable("turn without role")
        content = turn.use(turn.find(CONTENT_FIELDS))
        results: list[Message] = []
        role = known_role(spelling)
        if is_call_role(spelling):
            message = self._read_call(content, turn, where)
        elif role is None:
            raise Unusable("turn without content" if content is None else "unknown role")
        else:
            message, results = self._read_content(role, content, where)
        if message["role"] == "assistant":
            self._take_reasoning(message, turn)
            self._take_calls(message, turn, where)
        results += self._take_results(message, turn, where)
        self._take_tools(turn)
        completed = _complete(message, results)
        if message in completed and (name := turn.take_first(NAME_FIELDS, str)):
            message["name"] = name
        self.kept |= turn.taken
        self.not_kept |= turn.left
        return completed

    def _read_call(self, content: Any, turn: Fields, where: str) -> Message:
        """ShareGPT's turn that is a call; one that isn't in a form that can be read stays as the text that it is."""
        value = content if is_present(content) else turn.take_first(CALL_FIELDS)
        try:
            return {"role": "assistant", "tool_calls": to_calls(value, f"{where}.tool_calls[]", self.not_kept)}
        except Unusable:
            if not isinstance(content, str):
                raise
            return {"role": "assistant", "content": content}

    def _read_content(self, role: str, content: Any, where: str) -> tuple[Message, list[Message]]:
        """The message, whose content is absent where it has none, and the turns of tools that stood in it."""
        message: Message = {"role": role}
        inside = f"{where}.content[]"
        if isinstance(content, dict) and isinstance(content.get("parts"), list):
            content = content["parts"]
        if role == "tool":
            content = result_text(content, inside, self.not_kept)
        elif isinstance(content, dict | list):
            parts = read_parts(content if isinstance(content, list) else [content], inside, self.not_kept)
            content = "".join(parts.texts) if parts.texts else None
            if role == "assistant":
                message |= {"reasoning_content": "\n\n".join(parts.reasoning)} if parts.reasoning else {}
                message |= {"tool_calls": parts.calls} if parts.calls else {}
            elif parts.reasoning or parts.calls:
                raise Unusable("unknown content part")
            return message | ({} if content is None else {"content": content}), parts.results
        if content is not None and not isinstance(content, str):
            raise Unusable("turn without content")
        return message | ({} if content is None else {"content": content}), []

    def _take_reasoning(self, message: Message, turn: Fields) -> None:
        name = turn.find(REASONING, str)
        reasoning = turn.get(name)
        if reasoning and "reasoning_content" not in message:
            message["reasoning_content"] = reasoning
            turn.take_equal(REASONING, reasoning)

    def _take_calls(self, message: Message, turn: Fields, where: str) -> None:
        name = turn.find(CALL_FIELDS)
        calls = turn.get(name)
        if not is_present(calls) or "tool_calls" in message:
            return
        try:
            message["tool_calls"] = to_calls(calls, f"{where}.{name}[]", self.not_kept)
        except Unusable:
            if not message.get("content"):  # else the turn stands without them, which is counted
                raise
        else:
            turn.take_equal(CALL_FIELDS, calls)

    def _take_results(self, message: Message, turn: Fields, where: str) -> list[Message]:
        """Results of tools in a field of the turn; those of a tool's turn without content are its content."""
        is_tool = message["role"] == "tool"
        if is_tool and (identity := turn.take_first(CALL_ID_FIELDS, (str, int))) is not None:
            message["tool_call_id"] = str(identity)
        name = turn.find(RESPONSE_FIELDS)
        results = turn.get(name)
        if not is_present(results) or not (message["role"] == "assistant" or (is_tool and not message.get("content"))):
            return []
        turns = read_results(turn.take(name), f"{where}.{name}[]", self.not_kept)
        if is_tool:
            message |= turns[0]
        return turns[1:] if is_tool else turns

    def _take_tools(self, turn: Fields) -> None:
        """Tools that a turn lists belong to the dialogue, if it hasn't others."""
        name = turn.find(TOOL_COLUMNS)
        if not is_present(turn.get(name)):
            return
        try:
            tools = to_tools(turn.get(name))
        except Unusable:
            return
        if self.tools in (None, tools):
            self.tools = tools
            turn.take(name)


def _is_pair(turn: Any) -> bool:
    """Whether a turn is a question with its answer, or a role with its content, as two texts."""
    return isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)


def _roles_given(item: Any) -> list[dict[str, Any]]:
    """The turns that an item of a dialogue stands for, each with a role."""
    if isinstance(item, list | tuple) and item and all(isinstance(p, list | tuple) and len(p) == 2 for p in item):
        if not all(isinstance(name, str) for name, _ in item):
            raise Unusable("turn is not an object")
        item = dict(item)  # Arrow's maps are pairs of name and value
    if not isinstance(item, dict):
        raise Unusable("turn is not an object")
    names = {plain_name(name): name for name, value in item.items() if is_present(value)}
    if names.keys() & _ROLE_NAMES:
        return [item]
    question = next((names[plain_name(n)] for n in USER_FIELDS if plain_name(n) in names), None)
    answer = next((names[plain_name(n)] for n in ASSISTANT_FIELDS if plain_name(n) in names), None)
    if question and answer:
        turns = [{"role": "user", "content": item[question]}]
        others = {name: value for name, value in item.items() if name not in (question, answer)}
        if system := names.get("system"):
            turns.insert(0, {"role": "system", "content": others.pop(system)})
        return [*turns, {**others, "role": "assistant", "content": item[answer]}]
    if len(names) == 1 and known_role(name := next(iter(names.values()))):
        return [{"role": name, "content": item[name]}]
    raise Unusable("turn without role")


def _complete(message: Message, results: list[Message]) -> list[Message]:
    """The message, unless it is an empty system turn, with the results of tools that stood in it; raises `Unusable`.

    Results come before what a user says in the same turn, and after the calls of an assistant.
    """
    role, content = message["role"], message.get("content")
    if role == "tool" and content is None:
        raise Unusable("tool turn without content")
    if role != "tool" and (content is None or not content.strip()):
        if role == "system" or (role == "user" and results):
            return results
        if role != "assistant" or not ("tool_calls" in message or message.get("reasoning_content", "").strip()):
            raise Unusable("turn without content" if content is None else "empty turn")
    return [*results, message] if role in ("system", "user") else [message, *results]
