"""What comes back from a judge: responses of an endpoint, or answers that were got elsewhere."""

from pathlib import Path
from typing import Any

from fastcache.errors import FormatError, InputError, quoted
from fastcache.files import parse_json
from fastcache.text_files import require_regular_file

MOST_TOKENS = 2**40
TOKENS = ("prompt_tokens", "completion_tokens")


def clean(text: str) -> str:
    """Half of a surrogate pair, which JSON can write, is no text."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_of(body: Any) -> str:
    """What the model said in a chat completion; raises `ValueError` for anything else."""
    match body:
        case {"choices": [{"message": {"content": str(text)}}, *_]}:
            return clean(text)
        case {"choices": [{"message": {"content": None}}, *_]}:
            return ""
    raise ValueError("the response is no chat completion")


def usage_of(body: Any) -> dict[str, int]:
    """Tokens of the prompt and of the answer, by the response's own count; nothing where it has none."""
    match body:
        case {"usage": {"prompt_tokens": int(prompt), "completion_tokens": int(answer)}}:
            if not isinstance(prompt, bool) and min(prompt, answer) >= 0 and max(prompt, answer) < MOST_TOKENS:
                return dict(zip(TOKENS, (prompt, answer), strict=True))
    return {}


def read_answers(path: Path, known: set[str]) -> dict[str, str]:
    """Answers by the names of prompts, of a file of batch results or of lines {"id": ..., "answer": ...}; of two the first.

    Raises `InputError`, and takes none, where a line is neither or answers no prompt of `known`. Failed ones are left out.
    """
    require_regular_file(path, "--answers")
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            name, text = _read(line, f"{path} line {number}", known)
            if text is not None:
                found.setdefault(name, text)
    return found


def _read(line: bytes, where: str, known: set[str]) -> tuple[str, str | None]:
    """The name and the answer of a line; no answer where the batch run had none."""
    try:
        name, text = _fields(parse_json(line, where))
    except FormatError as error:
        raise InputError(str(error)) from error
    except ValueError as error:
        raise InputError(f"{where}: {error}. Nothing was taken from the file.") from error
    if name not in known:
        raise InputError(
            f"{where} answers {quoted(name)}, which is no prompt of these latents. Nothing was taken from the file."
        )
    return name, text


def _fields(value: Any) -> tuple[str, str | None]:
    match value:
        case {"id": str(name), "answer": str(text)}:
            return name, clean(text)
        case {"custom_id": str(name), "response": {"status_code": 200, "body": body}}:
            return name, text_of(body)
        case {"custom_id": str(name), "response": _}:
            return name, None
    raise ValueError('expected {"id": ..., "answer": ...}, or a line of the results of a batch run')
