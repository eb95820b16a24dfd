"""`answers.jsonl`: every request before it is sent, and every answer as it came. What is in it isn't paid for twice."""

import json
from pathlib import Path
from typing import Any

from fastcache.errors import FormatError, InputError
from fastcache.files import parse_json, read_json_lines, write_bytes_atomic
from fastcache.stages.interpret.judge.prompts import Prompt

LOG_FILE = "answers.jsonl"
Entry = dict[str, Any]


class AnswerLog:
    """A line for each thing that happened; the file is only ever added to."""

    def __init__(self, folder: Path) -> None:
        """Take up what is there; raises `FormatError` for a damaged file."""
        self._path = folder / LOG_FILE
        self._costs: list[float] = []
        self.answers: dict[str, str] = {}
        self.usage = {"prompt_tokens": 0, "completion_tokens": 0}
        entries = read_json_lines(self._path)
        write_bytes_atomic(self._path, b"".join(map(_line, entries)))  # without a line that a killed run tore
        for entry in entries:
            self._take(entry)

    @property
    def cost(self) -> float:
        """Of all requests so far; one whose answer never came counts with the most that it may have cost."""
        return sum(self._costs)

    @property
    def n_requests(self) -> int:
        """Requests sent so far."""
        return len(self._costs)

    def sent(self, prompt: Prompt, reserved: float) -> int:
        """Note that a request is about to be sent, which may cost `reserved`; returns its number."""
        number = self.n_requests
        self._add(
            {"event": "sent", "request": number, "id": prompt.name, "cost": reserved, "messages": prompt.messages}
        )
        return number

    def failed(self, number: int, prompt: Prompt, cost: float, reason: str, body: str = "") -> None:
        """Note that the request didn't bring an answer."""
        self._add(
            {"event": "failed", "request": number, "id": prompt.name, "cost": cost, "reason": reason, "body": body}
        )

    def answered(self, number: int, prompt: Prompt, cost: float, text: str, body: Entry) -> None:
        """Note the answer, and the response that it is from."""
        entry = {"event": "answered", "request": number, "id": prompt.name, "cost": cost, "text": text}
        self._add({**entry, "body": body, "usage": body.get("usage") or {}})

    def imported(self, name: str, text: str, source: str) -> None:
        """Note an answer that was got elsewhere."""
        self._add({"event": "imported", "id": name, "text": text, "from": source})

    def _add(self, entry: Entry) -> None:
        with self._path.open("ab") as file:
            file.write(_line(entry))
        self._take(entry)

    def _take(self, entry: Entry) -> None:
        try:
            if entry["event"] == "sent":
                self._costs.append(entry["cost"])
            elif "request" in entry:
                self._costs[entry["request"]] = entry["cost"]
            if "text" in entry:
                self.answers.setdefault(entry["id"], entry["text"])
            for name in self.usage:
                self.usage[name] += entry.get("usage", {}).get(name) or 0
        except (KeyError, IndexError, TypeError) as error:
            raise FormatError(
                f"{self._path}: a line isn't one of the judge's ({error!r}). The file is damaged."
            ) from error


def _line(entry: Entry) -> bytes:
    return (json.dumps(entry, allow_nan=False) + "\n").encode()


def text_of(body: Any) -> str:
    """What the model said in a chat completion's response; raises `ValueError` for anything else."""
    try:
        text = body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("the response is no chat completion") from None
    if not isinstance(text, str | None):
        raise ValueError("the response's content is no text")
    return (text or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a pair is no text


def read_answers(path: Path, known: set[str]) -> list[tuple[str, str]]:
    """Names of prompts, and answers, of a file of batch results or of lines {"id": ..., "answer": ...}.

    Raises `InputError`, and takes none, where a line is neither or answers no prompt of `known`. Failed ones are left out.
    """
    if not path.is_file():
        raise InputError(f"--answers {path}: there is no such file.")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        value = parse_json(line, where)
        name = value.get("custom_id", value.get("id")) if isinstance(value, dict) else None
        if name not in known:
            raise InputError(
                f"{where} answers {name!r}, which is no prompt of these latents. Nothing was taken from it."
            )
        if "answer" in value:
            found.append((name, value["answer"]))
        elif (value.get("response") or {}).get("status_code") == 200:
            try:
                found.append((name, text_of(value["response"].get("body"))))
            except ValueError as error:
                raise InputError(f"{where}: {error}.") from error
    if bad := [name for name, text in found if not isinstance(text, str)]:
        raise InputError(f"{path}: the answer to {bad[0]} should be a text. Nothing was taken from it.")
    return found
