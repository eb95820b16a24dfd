"""`answers.jsonl`: every request before it is sent, and every answer as it came. What is in it isn't paid for twice."""

import json
from pathlib import Path
from typing import Any

from fastcache.errors import FormatError
from fastcache.files import append_to_log, read_json_lines, write_bytes_atomic
from fastcache.stages.interpret.judge.prompts import Prompt
from fastcache.stages.interpret.judge.responses import TOKENS, usage_of

LOG_FILE = "answers.jsonl"
Entry = dict[str, Any]


class AnswerLog:
    """A line for each thing that happened; the file is only ever added to."""

    def __init__(self, folder: Path) -> None:
        """Take up what is there; raises `FormatError` for a damaged file."""
        self._path = folder / LOG_FILE
        self._costs: list[float] = []
        self.answers: dict[str, str] = {}
        self.usage = dict.fromkeys(TOKENS, 0)
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
        self._add({**entry, "body": body, "usage": usage_of(body)})

    def imported(self, name: str, text: str, source: str) -> None:
        """Note an answer that was got elsewhere."""
        self._add({"event": "imported", "id": name, "text": text, "from": source})

    def _add(self, entry: Entry) -> None:
        self._take(entry)  # first: what can't be read again isn't written
        append_to_log(self._path, _line(entry))  # durable before a request goes out: nothing is paid for twice

    def _take(self, entry: Entry) -> None:
        try:
            if entry["event"] == "sent":
                self._costs.append(entry["cost"])
            elif "request" in entry:
                self._costs[entry["request"]] = entry["cost"]
            if "text" in entry:
                self.answers.setdefault(entry["id"], entry["text"])
            for name in self.usage:
                self.usage[name] += entry.get("usage", {}).get(name, 0)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise FormatError(
                f"{self._path}: a line isn't one of the judge's ({error!r}). The file is damaged."
            ) from error


def _line(entry: Entry) -> bytes:
    return (json.dumps(entry, allow_nan=False) + "\n").encode()
