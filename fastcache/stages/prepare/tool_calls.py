"""Tool calls and tool definitions in one form, and their JSON text."""

import json
from typing import Any

from fastcache.files import check_depth
from fastcache.stages.prepare.fields import Fields, Unusable, to_text

ARGUMENT_FIELDS = ("arguments", "parameters", "args", "input")
NAME_FIELDS = ("name", "function_name", "tool_name")
ID_FIELDS = ("id", "call_id", "tool_call_id")


def parse_json_text(text: str) -> Any:
    """The value of a JSON text; raises `Unusable`."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise Unusable("nested too deeply") from error
    except ValueError as error:
        raise Unusable("not JSON") from error


def json_text(value: Any) -> str:
    """The JSON text of a value, as a corpus stores it; raises `Unusable` for what not every reader of JSON would take."""
    try:
        check_depth(value)
    except ValueError as error:
        raise Unusable("nested too deeply") from error
    try:
        return to_text(json.dumps(value, ensure_ascii=False, allow_nan=False, default=str))
    except (ValueError, TypeError) as error:
        raise Unusable("not a finite number") from error


def _to_call(value: Any, where: str, not_kept: set[str]) -> dict[str, Any]:
    if isinstance(value, str):
        value = parse_json_text(value)
    if not isinstance(value, dict):
        raise Unusable("unreadable tool call")
    outer = inner = Fields(value, f"{where}.")
    outer.take_first(["type"])
    identity = outer.take_first(ID_FIELDS, (str, int))
    if (function := outer.find(["function"], dict)) is not None:
        inner = Fields(outer.take(function), f"{where}.{function}.")
    name = inner.take_first((*NAME_FIELDS, "function"), str)
    arguments = inner.take_first(ARGUMENT_FIELDS, (str, dict, list))
    if not name:
        raise Unusable("unreadable tool call")
    not_kept |= outer.left | inner.left
    call = {"type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}}
    return call if identity is None else {"id": str(identity), **call}


def to_calls(value: Any, where: str, not_kept: set[str]) -> list[dict[str, Any]]:
    """Tool calls as a corpus stores them: `{"id"?, "type": "function", "function": {"name", "arguments"}}`.

    Takes one call or a list, each an object or its JSON text, in OpenAI's form (with `function`), as a bare name with
    arguments, or as Anthropic's `tool_use`. The names of fields that no such call has are added to `not_kept`, after
    `where`. Raises `Unusable` for anything else.
    """
    if isinstance(value, str):
        value = parse_json_text(value)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise Unusable("unreadable tool call")
    lost: set[str] = set()
    found = [_to_call(call, where, lost) for call in calls]
    not_kept |= lost
    return found


def _to_tool(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        value = parse_json_text(value)
    if not isinstance(value, dict) or not value:
        raise Unusable("unreadable tools")
    # Templates expect OpenAI's form with `function`; older sets, and its newer interface, list the bare functions.
    if isinstance(value.get("function"), dict) or not isinstance(value.get("name"), str):
        return value
    if value.get("type", "function") != "function":
        return value  # a tool of another kind, such as a web search
    return {"type": "function", "function": {name: entry for name, entry in value.items() if name != "type"}}


def to_tools(value: Any) -> list[dict[str, Any]]:
    """The tools of a dialogue as a list of definitions; raises `Unusable` for what is no such list."""
    if isinstance(value, str):
        value = parse_json_text(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise Unusable("unreadable tools")
    return [_to_tool(tool) for tool in value]
