"""Dialogues as chat templates get them: checked, tracked, and in the forms that a template may expect."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

from fastcache.cache_format.schema import TurnRole
from fastcache.errors import InputError
from fastcache.llm.provenance import Tracked, TrackedDict, TrackedList, joined, plain, tracked

ROLES = {
    "system": TurnRole.SYSTEM,
    "developer": TurnRole.SYSTEM,
    "user": TurnRole.USER,
    "assistant": TurnRole.ASSISTANT,
    "tool": TurnRole.TOOL,
}

CONTENT, REASONING, MARK, CALLS, NAME, TOOLS = "content", "reasoning", "mark", "tool calls", "name", "tools"
"""What a text of a dialogue is; `MARK` is a tag around reasoning inside a content."""

REASONING_TAGS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
"""What data and templates write around reasoning."""

FOLDED = "system turn folded into the user's"
EMPTY_LEFT_OUT = "empty system turn left out"
AS_SYSTEM = "developer turn passed as system"
AS_TEXT = "tool arguments passed as text"
AS_OBJECT = "tool arguments passed as an object"
EMPTY_CONTENT = "missing content passed as empty"
NO_REASONING = "reasoning not passed"
"""Changes that make a dialogue fit for a template."""

Message = Mapping[str, Any]


class Source(NamedTuple):
    """A text of a dialogue, by its code."""

    turn: int | None
    """Its message; None for definitions of tools."""
    field: str
    text: str = ""
    """The text itself; empty for data."""


@dataclass(frozen=True)
class Form:
    """A dialogue in one of the forms that a template may expect."""

    messages: list[TrackedDict]
    turns: list[int]
    """The number of each message in the dialogue."""
    changes: tuple[str, ...] = ()


@dataclass
class Dialogue:
    """A checked dialogue with tracked texts, and what their codes mean."""

    roles: tuple[str, ...]
    sources: list[Source] = field(default_factory=list)
    form: Form = field(default_factory=lambda: Form([], []))
    """As it was given."""
    tools: TrackedList | None = None

    @classmethod
    def of(cls, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> "Dialogue":
        """Raises `InputError` for what is no dialogue."""
        if not messages:
            raise InputError("A dialogue needs at least one message, got none.")
        made = cls(tuple(_checked_role(turn, message) for turn, message in enumerate(messages)))
        if tools:
            made.tools = made._tracked(list(tools), None, TOOLS)
        made.form = Form(
            [made._message(turn, message) for turn, message in enumerate(messages)], [*range(len(messages))]
        )
        return made

    def _message(self, turn: int, message: Message) -> TrackedDict:
        values = TrackedDict(role=self.roles[turn])
        content = message.get("content")
        if content is not None:
            parts = split_reasoning(content) if self.roles[turn] == "assistant" else [(content, CONTENT)]
            values["content"] = joined(self._tracked(text, turn, name) for text, name in parts)
        for key, name in (("reasoning_content", REASONING), ("name", NAME), ("tool_call_id", NAME)):
            if message.get(key) is not None:
                values[key] = self._tracked(message[key], turn, name)
        if message.get("tool_calls"):
            values["tool_calls"] = TrackedList(self._tracked(call, turn, CALLS) for call in message["tool_calls"])
            values["tool_calls"]._code = values["tool_calls"][0]._code
        return values

    def _tracked(self, value: Any, turn: int | None, name: str) -> Any:
        self.sources.append(Source(turn, name, value if isinstance(value, str) else ""))
        return tracked(value, len(self.sources) - 1)

    def forms(self, fold_system: bool) -> Iterator[Form]:
        """The dialogue in all forms that may fit a template, those with few changes first."""
        arguments = [call["function"].get("arguments") for message in self.form.messages for call in _calls(message)]
        calls: list[Any] = [None]
        if any(isinstance(argument, str) for argument in arguments):
            calls = [_with_objects, None]
        elif arguments:
            calls = [None, _with_texts]
        system = [None, *([_with_system] if "developer" in self.roles else []), _without_empty_system]
        folds = [None, _folded] if fold_system else [None]
        contents, reasoning = [None, _with_contents], [None, _without_reasoning]
        seen: list[tuple[str, ...]] = []
        for changes in product(folds, reasoning, system, contents, calls):
            form = self.form
            for change in changes:
                form = change(form) if change else form
            if form.changes not in seen:  # many changes change nothing
                seen.append(form.changes)
                yield form


def n_visible(text: str) -> int:
    """Characters that are no blanks."""
    return sum(map(len, text.split()))


def _checked_role(turn: int, message: Message) -> str:
    """The role of a message; raises `InputError` for one that has none, or texts that are no texts."""
    role, content = message.get("role"), message.get("content")
    calls, reasoning = message.get("tool_calls"), message.get("reasoning_content")
    may_be_silent = role == "assistant" and (calls or reasoning) and content is None
    if role not in ROLES or not (isinstance(content, str) or may_be_silent):
        raise InputError(
            f"Turn {turn} needs one of the roles {', '.join(ROLES)} and a text as content, "
            f"got role {role!r} and content {str(content)[:40]!r}."
        )
    for key in ("reasoning_content", "name", "tool_call_id"):
        if not isinstance(message.get(key), str | None):
            raise InputError(f"Turn {turn} needs a text as {key}, got {str(message[key])[:40]!r}.")
    is_list = isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)
    if calls and not (is_list and all(isinstance(call.get("function"), Mapping) for call in calls)):
        raise InputError(
            f'Turn {turn} needs a list of objects with a "function" as tool_calls, got {str(calls)[:40]!r}.'
        )
    return str(role)


def split_reasoning(content: str) -> list[tuple[str, str]]:
    """The parts of an assistant's content, each with what it is: reasoning, the tags around it, or content.

    A closing tag ends reasoning that began at the opening tag before it or, if there is none, at the beginning. An
    opening tag at the beginning opens reasoning even if it is never closed.
    """
    for opening, closing in REASONING_TAGS:
        if closing in content:
            break
        if content.lstrip().startswith(opening):
            before, tag, reasoning = content.partition(opening)
            return [part for part in ((before, CONTENT), (tag, MARK), (reasoning, REASONING)) if part[0]]
    else:
        return [(content, CONTENT)]
    parts: list[tuple[str, str]] = []
    *thoughts, rest = content.split(closing)
    for thought in thoughts:
        before, tag, reasoning = thought.rpartition(opening)
        parts += [(before, CONTENT), (tag, MARK), (reasoning, REASONING), (closing, MARK)]
    return [part for part in [*parts, (rest, CONTENT)] if part[0]]


def _calls(message: TrackedDict) -> list[TrackedDict]:
    return [call for call in message.get("tool_calls", ()) if isinstance(call.get("function"), dict)]


def _changed(form: Form, messages: list[TrackedDict], change: str) -> Form:
    if all(new is old for new, old in zip(messages, form.messages, strict=True)):
        return form
    return replace(form, messages=messages, changes=(*form.changes, change))


def _with(message: TrackedDict, **values: Any) -> TrackedDict:
    made = TrackedDict({**message, **values})
    made._code = message._code
    return made


def _with_arguments(form: Form, convert: Any, change: str) -> Form:
    messages = []
    for message in form.messages:
        converted, is_changed = TrackedList(), False
        for call in message.get("tool_calls", ()):
            arguments = convert(call["function"].get("arguments"), call._code)
            is_changed |= arguments is not None
            function = call["function"] if arguments is None else _with(call["function"], arguments=arguments)
            converted.append(_with(call, function=function))
            converted._code = converted[0]._code
        messages.append(_with(message, tool_calls=converted) if is_changed else message)
    return _changed(form, messages, change)


def _as_object(arguments: Any, code: int) -> Any:
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments or "{}")
        except ValueError:
            return None
        if isinstance(value, dict):
            return tracked(value, code)
    return None


def _as_text(arguments: Any, code: int) -> Any:
    return tracked(json.dumps(arguments, ensure_ascii=False), code) if isinstance(arguments, dict) else None


def _with_objects(form: Form) -> Form:
    return _with_arguments(form, _as_object, AS_OBJECT)


def _with_texts(form: Form) -> Form:
    return _with_arguments(form, _as_text, AS_TEXT)


def _with_contents(form: Form) -> Form:
    messages = [message if "content" in message else _with(message, content=Tracked("")) for message in form.messages]
    return _changed(form, messages, EMPTY_CONTENT)


def _without_reasoning(form: Form) -> Form:
    messages = []
    for message in form.messages:
        kept = {key: value for key, value in message.items() if key != "reasoning_content"}
        is_silent = "content" not in kept and "tool_calls" not in kept
        kept |= {"content": Tracked("")} if is_silent else {}
        messages.append(message if "reasoning_content" not in message else TrackedDict(kept))
    return _changed(form, messages, NO_REASONING)


def _with_system(form: Form) -> Form:
    messages = [_with(m, role="system") if m["role"] == "developer" else m for m in form.messages]
    return _changed(form, messages, AS_SYSTEM)


def _without_empty_system(form: Form) -> Form:
    kept = [i for i, m in enumerate(form.messages) if m["role"] not in ("system", "developer") or m["content"]]
    if len(kept) == len(form.messages) or not kept:
        return form
    return Form([form.messages[i] for i in kept], [form.turns[i] for i in kept], (*form.changes, EMPTY_LEFT_OUT))


def _folded(form: Form) -> Form:
    """The first turn, a system turn, stands at the beginning of the first user turn instead."""
    users = [i for i, message in enumerate(form.messages) if message["role"] == "user"]
    if form.messages[0]["role"] not in ("system", "developer") or not users:
        return form
    parts = [part for part in (form.messages[0]["content"], form.messages[users[0]]["content"]) if part]
    folded = _with(form.messages[users[0]], content=joined(parts, "\n\n"))
    messages = [folded if i == users[0] else message for i, message in enumerate(form.messages)]
    return Form(messages[1:], form.turns[1:], (*form.changes, FOLDED))


def untracked(value: Any) -> Any:
    """The value as plain JSON data."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {untracked(key): untracked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [untracked(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return int(value) if isinstance(value, int) else float(value)
