"""Contents that are no plain text: lists of parts, and results of tools."""

from dataclasses import dataclass, field
from typing import Any

from fastcache.corpus import Message
from fastcache.stages.prepare.fields import Fields, Unusable
from fastcache.stages.prepare.spellings import (
    CALL_ID_FIELDS,
    CALL_ROLES,
    NAME_FIELDS,
    REASONING,
    RESPONSE_FIELDS,
    is_present,
    plain_name,
    plain_names,
)
from fastcache.stages.prepare.tool_calls import json_text, to_calls

TEXT_PARTS = plain_names("text", "input_text", "output_text", "plain_text", "refusal")
CALL_PARTS = plain_names("tool_use", *CALL_ROLES)
RESULT_PARTS = plain_names(*RESPONSE_FIELDS)
REASONING_PARTS = plain_names(*REASONING)
MEDIA_PARTS = plain_names(
    "image", "image_url", "input_image", "image_file", "audio", "audio_url", "input_audio", "output_audio", "video",
    "video_url", "input_video", "file", "input_file", "document",
)  # fmt: skip
RESULT_FIELDS = ("content", "response", "output", "result", "value", "text")


@dataclass
class Parts:
    """What the parts of one content hold."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[Message] = field(default_factory=list)
    """Turns of tools."""


def _kind(part: Any) -> str:
    """The plain name of a part's type: its own, or the first kind of media that it has a field for, or nothing."""
    if not isinstance(part, dict):
        return ""
    if isinstance(part.get("type"), str):
        return plain_name(part["type"])
    named = (plain_name(name) for name, value in part.items() if is_present(value))
    return next((name for name in named if name in MEDIA_PARTS), "")


def read_parts(content: list[Any], where: str, not_kept: set[str]) -> Parts:
    """The parts of a content; names of their fields that are not kept are added to `not_kept`, after `where`.

    Raises `Unusable`: "not text" for a part that is an image, audio, video or file, "unknown content part".
    """
    parts = Parts()
    for part in content:
        kind = _kind(part)
        if kind in MEDIA_PARTS:
            raise Unusable("not text")
        if isinstance(part, str):
            parts.texts.append(part)
        elif isinstance(part, dict) and kind in CALL_PARTS:
            value = next((part[name] for name in ("value", *CALL_ROLES) if is_present(part.get(name))), part)
            parts.calls += to_calls(value, where, not_kept)
        elif isinstance(part, dict) and kind in RESULT_PARTS:
            parts.results += read_results([part], where, not_kept)
        elif isinstance(part, dict) and kind in TEXT_PARTS | REASONING_PARTS | {""}:
            fields = Fields(part, f"{where}.")
            fields.take_first(["type"])
            text = fields.take_first([*([kind] if kind else []), "text", "value", "content"], str)
            not_kept |= fields.left
            if text is None and kind not in REASONING_PARTS:
                raise Unusable("unknown content part")
            (parts.reasoning if kind in REASONING_PARTS else parts.texts).append(text or "")
        elif part is not None:
            raise Unusable("unknown content part")
    return parts


def result_text(value: Any, where: str, not_kept: set[str]) -> str | None:
    """What a tool gave, as text: text as it stands, text parts joined, anything else as JSON; None for nothing."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        if any(_kind(part) in MEDIA_PARTS for part in value):
            raise Unusable("not text")
        if value and all(isinstance(part, str) or _kind(part) in TEXT_PARTS for part in value):
            return "".join(read_parts(value, where, not_kept).texts)
    return json_text(value)


def read_results(value: Any, where: str, not_kept: set[str]) -> list[Message]:
    """Turns of tools for the results that stand in another turn; `value` is one result or a list of them."""
    turns = []
    for result in value if isinstance(value, list) else [value]:
        turn: Message = {"role": "tool"}
        content = result
        if isinstance(result, dict):
            fields = Fields(result, f"{where}.")
            fields.take_first(["type"])
            identity = fields.take_first((*CALL_ID_FIELDS, "id"), (str, int))
            name = fields.take_first(NAME_FIELDS, str)
            content = fields.take_first(RESULT_FIELDS)
            not_kept |= fields.left
            turn |= {} if identity is None else {"tool_call_id": str(identity)}
            turn |= {"name": name} if name else {}
        turn["content"] = result_text(content, where, not_kept) or ""
        turns.append(turn)
    return turns
